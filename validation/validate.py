"""Builds against the checkpoint they came from, on the same tokens."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lfmq.converter.checkpoint import Checkpoint
from lfmq.converter.forward import Model, Trace, run_model
from lfmq.converter.tensors import expected_tensors
from lfmq.converter.text import Windows
from lfmq.formats.build import Reader
from lfmq.formats.registry import FORMATS, build_nbytes, detect_format
from lfmq.quant.errors import ValidationError
from lfmq.quant.types import Geometry
from lfmq.validation.metrics import (
    PositionScores,
    Predictor,
    compare_routing,
    score_positions,
    scored_positions,
)
from lfmq.validation.report import (
    BuildReport,
    NoiseFloor,
    Report,
    RoutingAgreement,
    Thresholds,
    summarize_domains,
    summarize_scores,
)

Progress = Callable[[int, int], None]

_EMBEDDING = "model.embed_tokens.weight"
# What must agree for two runs to be compared position by position and expert by expert.
_COMPARABLE = ("hidden_size", "vocab_size", "num_hidden_layers", "num_dense_layers", "num_experts")


def validate(
    checkpoint: Checkpoint,
    builds: Iterable[Path],
    windows: Windows,
    *,
    thresholds: Thresholds = Thresholds(),  # noqa: B008 - frozen
    generation: Mapping[Path, Mapping[str, Any]] | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Report:
    """Run the weights of written files through the reference forward and compare.

    The reference runs once; its final hidden states (not its logits) are kept, so that 16 k tokens
    of a 128 k vocabulary take 134 MB.

    Args:
        checkpoint: the reference.
        builds: finished builds of any format.
        windows: the tokens.
        thresholds: what each build must reach.
        generation: what :mod:`lfmq.validation.generation` found of builds.
        device: where matrices are multiplied.
        progress: called with 1 and the number of layers of all runs after each layer.

    Raises:
        ValidationError: a build cannot be read or is of another model.
    """
    paths = tuple(builds)
    opened = [open_build(path, checkpoint.geometry) for path in paths]
    advance = _count_runs(progress, 2 + len(opened))
    model = Model(checkpoint.geometry, checkpoint.read, device=device)
    reference = run_reference(model, windows, progress=advance)
    half = Model(checkpoint.geometry, checkpoint.read, torch.bfloat16, device)
    scores, routing = compare(reference, half, progress=advance)
    floor = summarize_scores(scores)
    noise = NoiseFloor(floor.kld.mean, floor.top1_agreement, routing.exact_set)
    reports = []
    for path, reader in zip(paths, opened, strict=True):
        model = Model(reader.geometry, reader.read, device=device)
        found = compare(reference, model, progress=advance)
        report = _report(path, reader.geometry, windows, *found)
        reports.append(replace(report, generation=(generation or {}).get(path)))
    return Report(
        checkpoint=checkpoint.assets.name,
        text_sha256=windows.text_sha256,
        tokens_scored=int(scores.kld.size),
        reference_perplexity=math.exp(float(scores.reference_nll.mean())),
        noise_floor=noise,
        builds=tuple(reports),
        failures=tuple(f for r in reports for f in thresholds.missed_by(r)),
    )


@dataclass(frozen=True, slots=True)
class Reference:
    """A model's run that others are compared with: hidden states, head and routing."""

    windows: Windows
    trace: Trace
    predictor: Predictor


def run_reference(
    model: Model, windows: Windows, *, progress: Progress | None = None
) -> Reference:
    """Run the model that others are to be compared with."""
    trace = run_model(model, windows.ids, progress=progress)
    return Reference(windows, trace, Predictor(trace.hidden, model.weight(_EMBEDDING)))


def compare(
    reference: Reference, model: Model, *, progress: Progress | None = None
) -> tuple[PositionScores, RoutingAgreement]:
    """Run a model on the reference's tokens and compare predictions and routing."""
    ids = reference.windows.ids
    trace = run_model(model, ids, progress=progress)
    own = Predictor(trace.hidden, model.weight(_EMBEDDING))
    scores = score_positions(reference.predictor, own, ids)
    part = scored_positions(ids.shape[1])

    def scored(selected: torch.Tensor) -> torch.Tensor:
        return selected.view(*ids.shape, -1)[:, part].flatten(0, 1)

    layers = tuple(
        compare_routing(
            layer,
            scored(decided.selected),
            scored(trace.routing[layer].selected),
            model.geometry.num_experts,
        )
        for layer, decided in reference.trace.routing.items()
    )
    return scores, RoutingAgreement(layers)


def open_build(path: Path, expected: Geometry) -> Reader:
    """A finished build, refused when it is of another model than ``expected``.

    Raises:
        ValidationError: not a build, or of another model.
    """
    reader = FORMATS[detect_format(path)].open_reader(path)
    for key in _COMPARABLE:
        found, wanted = getattr(reader.geometry, key), getattr(expected, key)
        if found != wanted:
            raise ValidationError(
                f"{path}: {key} is {found}, the checkpoint's is {wanted}; it is a build of "
                "another model"
            )
    return reader


def _report(
    path: Path,
    geometry: Geometry,
    windows: Windows,
    scores: PositionScores,
    routing: RoutingAgreement,
) -> BuildReport:
    nbytes = build_nbytes(path)
    return BuildReport(
        path=str(path),
        format=detect_format(path),
        engine="read",
        engine_version=f"lfmq {version('lfmq')}, torch {version('torch')}",
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / sum(t.size for t in expected_tensors(geometry)),
        overall=summarize_scores(scores),
        routing=routing,
        domains=summarize_domains(scores, windows.domains),
    )


def _count_runs(progress: Progress | None, runs: int) -> Progress | None:
    if progress is None:
        return None
    return lambda step, layers: progress(step, layers * runs)
