"""Reports with every figure there is, made up but consistent."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from lfmq.validation.measure.figures import (
    KLD,
    KLD_MAX,
    KLD_MEDIAN,
    KLD_P99,
    LOCAL_ROUTING,
    PERPLEXITY,
    PERPLEXITY_RATIO,
    RMS_DELTA_P,
    ROUTING,
    TOP1,
    Estimate,
    Estimates,
    Figure,
)
from lfmq.validation.measure.generation import (
    AnswerFigures,
    GenerationFigures,
    HealthFigures,
    RepeatFigures,
    ToolFigures,
)
from lfmq.validation.measure.metadata import Fact
from lfmq.validation.measure.report import (
    Attribution,
    BuildReport,
    Conditions,
    ExpertError,
    Failure,
    Histogram,
    LayerDivergence,
    NoiseFloor,
    PositionRange,
    Report,
)
from lfmq.validation.measure.routing import LayerRouting, MarginBin, RoutingAgreement

DOMAINS = ("ar", "de", "en", "es", "fr", "ja", "ko", "pt", "zh", "python", "chat", "tools")
ENGINES = {
    "gguf": ("llama.cpp", "llama.cpp b11549, xllamacpp 2026.10.11549", ".gguf"),
    "mlx": ("mlx-lm", "mlx-lm 0.32.2, mlx 0.32.4", "-mlx"),
    "onnx": ("onnxruntime", "onnxruntime 1.32.0", "-onnx"),
    "compressed-tensors": (
        "transformers",
        "transformers 5.23.0, compressed-tensors 0.20.0",
        "-compressed-tensors",
    ),
}
EDGES = tuple(round(-9 + 0.5 * i, 1) for i in range(21))  # log10 of nats, 1e-9 to 10
SHA = hashlib.sha256(b"text").hexdigest()


def estimates(values: Mapping[Figure, float]) -> dict[Figure, Estimate]:
    """Figures without any error."""
    return {figure: Estimate(value) for figure, value in values.items()}


def _routing(
    rng: np.random.Generator, layers: int, experts: int, off: float, local: float | None
) -> RoutingAgreement:
    found = []
    for index in range(layers):
        share = off * (1 + 2 * index / layers)
        load = rng.dirichlet(np.full(experts, 6.0))
        own = load * (1 + share * rng.standard_normal(experts))
        cells = 1 - np.minimum(0.9, share * rng.lognormal(0, 0.7, experts))
        found.append(
            LayerRouting(
                layer=2 + index,
                exact_set=float(1 - 2 * share),
                jaccard=float(1 - share),
                load_shift=float(share**2),
                load=tuple(own.tolist()),
                reference_load=tuple(load.tolist()),
                experts=tuple(cells.tolist()),
                local_exact_set=local,
            )
        )
    margins = tuple(
        MarginBin(
            low=10.0**d if d > -7 else 0.0,
            high=10.0 ** (d + 1),
            pairs=int(60000 * 0.3 ** abs(d + 2)),
            exact_set=float(1 - min(0.5, off * 10.0 ** (-d - 2) / 8)),
        )
        for d in range(-6, 0)
    )
    return RoutingAgreement(tuple(found), margins)


def _generation(rng: np.random.Generator, off: float) -> GenerationFigures:
    return GenerationFigures(
        tasks=24,
        runs=2,
        new_tokens=256,
        sampling={"temperature": 0.2, "top_k": 80, "repetition_penalty": 1.05, "min_p": None},
        tasks_sha256=hashlib.sha256(b"tasks").hexdigest(),
        reference=HealthFigures(0.0, RepeatFigures(31, 6.1), 0.0),
        answers=AnswerFigures(0.75 - off, 0.75, 12),
        tools=ToolFigures(1.0, 0.917, 0.833 - off, 0.833, 12),
        capped=0.042,
        longest_repeat=RepeatFigures(48, 6.5),
        looped=0.0,
        length_ratio=1.013,
        same_text=float(rng.uniform(0.5, 0.9)),
    )


def _positions(kld: float, top1: float, exact: float) -> tuple[PositionRange, ...]:
    return tuple(
        PositionRange(
            start,
            start + 32,
            estimates(
                {
                    KLD: kld * (0.9 + start / 1500),
                    TOP1: top1,
                    ROUTING: exact - start / 60000,
                }
            ),
        )
        for start in range(128, 255, 32)
    )


def _attribution(rng: np.random.Generator, kld: float, routing: RoutingAgreement) -> Attribution:
    layers = range(len(routing.layers) + 2)
    return Attribution(
        kld / 5,
        tuple(LayerDivergence(i, kld / 8 * float(rng.lognormal(0, 0.4))) for i in layers),
        tuple(
            ExpertError(
                layer.layer,
                e,
                int(32768 * 4 * share),
                float(0.0052 * rng.lognormal(0, 0.12) * (1 + 0.002 / share)),
            )
            for layer in routing.layers
            for e, share in enumerate(layer.reference_load)
        ),
    )


def _figures(off: float, kld: float, routing: RoutingAgreement) -> dict[Figure, Estimate]:
    exact = routing.exact_set
    local = routing.local_exact_set
    return {
        PERPLEXITY: Estimate(9.1234 * (1 + off / 6)),
        PERPLEXITY_RATIO: Estimate(1 + off / 6, off / 12, (1 + off / 12, 1 + off / 4)),
        KLD: Estimate(kld, kld / 25, (kld * 0.92, kld * 1.08)),
        **estimates({KLD_MEDIAN: kld / 3, KLD_P99: 14 * kld, KLD_MAX: 140 * kld}),
        TOP1: Estimate(0.9766 - off, 0.0017, (0.9731 - off, 0.9799 - off)),
        RMS_DELTA_P: Estimate(2 * off, off / 20, (1.9 * off, 2.1 * off)),
        ROUTING: Estimate(exact, 0.0006, (exact - 0.0012, exact + 0.0011)),
        **({} if local is None else estimates({LOCAL_ROUTING: local})),
    }


def _domains(
    rng: np.random.Generator, off: float, kld: float, exact: float
) -> dict[str, dict[Figure, Estimate]]:
    return {
        d: {
            PERPLEXITY_RATIO: Estimate(1 + off / 6 + float(rng.normal(0, 0.001))),
            KLD: Estimate(kld * float(rng.lognormal(0, 0.35)), kld / 8),
            TOP1: Estimate(0.9766 - off * float(rng.lognormal(0, 0.35))),
            RMS_DELTA_P: Estimate(2 * off * float(rng.lognormal(0, 0.35))),
            ROUTING: Estimate(exact - off * float(rng.normal(0, 0.3))),
        }
        for d in DOMAINS
    }


def _build(
    rng: np.random.Generator, format: str, engine: str, off: float, layers: int, experts: int
) -> BuildReport:
    _, version, suffix = ENGINES[format]
    read = engine == "read"
    routing = _routing(rng, layers, experts, off, None if read else 0.99951)
    weights = np.exp(-0.5 * ((np.array(EDGES[:-1]) + 3.2) / 1.1) ** 2 / 2)
    counts = rng.multinomial(8128, weights / weights.sum())
    kld = 0.0025 * off / 0.006
    return BuildReport(
        path=f"builds/lfm2moe-tiny-int4{suffix}",
        format=format,
        engine=engine,
        engine_version="lfmq 0.1.0, torch 2.13.0" if read else version,
        nbytes=11_969_856 + 1_048_576 * list(ENGINES).index(format),
        bits_per_weight=5.678 + 0.1 * list(ENGINES).index(format),
        figures=_figures(off, kld, routing),
        histogram=Histogram(EDGES, tuple(counts.tolist())),
        routing=routing,
        domains=_domains(rng, off, kld, routing.exact_set),
        positions=_positions(kld, 0.976 - off, routing.exact_set),
        attribution=_attribution(rng, kld, routing) if read else None,
    )


def with_figure(build: BuildReport, figure: Figure, found: Estimate | None) -> BuildReport:
    """The build with another value of a figure, or without it."""
    figures = {f: e for f, e in build.figures.items() if f is not figure}
    return replace(build, figures=figures if found is None else {**figures, figure: found})


def without_routing(report: Report) -> Report:
    """The report of a dense model: no figure of routing anywhere."""

    def dense(figures: Estimates) -> Estimates:
        return {f: e for f, e in figures.items() if not f.routing}

    def parts(found: BuildReport | NoiseFloor) -> dict[str, object]:
        return {
            "figures": dense(found.figures),
            "domains": {d: dense(e) for d, e in found.domains.items()},
            "positions": tuple(replace(p, figures=dense(p.figures)) for p in found.positions),
        }

    def attribution(found: Attribution | None) -> Attribution | None:
        return None if found is None else replace(found, experts=())

    builds = tuple(
        replace(b, routing=None, attribution=attribution(b.attribution), **parts(b))  # type: ignore[arg-type]
        for b in report.builds
    )
    floor = replace(report.noise_floor, layers={}, **parts(report.noise_floor))  # type: ignore[arg-type]
    failures = tuple(f for f in report.failures if "routing" not in f.figure)
    return replace(report, builds=builds, noise_floor=floor, failures=failures)


def _floor(rng: np.random.Generator, layers: int) -> NoiseFloor:
    return NoiseFloor(
        {
            PERPLEXITY_RATIO: Estimate(1.00012),
            KLD: Estimate(0.0012, 0.00008),
            TOP1: Estimate(0.981),
            RMS_DELTA_P: Estimate(0.006),
            ROUTING: Estimate(0.9875),
        },
        {
            d: {KLD: Estimate(0.0012 * float(rng.lognormal(0, 0.3)), 0.0001), TOP1: Estimate(0.98)}
            for d in DOMAINS
        },
        {2 + i: 0.993 - 0.002 * i for i in range(layers)},
        _positions(0.0011, 0.981, 0.9875),
    )


def _failures(builds: list[BuildReport]) -> tuple[Failure, ...]:
    """A figure over its limit, one of a domain, metadata, and two that nothing measured."""
    first, (native,) = builds[0], [b for b in builds if b.engine == "onnxruntime"]
    at = native.path, native.engine
    mean, ja = native.figures[KLD].value, native.domains["ja"][KLD].value
    local = "min_local_routing = 0.999; only --engine native measures it"
    nothing = "[generation] has limits, and no generation check ran on this build"
    return (
        Failure(*at, "kld.mean", mean, 0.005, "max_kld = 0.005", "mean KLD", "nats"),
        Failure(
            *at, "domains.ja.kld_mean", ja, 0.001, "[domains.ja] max_kld = 0.001",
            "mean KLD in ja", "nats",
        ),
        Failure(
            first.path, "read", LOCAL_ROUTING.key, None, 0.999, local, LOCAL_ROUTING.title, "share"
        ),
        Failure(
            *at, "facts.bos_token_id", 5, 1, "the build says 5, the checkpoint 1", "bos_token_id",
            None,
        ),
        Failure(first.path, "read", "generation", None, None, nothing, "generation", "number"),
    )  # fmt: skip


MakeReport = Callable[..., Report]


@pytest.fixture(scope="session")
def make_report() -> MakeReport:
    """Make a report: four formats, two engines each, all figures of docs/validation.md."""

    def make(
        layers: int = 4, experts: int = 16, formats: tuple[str, ...] = tuple(ENGINES)
    ) -> Report:
        rng = np.random.default_rng(7)
        builds = [
            _build(rng, format, engine, off, layers, experts)
            for format in formats
            for engine, off in (("read", 0.006), (ENGINES[format][0], 0.0068))
        ]
        modes = {"greedy": _generation(rng, 0.0), "sampled": _generation(rng, 0.083)}
        builds[0] = replace(builds[0], generation=modes)
        if "onnx" in formats:
            (bad,) = (i for i, b in enumerate(builds) if b.engine == "onnxruntime")
            builds[bad] = replace(
                with_figure(builds[bad], KLD, Estimate(0.00912, 0.0004, (0.0083, 0.0101))),
                warnings=("onnxruntime 1.32.0 rounds activations of 8-bit experts",),
                facts=(Fact("bos_token_id", 5, 1),),
            )
        return Report(
            checkpoint="lfm2moe-tiny",
            conditions=Conditions("0.1.0", "2.13.0", 2, "cpu", 256, 16384, SHA),
            tokens_scored=8128,
            reference_perplexity=9.1234,
            noise_floor=_floor(rng, layers),
            builds=tuple(builds),
            failures=_failures(builds) if "onnx" in formats else (),
        )

    return make


@pytest.fixture(scope="session")
def report(make_report: MakeReport) -> Report:
    """Four formats, two engines each."""
    return make_report()


NAN = Estimate(math.nan, math.nan, (math.nan, math.nan))
