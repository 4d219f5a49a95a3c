"""What a grid's error is beside that of 4 bits, rounded to nearest and by GPTQ, on the sample.

Statistics tell grids apart by rounding some rows to nearest (``grid_errors``); builds are made
by GPTQ. What GPTQ gains differs by grid: the last column, by which
``lfmq.converter.mixed_precision.predicted_kld`` multiplies.
Errors are of outputs on the calibration text; geometric means over some weights of
every role.
"""

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from ablation import load
from rich.console import Console
from rich.table import Table

from lfmq.converter.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmq.converter.checkpoint.locate import sample_file
from lfmq.converter.model.forward import Model, run_model
from lfmq.converter.model.tensors import expected_tensors
from lfmq.converter.model.text import Windows
from lfmq.converter.statistics.input_stats import InputsSeen
from lfmq.converter.statistics.sensitivity import grid_errors
from lfmq.converter.statistics.statistics import SCHEMES
from lfmq.formats.plan import FLOAT_ROLES
from lfmq.quant import gptq
from lfmq.quant.types import dequantize

EXPERTS = (3, 7)  # of every MoE layer


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sample = open_checkpoint(sample_file())
    windows = load(sample, "calibration.jsonl", options.tokens)
    found = [np.log(pair) for pair in ratios(sample, windows)]
    nearest, fed_back = np.exp(np.mean(found, axis=0))
    table = Table(title=f"{len(found)} weights, error over that of {SCHEMES[0]}")
    for column in ("grid", "to nearest", "GPTQ", "GPTQ over nearest"):
        table.add_column(column, justify="left" if column == "grid" else "right")
    for scheme, a, b in zip(SCHEMES, nearest, fed_back, strict=True):
        table.add_row(str(scheme), f"{a:.4f}", f"{b:.4f}", f"{b / a:.2f}")
    Console(width=100).print(table)


def ratios(sample: Checkpoint, windows: Windows) -> Iterator[tuple[list[float], list[float]]]:
    """Of each weight and every grid, to nearest and by GPTQ."""
    seen = InputsSeen({})
    run_model(Model(sample.config, sample.read), windows.ids, observe=seen.observe)
    factors = seen.factorized(gptq.DAMPING)
    for tensor in expected_tensors(sample.config):
        if tensor.name not in factors or tensor.role in FLOAT_ROLES:
            continue
        if tensor.expert is not None and tensor.expert not in EXPERTS:
            continue
        w = np.ascontiguousarray(sample.read(tensor.name))
        moments = factors[tensor.name]
        h = moments.damped.double().numpy()
        errors = []
        for scheme in SCHEMES:
            change = dequantize(gptq.quantize(w, moments, scheme)) - w
            errors.append(float(((change @ h) * change).sum()))
        importance = np.diagonal(h).astype(np.float32)
        yield list(grid_errors(w, importance)), [e / errors[0] for e in errors]


if __name__ == "__main__":
    main()
