"""Points of the frontier converted with calibration on the sample: predicted and measured.

Statistics of the calibration text predict the KL divergence of every point; some of them, all
along both frontiers, and the built-in recipes are converted and judged on held-out text.
"""

import argparse

import numpy as np
import torch
from ablation import judge, load
from rich.console import Console
from rich.table import Table

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.checkpoint.locate import sample_file
from lfmq.converter.mixed_precision.frontier import Point, trace_frontier
from lfmq.converter.model.forward import Model
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.quantize.settings import Settings
from lfmq.converter.statistics.collect import collect
from lfmq.formats.plan import TensorPlan
from lfmq.formats.registry import FORMATS
from lfmq.validation.measure.runs import run_reference


def main() -> None:
    """Print the table, the rank correlation and the worst miss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration")
    parser.add_argument("--evaluate", type=int, default=32768, help="tokens of evaluation")
    parser.add_argument("--to", action="append", choices=sorted(FORMATS), help="default: all")
    parser.add_argument("--stride", type=int, default=4, help="of the points that are converted")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sample = open_checkpoint(sample_file())
    calibration = load(sample, "calibration.jsonl", options.tokens)
    statistics, _ = collect(sample, calibration)
    evaluation = load(sample, "evaluation.jsonl", options.evaluate)
    reference = run_reference(Model(sample.config, sample.read), evaluation)
    table = Table(title=f"{evaluation.tokens:,} tokens of evaluation")
    columns = (
        "format",
        "point",
        "bytes",
        "bytes/token",
        "predicted",
        "measured",
        "routing agreement",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("format", "point") else "right")
    pairs: dict[str, list[tuple[float, float]]] = {}
    judged: dict[tuple[TensorPlan, ...], tuple[str, str, str]] = {}  # formats share recipes
    for name in options.to or ("gguf", "mlx", "onnx"):
        frontier = trace_frontier(sample, statistics, name, FORMATS[name])
        for point in tried(frontier.points, options.stride):
            assert point.recipe is not None
            entries = resolve_plan(sample.config, point.recipe).entries
            if entries not in judged:
                judged[entries] = judge(sample, reference, point.recipe, calibration, Settings())
            kld, routing, _ = judged[entries]
            pairs.setdefault(name, []).append((point.kld or np.nan, float(kld)))
            row = (
                name,
                f"{point.kind} {point.name}",
                f"{point.nbytes:,}",
                f"{point.token_bytes:,}",
                f"{point.kld:.6f}",
                kld,
                routing,
            )
            table.add_row(*row)
            print(*row, flush=True)
    Console(width=120).print(table)
    for name, found in pairs.items():
        summarize(name, found)
    if len(pairs) > 1:
        summarize("all", sorted({pair for found in pairs.values() for pair in found}))


def summarize(name: str, pairs: list[tuple[float, float]]) -> None:
    """How well the predictions order and meet what was measured; a line."""
    predicted, measured = np.array(pairs).T
    ratio = measured / predicted
    worst = ratio[np.abs(np.log(ratio)).argmax()]
    print(
        f"{name}: {len(pairs)} points, rank correlation "
        f"{rank_correlation(predicted, measured):.3f}, measured over predicted: "
        f"median {np.median(ratio):.2f}, farthest from 1 {worst:.2f}"
    )


def tried(points: tuple[Point, ...], stride: int) -> list[Point]:
    """Every ``stride``-th point of either frontier, and the recipes."""
    found = [p for p in points if p.kind == "recipe"]
    for kind in ("size", "token"):
        found += [p for p in points if p.kind == kind][::stride]
    return found


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; equal values share the mean of their ranks."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """Of each value the mean rank of all that equal it."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


if __name__ == "__main__":
    main()
