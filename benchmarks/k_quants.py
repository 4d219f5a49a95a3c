"""K-quants rounded to nearest beside ggml's own: weights a second on one core, squared error.

Speed is that of an expert of LFM2.5-8B-A1B (11 M random weights), ours and ggml's in turn, CPU
seconds, the best of some runs. The error is ours as a share of ggml's, without importance, over
every quantizable weight of the sample, and with --checkpoint over some of another: one expert a
layer, the shared weights of two layers and rows of the embedding. A second table has types of
ggml's that lfmq does not make: what they lose beside our Q4_K.
"""

import argparse
import ctypes
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from ggml import F32, load_library, round_trip
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quant_shape_to_byte_shape
from kernels import best
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from lfmq.converter.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmq.converter.checkpoint.locate import sample_file
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.formats.plan import Role, TensorPlan
from lfmq.quant.rtn import quantize
from lfmq.quant.types import Scheme, dequantize

TYPES = {
    GGMLQuantizationType.Q4_K: Scheme(4, 32, "kquant"),
    GGMLQuantizationType.Q5_K: Scheme(5, 32, "kquant"),
    GGMLQuantizationType.Q6_K: Scheme(6, 16, "kquant"),
}
LEFT_OUT = (GGMLQuantizationType.IQ4_NL, GGMLQuantizationType.Q3_K)
ROWS = 4096  # of a weight at most
LAYERS = (0, 2)  # whose shared weights are taken of a large checkpoint, one conv, one attention


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="beside the sample, of any size")
    checkpoint = parser.parse_args().checkpoint
    sample = open_checkpoint(sample_file())
    library = load_library()
    groups = [("the sample", sample, entries(sample))]
    if checkpoint is not None:
        other = open_checkpoint(checkpoint)
        groups.append((checkpoint.name, other, [e for e in entries(other) if is_chosen(e)]))
    table = Table(title="one core, M weights a second; squared error as a share of ggml's")
    for column in ("type", "ours", "ggml", "times"):
        table.add_column(column)
    for name, _, found in groups:
        table.add_column(f"{name}: {len(found)} weights")
        table.add_column("worst of them")
    for kind, scheme in TYPES.items():
        cells = speed(library, kind, scheme)
        for _, source, found in groups:
            cells += errors(library, source, found, kind, scheme)
        table.add_row(kind.name, *cells)
    console = Console(width=120)
    console.print(table)
    console.print(left_out(library, groups))


def left_out(
    library: ctypes.CDLL, groups: Iterable[tuple[str, Checkpoint, list[TensorPlan]]]
) -> Table:
    """Squared error of ggml in other types as a multiple of ours in Q4_K."""
    table = Table(title="types of ggml's that are left out; squared error over that of our Q4_K")
    table.add_column("type")
    table.add_column("bits a weight", justify="right")
    for name, _, _ in groups:
        table.add_column(name, justify="right")
    yardstick = TYPES[GGMLQuantizationType.Q4_K]
    for kind in LEFT_OUT:
        block, size = GGML_QUANT_SIZES[kind]
        cells = []
        for _, checkpoint, found in groups:
            ours, theirs = squares(library, checkpoint, found, kind, yardstick, plain=True).T
            cells.append(f"{theirs.sum() / ours.sum():.2f}")
        table.add_row(kind.name, f"{8 * size / block:.2f}", *cells)
    return table


def entries(checkpoint: Checkpoint) -> list[TensorPlan]:
    """Weights that any type may hold."""
    plan = resolve_plan(checkpoint.config, load_recipe("int8"))
    return [e for e in plan.entries if e.scheme is not None]


def is_chosen(entry: TensorPlan) -> bool:
    """Of a large checkpoint some weights of every role."""
    if entry.expert is not None:
        return entry.expert == entry.layer
    return entry.role is Role.EMBEDDING or entry.layer in LAYERS


def speed(library: ctypes.CDLL, kind: GGMLQuantizationType, scheme: Scheme) -> list[str]:
    """Millions of weights a second, ours and ggml's, and their ratio."""
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((3 * 1792, 2048), np.float32) * np.float32(0.02)).astype(np.float32)
    packed = np.empty(quant_shape_to_byte_shape(w.shape, kind), np.uint8)
    source = w.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    quantize(w[:16], scheme)  # compiles
    ours = w.size / best(lambda: quantize(w, scheme)) / 1e6
    theirs = (
        w.size
        / 1e6
        / best(
            lambda: library.ggml_quantize_chunk(
                kind, source, packed.ctypes.data, 0, *w.shape, None
            )
        )
    )
    return [f"{ours:.0f}", f"{theirs:.1f}", f"{ours / theirs:.1f}"]


def errors(
    library: ctypes.CDLL,
    checkpoint: Checkpoint,
    found: list[TensorPlan],
    kind: GGMLQuantizationType,
    scheme: Scheme,
) -> list[str]:
    """Our squared error as a share of ggml's, of all and of the worst weight."""
    ours, theirs = squares(library, checkpoint, found, kind, scheme, plain=False).T
    return [f"{ours.sum() / theirs.sum():.4f}", f"{(ours / theirs).max():.4f}"]


def squares(
    library: ctypes.CDLL,
    checkpoint: Checkpoint,
    found: list[TensorPlan],
    kind: GGMLQuantizationType,
    scheme: Scheme,
    *,
    plain: bool,
) -> NDArray[np.float64]:
    """Squared errors of each weight, ours and ggml's, [N, 2].

    ggml weighs errors by the size of weights unless it is told that they count alike (``plain``).
    """
    pairs = []
    for entry in found:
        w = np.ascontiguousarray(checkpoint.read(entry.name)[:ROWS])
        importance = np.ones(w.shape[1], np.float32) if plain else None
        theirs = round_trip(library, w, kind, importance)
        pairs.append((squared(dequantize(quantize(w, scheme)) - w), squared(theirs - w)))
    return np.array(pairs)


def squared(error: F32) -> float:
    """Sum of squares."""
    return float(np.square(error, dtype=np.float64).sum())


if __name__ == "__main__":
    main()
