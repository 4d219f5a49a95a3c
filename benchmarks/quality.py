"""Quality on the sample against llama.cpp's and MLX's own quantizers: one run, one forward.

Every build is a set of weights run through the reference forward on the same held-out tokens.
llama.cpp's types are those its quantizer gives each tensor (``more_bits`` of llama-quant.cpp),
made by ggml itself with an importance matrix collected on the calibration text ours uses.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from ggml import load_library, round_trip
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from rich.console import Console
from rich.table import Table

from lfmq.converter.calibrated import calibrated_units
from lfmq.converter.calibration import Calibration, Settings
from lfmq.converter.checkpoint import Checkpoint, open_checkpoint
from lfmq.converter.forward import Model, run_model
from lfmq.converter.locate import sample_file
from lfmq.converter.nearest import nearest_units
from lfmq.converter.plan import resolve_plan
from lfmq.converter.recipe import Recipe, load_recipe
from lfmq.converter.tensors import Tensor, expected_tensors
from lfmq.converter.text import Windows, load_windows
from lfmq.quant.types import (
    FLOAT_ROLES,
    Geometry,
    Plan,
    Quantized,
    Role,
    Scheme,
    Weight,
    dequantize,
)
from lfmq.validation.runs import Reference, compare_model, run_reference
from lfmq.validation.summaries import summarize_scores

Weights = dict[str, np.ndarray]
Q = GGMLQuantizationType


@dataclass(frozen=True)
class Build:
    """Weights to be judged."""

    name: str
    bits_per_weight: float
    weights: Weights
    seconds: float


def main() -> None:
    """Make the builds, judge each, print the table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration and evaluation")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--calibrate-on", action="append", help="domains; default: all")
    parser.add_argument("--evaluate-on", action="append", help="domains; default: all")
    parser.add_argument("--only", help="names that contain this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sample = open_checkpoint(sample_file())
    calibration = load(sample, "calibration.jsonl", options, options.calibrate_on)
    evaluation = load(sample, "evaluation.jsonl", options, options.evaluate_on)
    reference = run_reference(Model(sample.geometry, sample.read), evaluation)
    rows = []
    for make in builds(sample, calibration):
        if options.only and options.only not in make[0]:
            continue
        started = time.monotonic()
        bits, weights = make[1]()
        build = Build(make[0], bits, weights, time.monotonic() - started)
        rows.append(judge(reference, sample.geometry, build))
        print(json.dumps(rows[-1]), flush=True)
    show(rows, reference)


def load(
    sample: Checkpoint, name: str, options: argparse.Namespace, domains: list[str] | None
) -> Windows:
    """Windows of a text of the sample, of some domains only when given."""
    tokens = options.tokens if domains is None else 2**40
    found = load_windows(
        [sample_file(name)],
        sample.assets,
        sample.geometry,
        tokens=tokens,
        sequence=options.sequence,
    )
    if domains is None:
        return found
    rows = [i for i, d in enumerate(found.domains) if d in domains]
    rows = rows[: options.tokens // options.sequence]
    return replace(found, ids=found.ids[rows], domains=tuple(found.domains[i] for i in rows))


def builds(
    sample: Checkpoint, calibration: Windows
) -> Iterator[tuple[str, Callable[[], tuple[float, Weights]]]]:
    """Names of builds and what makes them."""
    for recipe in ("int8", "int4", "int4-all"):
        yield f"{recipe}, nearest", partial(ours, sample, load_recipe(recipe), None)
        yield f"{recipe}, calibrated", partial(ours, sample, load_recipe(recipe), calibration)
    importance = collect_importance(sample, calibration)
    library = load_library()

    def ggml(types: Callable[[Tensor], Q], *, plain: bool = False) -> tuple[float, Weights]:
        bits, weights = 0.0, {}
        for t in expected_tensors(sample.geometry):
            w = sample.read(t.name)
            if t.role not in FLOAT_ROLES:
                kind = types(t)
                block, nbytes = GGML_QUANT_SIZES[kind]
                bits += 8 * nbytes / block * t.size
                chosen = None if plain or kind == Q.Q8_0 else importance.get(t.name)
                w = round_trip(library, w, kind, chosen)
            else:
                bits += 32 * t.size
            weights[t.name] = w
        return bits / sum(t.size for t in expected_tensors(sample.geometry)), weights

    def split(experts: Q, shared: Q) -> Callable[[Tensor], Q]:
        return lambda t: shared if t.expert is None else experts

    g = sample.geometry
    yield "llama.cpp Q4_K_M, imatrix", lambda: ggml(k_m(g, Q.Q4_K))
    yield "llama.cpp Q5_K_M, imatrix", lambda: ggml(k_m(g, Q.Q5_K))
    yield "experts Q4_K, rest Q8_0, imatrix", lambda: ggml(split(Q.Q4_K, Q.Q8_0))
    yield "experts Q5_K, rest Q8_0, imatrix", lambda: ggml(split(Q.Q5_K, Q.Q8_0))
    yield (
        "experts Q4_0, rest Q8_0 (plain QMoE, MatMulNBits)",
        lambda: ggml(split(Q.Q4_0, Q.Q8_0), plain=True),
    )
    yield "mlx affine, experts 4 bits g32, rest 8", lambda: mlx_affine(sample, 32)
    yield "mlx affine, experts 4 bits g64, rest 8", lambda: mlx_affine(sample, 64)


def ours(
    sample: Checkpoint, recipe: Recipe, windows: Windows | None, settings: Settings | None = None
) -> tuple[float, Weights]:
    """Weights of a recipe, rounded to nearest or calibrated."""
    plan = resolve_plan(sample.geometry, recipe)
    found: dict[str, Weight] = {}
    if windows is None:
        units = nearest_units(sample, plan, found.update, threads=2)
    else:
        calibration = Calibration(windows, settings or Settings())
        units = calibrated_units(sample, plan, calibration, found.update, threads=2)
    for _ in units:
        pass
    values = {n: dequantize(w) if isinstance(w, Quantized) else w for n, w in found.items()}
    return plan_bits(plan), values


def plan_bits(plan: Plan) -> float:
    """Bits per weight of tensors alone: codes and scales, floats as float32."""
    bits = 0.0
    for e in plan.entries:
        scheme = e.scheme
        bits += e.size * (32 if scheme is None else scheme.bits + scale_bits(scheme))
    return bits / sum(e.size for e in plan.entries)


def scale_bits(scheme: Scheme) -> float:
    """Bits a weight of scales, without the offsets of MLX and ONNX."""
    if scheme.grid != "superblock":
        return 16 / scheme.group
    if scheme.has_offset:  # two codes of six bits
        return 2 * (16 / scheme.span + 6 / scheme.group)
    return 16 / scheme.span + 8 / scheme.group


def k_m(g: Geometry, base: Q) -> Callable[[Tensor], Q]:
    """llama-quantize's Q4_K_M or Q5_K_M; a tied embedding is typed as the output."""

    def more_bits(i: int, n: int) -> bool:
        return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2

    def kind(t: Tensor) -> Q:
        if t.role is Role.EMBEDDING:
            return Q.Q6_K
        assert t.layer is not None
        down = t.role is Role.EXPERT_DOWN or t.name.endswith("feed_forward.w2.weight")
        if down and more_bits(t.layer, g.num_hidden_layers):
            return Q.Q6_K
        if t.name.endswith("v_proj.weight"):
            place = g.attention_layers.index(t.layer)
            return Q.Q6_K if more_bits(place, len(g.attention_layers)) else base
        return base

    return kind


def collect_importance(sample: Checkpoint, windows: Windows) -> Weights:
    """The importance matrix as llama-imatrix makes it: mean squares of each weight's inputs."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def observe(names: tuple[str, ...], x: torch.Tensor, _: torch.Tensor | None) -> None:
        squares = x.double().pow(2).sum(0)
        for name in names:
            sums[name] = sums[name] + squares if name in sums else squares
            counts[name] = counts.get(name, 0) + len(x)

    run_model(Model(sample.geometry, sample.read), windows.ids, observe=observe)
    return {n: (s / counts[n]).float().numpy() for n, s in sums.items()}


def mlx_affine(sample: Checkpoint, group: int) -> tuple[float, Weights]:
    """Mlx's own quantizer: experts 4 bits, shared weights 8 bits in the same groups."""
    import mlx.core as mx

    bits, weights = 0.0, {}
    tensors = expected_tensors(sample.geometry)
    for t in tensors:
        w = sample.read(t.name)
        if t.role in FLOAT_ROLES:
            bits += 32 * t.size
        else:
            width = 8 if t.expert is None else 4
            packed = mx.quantize(mx.array(w), group_size=group, bits=width)
            bits += (width + 32 / group) * t.size  # float16 scales and biases
            w = np.array(mx.dequantize(*packed, group_size=group, bits=width))
        weights[t.name] = w
    return bits / sum(t.size for t in tensors), weights


def judge(reference: Reference, geometry: Geometry, build: Build) -> dict[str, Any]:
    """The figures of a build."""
    compared = compare_model(reference, Model(geometry, lambda name: build.weights[name]))
    found, routing = summarize_scores(compared.scores), compared.routing
    return {
        "name": build.name,
        "bits_per_weight": build.bits_per_weight,
        "kld_mean": found.kld.mean,
        "kld_stderr": found.kld.stderr,
        "perplexity_ratio": found.perplexity_ratio,
        "top1_agreement": found.top1_agreement,
        "routing_exact_set": routing.exact_set,
        "routing_by_layer": [layer.exact_set for layer in routing.layers],
        "seconds": build.seconds,
    }


def show(rows: list[dict[str, Any]], reference: Reference) -> None:
    """The table."""
    table = Table(title=f"{reference.windows.tokens:,} tokens of the sample's evaluation text")
    for column in ("build", "bits/weight", "mean KLD", "+-", "top-1", "routing", "seconds"):
        table.add_column(column, justify="left" if column == "build" else "right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['bits_per_weight']:.2f}",
            f"{row['kld_mean']:.6f}",
            f"{row['kld_stderr']:.6f}",
            f"{row['top1_agreement']:.4f}",
            f"{row['routing_exact_set']:.4f}",
            f"{row['seconds']:.0f}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
