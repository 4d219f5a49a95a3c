"""Where a build's divergence comes from: one layer of it at a time in the reference.

A stream of hidden states forks from the reference's at each layer: there it takes the build's
weights, after it the reference's again; another starts from the build's embedding and ends with
its head. What a stream does to the predictions is what that layer's error costs.

W windows, S tokens a window, H hidden size, L layers.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lfmq.converter.model.blocks import Block, Branch, routed_blocks
from lfmq.converter.model.forward import Model, ReadWeight, embed, normed, run_layer
from lfmq.converter.model.tensors import FINAL_NORM, head_of
from lfmq.validation.measure.predictions import scored_positions
from lfmq.validation.measure.report import Attribution, ExpertError, LayerDivergence
from lfmq.validation.measure.runs import Progress, Reference

# Tokens the streams run over: L + 2 times their hidden states are held.
STREAM_TOKENS = 8192
_HEAD_BYTES = 2**26


@torch.inference_mode()
def attribute(
    reference: Reference, model: Model, build: Model, *, progress: Progress | None = None
) -> Attribution:
    """Divergence by layer and errors of experts.

    Args:
        reference: the run of ``model``.
        model: the checkpoint's weights.
        build: the build's weights.
        progress: called with 1 and the number of layers after each layer.
    """
    ids = reference.windows.ids
    ids = ids[: max(1, STREAM_TOKENS // ids.shape[1])]
    layers, routed = model.config.num_hidden_layers, routed_blocks(model.config)
    states, streams, errors = embed(model, ids), [embed(build, ids)], list[ExpertError]()
    for layer in range(layers):
        forked = run_layer(build, layer, states)[0]
        for index, stream in enumerate(streams):
            streams[index] = run_layer(model, layer, stream)[0]
        streams.append(forked)
        states = run_layer(model, layer, states)[0]
        if layer in routed:
            errors += _expert_errors(reference, model.read, build.read, routed[layer][0])
        if progress is not None:
            progress(1, layers)
    klds = _divergences(reference, model, build, states, streams)
    found = tuple(LayerDivergence(layer, kld) for layer, kld in enumerate(klds[1:]))
    return Attribution(klds[0], found, tuple(errors))


def _divergences(
    reference: Reference,
    model: Model,
    build: Model,
    states: torch.Tensor,
    streams: list[torch.Tensor],
) -> list[float]:
    """Mean KL divergence of every stream; the first is that of the build's embedding and head.

    The streams are used up: each is replaced by its final hidden states.
    """
    head, own = reference.predictor.head, build.weight(head_of(build.config))
    part = scored_positions(states.shape[1])
    step = max(1, _HEAD_BYTES // (4 * head.shape[0]))

    def hidden(x: torch.Tensor) -> torch.Tensor:
        return normed(model, FINAL_NORM, x[:, part])

    wanted = hidden(states)
    sums = np.zeros(len(streams))
    for index, stream in enumerate(streams):
        streams[index] = hidden(stream)
    for start in range(0, len(wanted), step):
        rows = slice(start, start + step)
        p = F.log_softmax(F.linear(wanted[rows], head), -1)
        for index, stream in enumerate(streams):
            q = F.log_softmax(F.linear(stream[rows], head if index else own), -1)
            sums[index] += float((p.exp() * q.neg_().add_(p)).sum(dtype=torch.float64))
    return [float(total) for total in sums / len(wanted)]


def _expert_errors(
    reference: Reference, read: ReadWeight, read_build: ReadWeight, block: Block
) -> list[ExpertError]:
    chosen = reference.choices.selected[block.layer].reshape(-1)
    tokens = np.bincount(chosen, minlength=len(block.branches))
    return [
        ExpertError(block.layer, expert, int(tokens[expert]), _error(read, read_build, branch))
        for expert, branch in enumerate(block.branches)
    ]


def _error(read: ReadWeight, read_build: ReadWeight, branch: Branch) -> float:
    change = size = 0.0
    for name in branch.weights:
        w = read(name)
        change += _square(read_build(name) - w)
        size += _square(w)
    return float(np.sqrt(change / size)) if size else float("inf" if change else 0)


def _square(w: NDArray[np.float32]) -> float:
    """Sum of squares in double, a row's in single."""
    return float(np.einsum("ij,ij->i", w, w).sum(dtype=np.float64))
