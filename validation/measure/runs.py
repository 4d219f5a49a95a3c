"""The reference's run, and builds run beside it on the same tokens.

W windows, S tokens a window, P scored positions a window, H hidden size, k experts a token.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lfmq.converter.model.blocks import routed_blocks
from lfmq.converter.model.forward import Model, Trace, run_model
from lfmq.converter.model.tensors import head_of
from lfmq.converter.model.text import Windows
from lfmq.formats.plan import ModelConfig
from lfmq.quant.errors import ValidationError
from lfmq.validation.engines.child_process import run_native
from lfmq.validation.engines.protocol import EngineRequest, RouterInputs, WindowRun
from lfmq.validation.measure.predictions import (
    PositionScores,
    Predictor,
    score_logits,
    score_positions,
    scored_positions,
)
from lfmq.validation.measure.routing import (
    Choices,
    RoutingAgreement,
    compare_routing,
    same_sets,
    shared_experts,
)

Progress = Callable[[int, int], None]

# Tokens whose router inputs are kept for the local mode: 0.74 GB on disk for LFM2.5-8B-A1B.
_LOCAL_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Reference:
    """A model's run that others are compared with.

    Attributes:
        windows: the tokens.
        predictor: final hidden states and head.
        choices: experts and margins at the scored positions.
        selected: int64 [W, S, k] by MoE layer, at all positions.
        num_experts: of a layer.
        router_inputs: what each router read in the first windows, if it was recorded.
    """

    windows: Windows
    predictor: Predictor
    choices: Choices
    selected: Mapping[int, NDArray[np.int64]]
    num_experts: int
    router_inputs: RouterInputs = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run beside the reference's.

    Attributes:
        scores: of predictions.
        routing: of experts, by layer and by margin; None for a model without experts.
        same_sets: share of MoE layers with the reference's set of experts, [W, P]; None likewise.
    """

    scores: PositionScores
    routing: RoutingAgreement | None
    same_sets: NDArray[np.float64] | None


class Recorder:
    """Takes the inputs of routers out of a forward pass, into files that are mapped."""

    def __init__(self, config: ModelConfig, windows: Windows, folder: Path) -> None:
        sequence = windows.ids.shape[1]
        self._count = min(len(windows.ids), max(1, _LOCAL_TOKENS // sequence))
        self.inputs: dict[int, NDArray[np.float32]] = {
            layer: np.lib.format.open_memmap(
                folder / f"{layer}.npy",
                "w+",
                np.float32,
                (self._count, sequence, config.hidden_size),
            )
            for layer in config.moe_layers
        }
        routed = routed_blocks(config)
        self._names = {router.weight: layer for layer, (_, router) in routed.items()}

    def observe(self, names: tuple[str, ...], x: torch.Tensor, _: torch.Tensor | None) -> None:
        """What ``run_model`` shows."""
        layer = self._names.get(names[0])
        if layer is not None:
            kept = self.inputs[layer]
            kept[:] = x[: kept.shape[0] * kept.shape[1]].float().cpu().numpy().reshape(kept.shape)


@contextmanager
def open_recorder(config: ModelConfig, windows: Windows) -> Iterator[Recorder]:
    """A recorder whose files go with it."""
    with tempfile.TemporaryDirectory(prefix="lfmq-") as folder:
        yield Recorder(config, windows, Path(folder))


def run_reference(
    model: Model,
    windows: Windows,
    *,
    recorder: Recorder | None = None,
    progress: Progress | None = None,
) -> Reference:
    """Run the model that others are to be compared with."""
    observe = None if recorder is None else recorder.observe
    trace = run_model(model, windows.ids, observe=observe, progress=progress)
    return Reference(
        windows,
        Predictor(trace.hidden, model.weight(head_of(model.config))),
        _choices(trace, windows.ids),
        {n: _by_window(r.selected, windows.ids) for n, r in trace.routing.items()},
        model.config.num_experts,
        {} if recorder is None else recorder.inputs,
    )


def compare_model(
    reference: Reference, model: Model, *, progress: Progress | None = None
) -> Comparison:
    """Run a model through the reference forward on the reference's tokens, and compare."""
    ids = reference.windows.ids
    trace = run_model(model, ids, progress=progress)
    own = Predictor(trace.hidden, model.weight(head_of(model.config)))
    scores = score_positions(reference.predictor, own, ids)
    return _compare(reference, scores, _choices(trace, ids), {})


def compare_native(
    reference: Reference,
    path: Path,
    format: str,
    *,
    threads: int,
    progress: Progress | None = None,
) -> Comparison:
    """Run a build in its own runtime on the reference's tokens, and compare.

    One run predicts; if the reference's router inputs were recorded, a second gives them to every
    router, which tests the runtime's routing rule alone.

    Raises:
        ValidationError: the runtime is missing or fails.
    """
    ids = reference.windows.ids
    request = EngineRequest(path, ids, scored_positions(ids.shape[1]), threads=threads)
    selected: dict[int, list[NDArray[np.int64]]] = {n: [] for n in reference.selected}

    def logits() -> Iterator[NDArray[np.float32]]:
        for run in run_native(request, format, progress=progress):
            for layer, chosen in _checked(run, reference, path).items():
                selected[layer].append(chosen[request.scored])
            if run.logits is None or run.logits.shape[1] != len(reference.predictor.head):
                raise ValidationError(
                    f"{path}: its runtime gives no logits of "
                    f"{len(reference.predictor.head)} tokens; it is a build of another model"
                )
            yield run.logits

    scores = score_logits(reference.predictor, logits(), ids)
    choices = Choices({n: np.stack(chosen) for n, chosen in selected.items()}, {})
    local = _local_routing(reference, path, format, threads, progress)
    return _compare(reference, scores, choices, local)


def count_native_windows(windows: Windows) -> int:
    """How many windows :func:`compare_native` reports as progress, both runs together."""
    count, sequence = windows.ids.shape
    return int(count + min(count, max(1, _LOCAL_TOKENS // sequence)))


def _local_routing(
    reference: Reference, path: Path, format: str, threads: int, progress: Progress | None
) -> dict[int, float]:
    """Each layer's share of tokens with the reference's set, its router reading the same."""
    inputs = reference.router_inputs
    if not inputs:
        return {}
    count = len(next(iter(inputs.values())))
    ids = reference.windows.ids[:count]
    request = EngineRequest(path, ids, scored_positions(ids.shape[1]), inputs, threads)
    same = dict.fromkeys(inputs, 0)
    for window, run in enumerate(run_native(request, format, progress=progress)):
        for layer, chosen in _checked(run, reference, path).items():
            wanted = reference.selected[layer][window]
            same[layer] += int((shared_experts(wanted, chosen) == wanted.shape[-1]).sum())
    return {layer: count / ids.size for layer, count in same.items()}


def _checked(run: WindowRun, reference: Reference, path: Path) -> Mapping[int, NDArray[np.int64]]:
    """The experts of a window, which must be of the reference's layers and numbers."""
    expected = {n: chosen.shape[1:] for n, chosen in reference.selected.items()}
    found = {n: chosen.shape for n, chosen in run.selected.items()}
    if found != expected:
        raise ValidationError(
            f"{path}: its runtime chose experts in layers and numbers {_short(found)}, the "
            f"reference in {_short(expected)}; it is a build of another model"
        )
    return run.selected


def _short(shapes: Mapping[int, tuple[int, ...]]) -> str:
    return (
        ", ".join(f"{layer}: {list(shape)}" for layer, shape in sorted(shapes.items())) or "none"
    )


def _compare(
    reference: Reference, scores: PositionScores, choices: Choices, local: Mapping[int, float]
) -> Comparison:
    if not reference.choices.selected:
        return Comparison(scores, None, None)
    routing = compare_routing(reference.choices, choices, reference.num_experts, local)
    same = same_sets(reference.choices, choices, scores.kld.shape)
    return Comparison(scores, routing, same)


def _choices(trace: Trace, ids: NDArray[np.int64]) -> Choices:
    part = scored_positions(ids.shape[1])
    routing = trace.routing.items()
    return Choices(
        {n: _by_window(r.selected, ids)[:, part] for n, r in routing},
        {n: r.margin.cpu().numpy().reshape(ids.shape)[:, part] for n, r in routing},
    )


def _by_window(selected: torch.Tensor, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    found: NDArray[np.int64] = selected.cpu().numpy().reshape(*ids.shape, -1)
    return found
