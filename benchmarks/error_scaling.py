"""How the KL divergence grows with an error: parts of the sample rounded, and less than rounded.

Each part's weights move from the checkpoint's toward their values rounded to 4 bits, the whole way
or a share of it. An error that only moves predictions costs by its square; one that also makes
routers choose other experts costs more when it is small.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from ablation import load

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.checkpoint.locate import sample_file
from lfmq.converter.model.forward import Model, run_model
from lfmq.converter.model.tensors import Tensor, expected_tensors
from lfmq.converter.statistics.statistics import MEASURED
from lfmq.formats.plan import FLOAT_ROLES, Role
from lfmq.quant import rtn
from lfmq.quant.types import dequantize

SHARES = (1.0, 0.5, 0.25, 1 / 16)
EMBEDDING = "model.embed_tokens.weight"


def main() -> None:
    """Print a line for each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384, help="of the calibration text")
    options = parser.parse_args()
    sample = open_checkpoint(sample_file())
    windows = load(sample, "calibration.jsonl", options.tokens)
    tensors = [t for t in expected_tensors(sample.config) if t.role not in FLOAT_ROLES]
    weights = {t.name: np.array(sample.read(t.name)) for t in expected_tensors(sample.config)}
    change = {
        t.name: dequantize(rtn.quantize(weights[t.name], MEASURED)) - weights[t.name]
        for t in tensors
    }

    @torch.inference_mode()
    def log_probabilities(changed: dict[str, np.ndarray]) -> list[torch.Tensor]:
        model = Model(sample.config, lambda name: changed.get(name, weights[name]))
        hidden = run_model(model, windows.ids).hidden
        hidden = hidden[:, hidden.shape[1] // 2 :].flatten(0, 1)
        head = model.weight(EMBEDDING)
        return [F.log_softmax(F.linear(part, head), -1) for part in hidden.split(1024)]

    expected = log_probabilities({})
    parts: dict[str, list[str]] = {}
    for tensor in tensors:
        for part in parts_of(tensor):
            parts.setdefault(part, []).append(tensor.name)
    print("part", *(f"{share:g}" for share in SHARES))
    for part, names in parts.items():
        klds = []
        for share in SHARES:
            moved = {name: weights[name] + np.float32(share) * change[name] for name in names}
            pairs = zip(log_probabilities(moved), expected, strict=True)
            sums = [F.kl_div(a, b, log_target=True, reduction="sum").double() for a, b in pairs]
            klds.append(float(torch.stack(sums).sum()) / sum(len(b) for b in expected))
        print(part, *(f"{kld:.6f}" for kld in klds), flush=True)


def parts_of(tensor: Tensor) -> tuple[str, str, str]:
    """The parts that a weight belongs to."""
    if tensor.role is Role.EMBEDDING:
        own = "embedding"
    elif tensor.expert is not None:
        own = f"layer {tensor.layer}, experts"
    else:
        own = f"layer {tensor.layer}, {'dense' if tensor.role is Role.DENSE else 'mixer'}"
    return own, "all shared" if tensor.expert is None else "all experts", "everything"


if __name__ == "__main__":
    main()
