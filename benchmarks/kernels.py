"""Weights a second of every kernel on one core, beside what the memory would allow.

Each runs on the three matrices of an expert of LFM2.5-8B-A1B (11 M weights). ``memory`` is the
bandwidth of a plain copy on the same core, and ``share`` what a kernel uses of it, counting each
byte it must read or write once: near 1 it is bound by memory, far below by arithmetic.

With ``--error``, in place of that: the squared error of the affine grid's search on all weights of
the sample, over that of ``mx.quantize`` with the same bits and groups.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from make_checkpoint import config, write_checkpoint
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from lfmq.converter.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmq.converter.checkpoint.locate import sample_file
from lfmq.converter.model.tensors import expected_tensors
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.quantize.rtn import quantize_entry
from lfmq.converter.run.planned import plan_layouts
from lfmq.formats.build import Segment
from lfmq.formats.gguf.blocks import PACKERS, QUANT_TYPES
from lfmq.formats.plan import FLOAT_ROLES, Plan
from lfmq.formats.registry import FORMATS
from lfmq.quant import gptq, rtn
from lfmq.quant.types import Scheme, Weight, dequantize

# Name, weights, bytes that must move for each, and what to run.
Kernel = tuple[str, int, float, Callable[[], object]]
REPEATS = 5
MLX_BITS, MLX_GROUPS = (4, 5, 6, 8), (32, 64, 128)
K_QUANTS = tuple(Scheme(bits, group, "kquant") for bits, group in ((4, 32), (5, 32), (6, 16)))
SCHEMES = (
    Scheme(4),
    Scheme(8),
    *(Scheme(bits, 32, "affine_bias") for bits in (4, 5, 6)),
    Scheme(4, 32, "affine_zero_point"),
    *K_QUANTS,
)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--error", action="store_true", help="the affine search beside mlx's")
    torch.set_num_threads(1)
    if parser.parse_args().error:
        Console(width=100).print(error_table(open_checkpoint(sample_file())))
    else:
        Console(width=100).print(speed_table())


def speed_table() -> Table:
    """Weights a second of every kernel."""
    memory = copy_bandwidth()
    table = Table(
        title=f"one core: a plain copy moves {memory / 1e9:.1f} GB/s, products of float32 "
        f"matrices run at {product_rate() / 1e9:.0f} GFLOP/s"
    )
    for column in ("kernel", "M weights/s", "bytes/weight", "share of memory"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    with TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "two", config(3, 4, 1792, 8192))
        sample = open_checkpoint(Path(folder) / "two")
        for name, weights, nbytes, run in kernels(sample):
            seconds = best(run)
            share = weights * nbytes / seconds / memory
            rate = f"{weights / seconds / 1e6:,.0f}"
            table.add_row(name, rate, f"{nbytes:.2f}", f"{share:.3f}")
    return table


def error_table(checkpoint: Checkpoint) -> Table:
    """Squared error over mlx's by bits and group."""
    tensors = [t for t in expected_tensors(checkpoint.config) if t.role not in FLOAT_ROLES]
    weights = [checkpoint.read(t.name) for t in tensors]
    table = Table(title="squared error over mx.quantize's")
    for column in ("bits", *(f"group {group}" for group in MLX_GROUPS)):
        table.add_column(column, justify="right")
    for bits in MLX_BITS:
        ratios = (error_ratio(weights, Scheme(bits, g, "affine_bias")) for g in MLX_GROUPS)
        table.add_row(str(bits), *(f"{ratio:.3f}" for ratio in ratios))
    return table


def error_ratio(weights: list[NDArray[np.float32]], scheme: Scheme) -> float:
    """Of the weights whose rows the group divides; mlx's scales and biases are float32."""
    import mlx.core as mx

    ours = theirs = 0.0
    options: dict[str, Any] = {"group_size": scheme.group, "bits": scheme.bits}
    for w in weights:
        if w.shape[-1] % scheme.group == 0:
            found = np.array(mx.dequantize(*mx.quantize(mx.array(w), **options), **options))
            theirs += float(np.square(found - w).sum(dtype=np.float64))
            found = dequantize(rtn.quantize(w, scheme))
            ours += float(np.square(found - w).sum(dtype=np.float64))
    return ours / theirs


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy larger than the caches."""
    source, target = np.ones(2**28, np.uint8), np.empty(2**28, np.uint8)
    return 2 * source.nbytes / best(lambda: np.copyto(target, source))


def product_rate() -> float:
    """Operations a second of a product of two matrices as large as an expert's inputs."""
    a = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    return 2 * 2048**3 / best(lambda: a @ a)


def best(run: Callable[[], object]) -> float:
    """CPU seconds of the fastest of some runs."""
    found = []
    for _ in range(REPEATS):
        started = time.process_time()
        run()
        found.append(time.process_time() - started)
    return min(found)


def kernels(checkpoint: Checkpoint) -> list[Kernel]:
    """Reading, quantizers and packers."""
    recipe = load_recipe("int4")
    plan = resolve_plan(checkpoint.config, recipe)
    unit = next(u for u in plan.write_groups() if u[0].expert == 0)
    names, weights = [e.name for e in unit], sum(e.size for e in unit)
    values = {name: checkpoint.read(name) for name in names}
    rows: list[Kernel] = [
        ("read and widen bfloat16", weights, 6.0, lambda: [checkpoint.read(n) for n in names]),
    ]
    for scheme in SCHEMES:
        run = partial(round_all, list(values.values()), scheme)
        run()  # compiles
        rows.append((f"round to nearest, {scheme}", weights, 5.06, run))
    w = values[names[0]]
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((4096, w.shape[1])))
    moments = gptq.factorize((x.T @ x).float())
    gptq.quantize(w[:16], moments, Scheme(4))
    for sweeps in (0, gptq.SWEEPS):
        name = f"GPTQ int4, {sweeps} sweeps"
        again = partial(gptq.quantize, w, moments, Scheme(4), sweeps=sweeps)
        rows.append((name, w.size, 5.06, again))
    found = {e.name: quantize_entry(checkpoint, e) for e in unit}
    return rows + packers(checkpoint, plan, found, weights) + block_packers(w)


def packers(
    checkpoint: Checkpoint, plan: Plan, found: dict[str, Weight], weights: int
) -> list[Kernel]:
    """Every format's packing of the expert."""
    rows: list[Kernel] = []
    for name, layout in plan_layouts(checkpoint, plan, FORMATS).items():
        segments = [p for f in layout.files for p in f.segments if p.sources[0] in found]
        nbytes = 1.06 + sum(p.nbytes for p in segments) / weights
        rows.append((f"pack for {name}", weights, nbytes, partial(pack_all, segments, found)))
    return rows


def block_packers(w: NDArray[np.float32]) -> list[Kernel]:
    """GGUF's packing of K-quants."""
    rows: list[Kernel] = []
    for scheme in K_QUANTS:
        q = rtn.quantize(w, scheme)
        pack = partial(PACKERS[QUANT_TYPES[scheme.grid, scheme.bits]], q)
        nbytes = (sum(a.nbytes for a in q.arrays()) + len(pack())) / w.size
        rows.append((f"pack {scheme} for gguf", w.size, nbytes, pack))
    return rows


def round_all(weights: list[NDArray[np.float32]], scheme: Scheme) -> None:
    """Quantize each."""
    for w in weights:
        rtn.quantize(w, scheme)


def pack_all(segments: list[Segment], found: dict[str, Weight]) -> None:
    """Pack each piece."""
    for segment in segments:
        segment.pack(*(found[source] for source in segment.sources))


if __name__ == "__main__":
    main()
