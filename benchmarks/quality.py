"""Quality on the sample against llama.cpp's and MLX's own quantizers: one run, one forward.

Every build is a set of weights run through the reference forward on the same held-out tokens.
llama.cpp's types are those its quantizer gives each tensor (the recipes of that name), made by
ggml itself with an importance matrix collected on the calibration text ours uses. Bytes are those
of tensors; of ``bytes a token`` an expert's count by the share of experts that a token uses.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from ggml import load_library, round_trip
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from rich.console import Console
from rich.table import Table

from lfmq.converter.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmq.converter.checkpoint.locate import sample_file
from lfmq.converter.mixed_precision.budget import settle_widths
from lfmq.converter.mixed_precision.width_groups import segment_bytes
from lfmq.converter.model.forward import Model, run_model
from lfmq.converter.model.tensors import Tensor, expected_tensors
from lfmq.converter.model.text import Windows, load_windows
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.presets import peer_schemes
from lfmq.converter.plan.recipe import Recipe, load_recipe
from lfmq.converter.quantize.layerwise import calibrated_groups
from lfmq.converter.quantize.rtn import nearest_groups
from lfmq.converter.quantize.settings import Calibration, Settings
from lfmq.converter.statistics.collect import collect
from lfmq.formats.plan import FLOAT_ROLES, ModelConfig
from lfmq.formats.registry import FORMATS
from lfmq.quant.types import (
    Quantized,
    Scheme,
    Weight,
    dequantize,
)
from lfmq.validation.measure.figures import KLD, PERPLEXITY_RATIO, ROUTING, TOP1
from lfmq.validation.measure.runs import Reference, compare_model, run_reference
from lfmq.validation.measure.summaries import measure_figures

Weights = dict[str, np.ndarray]
Q = GGMLQuantizationType
LLAMA_CPP = ("q4_k_m", "q5_k_m", "q6_k")  # recipes with its types
# Builds that are as fast in each format as the one they are to beat.
FAST = "int4-fast"
USUAL = {
    "gguf": "llama.cpp Q4_K_M, imatrix",
    "mlx": "mlx_lm.convert -q",
    "onnx": "llama.cpp Q4_K_M, imatrix",
}


@dataclass(frozen=True)
class Made:
    """Weights of a build, and the bytes of each in its container."""

    weights: Weights
    nbytes: Mapping[str, float]


def main() -> None:
    """Make the builds, judge each, print the table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration and evaluation")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--calibrate-on", action="append", help="domains; default: all")
    parser.add_argument("--evaluate-on", action="append", help="domains; default: all")
    parser.add_argument("--only", help="names that contain this, whatever their case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sample = open_checkpoint(sample_file())
    calibration = load(sample, "calibration.jsonl", options, options.calibrate_on)
    evaluation = load(sample, "evaluation.jsonl", options, options.evaluate_on)
    reference = run_reference(Model(sample.config, sample.read), evaluation)
    rows = []
    for make in builds(sample, calibration):
        if options.only and options.only.lower() not in make[0].lower():
            continue
        started = time.monotonic()
        made = make[1]()
        seconds = time.monotonic() - started
        figures = judge(reference, sample.config, made)
        rows.append({"name": make[0], **figures, "seconds": seconds})
        print(json.dumps(rows[-1]), flush=True)
    show(rows, reference)
    compare({row["name"]: row for row in rows})


def load(
    sample: Checkpoint, name: str, options: argparse.Namespace, domains: list[str] | None
) -> Windows:
    """Windows of a text of the sample, of some domains only when given."""
    tokens = options.tokens if domains is None else 2**40
    found = load_windows(
        [sample_file(name)],
        sample.assets,
        sample.config,
        tokens=tokens,
        sequence=options.sequence,
    )
    if domains is None:
        return found
    rows = [i for i, d in enumerate(found.domains) if d in domains]
    rows = rows[: options.tokens // options.sequence]
    return replace(found, ids=found.ids[rows], domains=tuple(found.domains[i] for i in rows))


def builds(sample: Checkpoint, calibration: Windows) -> Iterator[tuple[str, Callable[[], Made]]]:
    """Names of builds and what makes them."""
    statistics = cache(lambda: collect(sample, calibration)[0])

    def fast(name: str) -> Made:
        """Grids chosen within the bytes of the usual build, calibrated."""
        formats = {name: FORMATS[name]}
        widths = settle_widths(sample, load_recipe(FAST), formats, statistics())
        return sized(sample, widths.recipe, calibration, name)

    for recipe in ("int8", "int4", "int4-all", *LLAMA_CPP):
        yield f"{recipe}, nearest", partial(sized, sample, load_recipe(recipe), None)
        yield f"{recipe}, calibrated", partial(sized, sample, load_recipe(recipe), calibration)
    for name in USUAL:
        yield f"{FAST} for {name}, calibrated", partial(fast, name)
    importance = collect_importance(sample, calibration)
    library = load_library()

    def ggml(types: Callable[[Tensor], Q], *, plain: bool = False) -> Made:
        nbytes: dict[str, float] = {}
        weights = {}
        for t in expected_tensors(sample.config):
            w = sample.read(t.name)
            if t.role not in FLOAT_ROLES:
                kind = types(t)
                block, size = GGML_QUANT_SIZES[kind]
                nbytes[t.name] = size * t.size // block
                chosen = None if plain or kind == Q.Q8_0 else importance.get(t.name)
                w = round_trip(library, w, kind, chosen)
            else:
                nbytes[t.name] = 4 * t.size
            weights[t.name] = w
        return Made(weights, nbytes)

    def split(experts: Q, shared: Q) -> Callable[[Tensor], Q]:
        return lambda t: shared if t.expert is None else experts

    for recipe in LLAMA_CPP:
        types = types_of(sample.config, load_recipe(recipe))
        yield f"llama.cpp {recipe.upper()}, imatrix", partial(ggml, types)
    yield "experts Q4_K, rest Q8_0, imatrix", lambda: ggml(split(Q.Q4_K, Q.Q8_0))
    yield "experts Q5_K, rest Q8_0, imatrix", lambda: ggml(split(Q.Q5_K, Q.Q8_0))
    yield (
        "experts Q4_0, rest Q8_0 (plain QMoE, MatMulNBits)",
        lambda: ggml(split(Q.Q4_0, Q.Q8_0), plain=True),
    )
    for group in (32, 64):
        name = f"mlx affine, experts 4 bits g{group}, rest 8"
        yield name, partial(mlx_affine, sample, shape(sample, group))
    usual = peer_schemes("mlx-4bit", sample.config)
    yield USUAL["mlx"], partial(mlx_affine, sample, usual, float_bytes=2)


def ours(
    sample: Checkpoint, recipe: Recipe, windows: Windows | None, settings: Settings | None = None
) -> Weights:
    """Weights of a recipe, rounded to nearest or calibrated."""
    plan = resolve_plan(sample.config, recipe)
    found: dict[str, Weight] = {}
    if windows is None:
        units = nearest_groups(sample, plan, found.update)
    else:
        calibration = Calibration(windows, settings or Settings())
        units = calibrated_groups(sample, plan, calibration, found.update)
    for _ in units:
        pass
    return {n: dequantize(w) if isinstance(w, Quantized) else w for n, w in found.items()}


def sized(
    sample: Checkpoint, recipe: Recipe, windows: Windows | None, format: str = "gguf"
) -> Made:
    """A build of a recipe, rounded to nearest or calibrated."""
    plan = resolve_plan(sample.config, recipe)
    layout = FORMATS[format].layout(plan, sample.assets)
    return Made(ours(sample, recipe, windows), segment_bytes(plan, layout).nbytes)


def types_of(config: ModelConfig, recipe: Recipe) -> Callable[[Tensor], Q]:
    """The type that a recipe of K-quants gives each tensor."""
    schemes = {e.name: e.scheme for e in resolve_plan(config, recipe).entries}
    return lambda t: GGMLQuantizationType[str(schemes[t.name]).upper()]


def collect_importance(sample: Checkpoint, windows: Windows) -> Weights:
    """The importance matrix as llama-imatrix makes it: mean squares of each weight's inputs."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def observe(names: tuple[str, ...], x: torch.Tensor, _: torch.Tensor | None) -> None:
        squares = x.double().pow(2).sum(0)
        for name in names:
            sums[name] = sums[name] + squares if name in sums else squares
            counts[name] = counts.get(name, 0) + len(x)

    run_model(Model(sample.config, sample.read), windows.ids, observe=observe)
    return {n: (s / counts[n]).float().numpy() for n, s in sums.items()}


def shape(sample: Checkpoint, group: int) -> dict[str, Scheme | None]:
    """Experts at 4 bits and shared weights at 8, in groups, on MLX's grid."""
    return {
        t.name: None
        if t.role in FLOAT_ROLES
        else Scheme(8 if t.expert is None else 4, group, "affine_bias")
        for t in expected_tensors(sample.config)
    }


def mlx_affine(
    sample: Checkpoint, schemes: Mapping[str, Scheme | None], *, float_bytes: int = 4
) -> Made:
    """Weights as MLX's own quantizer rounds them."""
    import mlx.core as mx

    nbytes: dict[str, float] = {}
    weights = {}
    for t in expected_tensors(sample.config):
        w, scheme = sample.read(t.name), schemes[t.name]
        if scheme is None:
            nbytes[t.name] = float_bytes * t.size
        else:
            group, bits = scheme.group, scheme.bits
            packed = mx.quantize(mx.array(w), group_size=group, bits=bits)
            nbytes[t.name] = (bits * group + 32) * t.size // group // 8  # scales, biases: float16
            w = np.array(mx.dequantize(*packed, group_size=group, bits=bits))
        weights[t.name] = w
    return Made(weights, nbytes)


def judge(reference: Reference, config: ModelConfig, made: Made) -> dict[str, Any]:
    """The figures of a build."""
    compared = compare_model(reference, Model(config, lambda name: made.weights[name]))
    found, routing = measure_figures(compared), compared.routing
    tensors = expected_tensors(config)
    experts = sum(made.nbytes[t.name] for t in tensors if t.expert is not None)
    nbytes = sum(made.nbytes.values())
    idle = 1 - config.num_experts_per_tok / config.num_experts
    return {
        "bytes": round(nbytes),
        "token_bytes": round(nbytes - idle * experts),
        "bits_per_weight": 8 * nbytes / sum(t.size for t in tensors),
        "kld_mean": found[KLD].value,
        "kld_stderr": found[KLD].stderr,
        "perplexity_ratio": found[PERPLEXITY_RATIO].value,
        "top1_agreement": found[TOP1].value,
        "routing_exact_set": found[ROUTING].value,
        "routing_by_layer": [layer.exact_set for layer in routing.layers] if routing else [],
    }


def show(rows: list[dict[str, Any]], reference: Reference) -> None:
    """The table."""
    table = Table(title=f"{reference.windows.tokens:,} tokens of the sample's evaluation text")
    columns = ("build", "bits/weight", "MB/token", "mean KLD", "+-", "top-1", "routing", "seconds")
    for column in columns:
        table.add_column(column, justify="left" if column == "build" else "right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['bits_per_weight']:.2f}",
            f"{row['token_bytes'] / 1e6:.3f}",
            f"{row['kld_mean']:.6f}",
            f"{row['kld_stderr']:.6f}",
            f"{row['top1_agreement']:.4f}",
            f"{row['routing_exact_set']:.4f}",
            f"{row['seconds']:.0f}",
        )
    Console(width=130).print(table)


def compare(rows: dict[str, dict[str, Any]]) -> None:
    """Builds beside those they are to beat: of llama.cpp's types, and as fast as the usual."""
    pairs = [
        (f"{recipe}, {way}", f"llama.cpp {recipe.upper()}, imatrix")
        for recipe in LLAMA_CPP
        for way in ("nearest", "calibrated")
    ]
    pairs += [(f"{FAST} for {name}, calibrated", usual) for name, usual in USUAL.items()]
    for mine, theirs in pairs:
        if mine in rows and theirs in rows:
            a, b = rows[mine], rows[theirs]
            print(
                f"{mine}: {a['kld_mean'] / b['kld_mean']:.3f} of the mean KLD of {theirs}; "
                f"{a['bytes']:,} bytes, theirs {b['bytes']:,}; "
                f"{a['token_bytes']:,} a token, theirs {b['token_bytes']:,}"
            )


if __name__ == "__main__":
    main()
