"""compressed-tensors builds in transformers, on CPU.

The engines these builds are for need a GPU; transformers stands in for them: the library
compressed-tensors unpacks the file, and another implementation of the model than ours runs it.
It is asked for float32, so that what differs is the weights and not the arithmetic of a machine
that will not serve them. Experts it makes, and runs, in the float16 of their scales.

Its loader knows one scheme for all experts. A build with several goes through the library's own
dequantizer first, into a temporary folder.
"""

import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lfmq.converter.model.blocks import routed_blocks
from lfmq.formats.compressed_tensors.reader import CompressedTensorsReader, open_reader
from lfmq.quant.errors import ValidationError
from lfmq.validation.engines.protocol import EngineRequest, WindowRun

NAME = "transformers"
EXTRA = "vllm-format"


def version() -> str:
    """The two libraries'; ImportError without one of them."""
    return ", ".join(
        f"{name} {installed(name)}" for name in ("transformers", "compressed-tensors")
    )


@torch.inference_mode()
def run_windows(request: EngineRequest) -> Iterator[WindowRun]:
    """Run each window of the request.

    Raises:
        ImportError: a library is missing.
        ValidationError: the build cannot be loaded, or is not run as this module knows it.
    """
    torch.set_num_threads(request.threads)
    model = _load(request.path)
    watch = _Watch(model)
    inputs = request.router_inputs
    # At least the last position: the weights are unpacked when the model as a whole is called.
    kept = torch.arange(request.ids.shape[1])[request.scored] if inputs is None else 1
    for index, ids in enumerate(request.ids):
        watch.expect({} if inputs is None else {k: x[index] for k, x in inputs.items()})
        tokens = torch.from_numpy(ids[None].astype(np.int64))
        logits = model(tokens, use_cache=False, logits_to_keep=kept).logits[0].float().numpy()
        yield WindowRun(logits if inputs is None else None, watch.seen())


class _Watch:
    """Hooks on the MoE layers: which experts ran, and other inputs than their own."""

    def __init__(self, model: Any) -> None:
        self._layers = []
        for layer, block in enumerate(model.model.layers):
            if hasattr(block.feed_forward, "experts"):
                self._layers.append(layer)
                block.feed_forward.register_forward_pre_hook(self._replace(layer))
                block.feed_forward.experts.register_forward_pre_hook(self._note(layer))

    def expect(self, inputs: Mapping[int, NDArray[np.float32]]) -> None:
        """Begin a window; ``inputs`` [S, H] replace what MoE layers read."""
        self._inputs = inputs
        self._selected: dict[int, NDArray[np.int64]] = {}

    def seen(self) -> dict[int, NDArray[np.int64]]:
        """The experts each layer was told to run, [S, k]."""
        if not self._layers or list(self._selected) != self._layers:
            raise ValidationError(
                f"{version()}: no experts were seen in layers "
                f"{sorted(set(self._layers) - set(self._selected)) or 'of any number'}; "
                f"pip install 'lfmq[{EXTRA}]'"
            )
        return self._selected

    def _replace(self, layer: int) -> Any:
        def hook(_: Any, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            states = self._inputs.get(layer)
            if states is None:
                return given
            return (torch.from_numpy(states.astype(np.float32)).view_as(given[0]),)

        return hook

    def _note(self, layer: int) -> Any:
        def hook(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            _, chosen, _ = given
            self._selected[layer] = chosen.numpy().astype(np.int64)

        return hook


# ---- loading


def _load(path: Path) -> Any:
    """The model, directly or through the library's dequantizer."""
    reader = open_reader(path)
    if _has_one_scheme(reader):
        return _from_pretrained(path, path)
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / path.name
        _dequantize(path, dense)
        return _from_pretrained(dense, path)


def _has_one_scheme(reader: CompressedTensorsReader) -> bool:
    found = {
        reader.scheme(name)
        for block, _ in routed_blocks(reader.config).values()
        for branch in block.branches
        for name in branch.weights
    }
    return len(found) <= 1 and None not in found


def _from_pretrained(folder: Path, build: Path) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except ImportError:
        raise
    except Exception as error:  # of any kind, from several libraries
        raise ValidationError(f"{build}: transformers does not load it ({error!r})") from error
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise ValidationError(f"{build}: transformers loads it in part ({wrong})")
    return model.eval()


def _dequantize(build: Path, dense: Path) -> None:
    """In float16, the dtype of the scales, in which the library multiplies."""
    from compressed_tensors.entrypoints.convert import (
        CompressedTensorsDequantizer,
        convert_checkpoint,
    )

    try:
        dequantizer = CompressedTensorsDequantizer(build, dtype=torch.float16)
        convert_checkpoint(build, dense, dequantizer, max_workers=1, device="cpu")
    except Exception as error:  # of any kind
        raise ValidationError(
            f"{build}: compressed-tensors does not dequantize it ({error!r})"
        ) from error
