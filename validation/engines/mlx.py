"""MLX builds in mlx-lm: its model, its routing code and its kernels, on MLX's default device.

On a GPU, activations have the type of the file's scales (float16 in lfmq's builds), as mlx-lm's
user gets them; the logits alone are widened to float32. On a CPU that is so where the routers'
inputs are given. Whole windows run in float32 there: MLX's CPU kernels add the products
of quantized weights up in float16, fifty times slower than in float32 and less exactly than the
GPU's, which the file is for. MLX has no setting for threads.

Two places of each MoE block (``mlx_lm.models.lfm2_moe.Lfm2MoeSparseMoeBlock``) get a function of
ours in front: the block itself, to replace what its router and its experts read, and its
``switch_mlp``, to see the experts that the block's own code asks for. Nothing is computed a second
time, so a routing rule that mlx-lm gets wrong is seen.
"""

from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import numpy as np

from lfmq.validation.engines.protocol import EngineRequest, RouterInputs, WindowRun

NAME = "mlx-lm"
EXTRA = "mlx"


def version() -> str:
    """The installed runtime's name and version; ImportError without it."""
    return f"mlx-lm {metadata.version('mlx-lm')}, mlx {metadata.version('mlx')}"


def run_windows(request: EngineRequest) -> Iterator[WindowRun]:
    """Every window of the request, in order."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(request.path)
    if request.router_inputs is None and mx.default_device().type == mx.cpu:
        model.set_dtype(mx.float32)
    given: dict[int, Any] = {}
    asked: dict[int, Any] = {}
    _tap(model, given, asked)
    for window, ids in enumerate(request.ids):
        given.update(_window(request.router_inputs, window))
        logits = model(mx.array(ids)[None])[0, request.scored].astype(mx.float32)
        # arrays are computed when asked for: with inputs given, the routers alone are
        wanted = [*asked.values(), *([] if given else [logits])]
        mx.eval(wanted)
        selected = {layer: np.array(i[0], np.int64) for layer, i in asked.items()}
        yield WindowRun(None if given else np.array(logits), selected)


def _window(inputs: RouterInputs | None, window: int) -> dict[int, Any]:
    import mlx.core as mx

    return {layer: mx.array(x[window])[None] for layer, x in (inputs or {}).items()}


def _tap(model: Any, given: dict[int, Any], asked: dict[int, Any]) -> None:
    """Feed ``given`` to MoE blocks, by layer, and keep in ``asked`` the experts they choose."""
    for layer, decoder in enumerate(model.layers):
        block = decoder.feed_forward
        if hasattr(block, "switch_mlp"):
            block.switch_mlp = _asked_for(block.switch_mlp, layer, asked)
            decoder.feed_forward = _given_to(block, layer, given)


def _asked_for(experts: Any, layer: int, asked: dict[int, Any]) -> Callable[[Any, Any], Any]:
    def call(x: Any, indices: Any) -> Any:
        asked[layer] = indices
        return experts(x, indices)

    return call


def _given_to(block: Any, layer: int, given: dict[int, Any]) -> Callable[[Any], Any]:
    def call(x: Any) -> Any:
        return block(given[layer].astype(x.dtype) if layer in given else x)

    return call
