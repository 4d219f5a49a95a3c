"""Documents of ``lfmq validate --json`` with every key there is, made up but consistent."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Document = dict[str, Any]

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
EDGES = [round(-9 + 0.5 * i, 1) for i in range(21)]  # log10 of nats, 1e-9 to 10


def _routing(rng: np.random.Generator, first: int, layers: int, experts: int, off: float) -> Any:
    found = []
    for index in range(layers):
        share = off * (1 + 2 * index / layers)
        load = rng.dirichlet(np.full(experts, 6.0))
        own = load * (1 + share * rng.standard_normal(experts))
        cells = 1 - np.minimum(0.9, share * rng.lognormal(0, 0.7, experts))
        found.append(
            {
                "layer": first + index,
                "exact_set": float(1 - 2 * share),
                "jaccard": float(1 - share),
                "load_shift": float(share**2),
                "load": own.tolist(),
                "reference_load": load.tolist(),
                "experts": cells.tolist(),
            }
        )
    return found


def _generation(rng: np.random.Generator, off: float) -> Document:
    return {
        "tasks": 24,
        "runs": 2,
        "new_tokens": 256,
        "sampling": {"temperature": 0.2, "top_k": 80, "repetition_penalty": 1.05, "min_p": None},
        "tasks_sha256": hashlib.sha256(b"tasks").hexdigest(),
        "reference": {
            "capped": 0.0,
            "looped": 0.0,
            "longest_repeat": {"max": 31, "mean": 6.1},
        },
        "answers": {"accuracy": 0.75 - off, "reference_accuracy": 0.75, "n": 12},
        "tools": {
            "valid": 1.0,
            "right_function": 0.917,
            "right_arguments": 0.833 - off,
            "reference_right_arguments": 0.833,
            "n": 12,
        },
        "capped": 0.042,
        "longest_repeat": {"max": 48, "mean": 6.5},
        "looped": 0.0,
        "length_ratio": 1.013,
        "same_text": float(rng.uniform(0.5, 0.9)),
    }


def _build(
    rng: np.random.Generator, format: str, engine: str, off: float, layers: int, experts: int
) -> Document:
    _, version, suffix = ENGINES[format]
    routing = _routing(rng, 2, layers, experts, off)
    exact = float(np.mean([r["exact_set"] for r in routing]))
    counts = rng.multinomial(
        8128,
        np.exp(-0.5 * ((np.array(EDGES[:-1]) + 3.2) / 1.1) ** 2 / 2)
        / np.exp(-0.5 * ((np.array(EDGES[:-1]) + 3.2) / 1.1) ** 2 / 2).sum(),
    )
    kld = 0.0025 * off / 0.006
    build: Document = {
        "path": f"builds/lfm2moe-tiny-int4{suffix}",
        "format": format,
        "engine": engine,
        "engine_version": "lfmq 0.1.0, torch 2.13.0" if engine == "read" else version,
        "bytes": 11_969_856 + 1_048_576 * list(ENGINES).index(format),
        "bits_per_weight": 5.678 + 0.1 * list(ENGINES).index(format),
        "perplexity": 9.1234 * (1 + off / 6),
        "perplexity_ratio": 1 + off / 6,
        "perplexity_ratio_ci95": [1 + off / 12, 1 + off / 4],
        "kld": {
            "mean": kld,
            "stderr": kld / 25,
            "median": kld / 3,
            "p99": 14 * kld,
            "max": 140 * kld,
            "ci95": [kld * 0.92, kld * 1.08],
            "histogram": {"edges": EDGES, "counts": counts.tolist()},
        },
        "top1_agreement": 0.9766 - off,
        "top1_ci95": [0.9731 - off, 0.9799 - off],
        "routing": {
            "exact_set": exact,
            "jaccard": float(np.mean([r["jaccard"] for r in routing])),
            "ci95": [exact - 0.0012, exact + 0.0011],
            "local_exact_set": None if engine == "read" else 0.99951,
            "layers": routing,
            "margins": [
                {
                    "low": 10.0**d if d > -7 else 0.0,
                    "high": 10.0 ** (d + 1),
                    "pairs": int(60000 * 0.3 ** abs(d + 2)),
                    "exact_set": float(1 - min(0.5, off * 10.0 ** (-d - 2) / 8)),
                }
                for d in range(-6, 0)
            ],
        },
        "domains": {
            d: {
                "perplexity_ratio": 1 + off / 6 + float(rng.normal(0, 0.001)),
                "kld_mean": kld * float(rng.lognormal(0, 0.35)),
                "kld_stderr": kld / 8,
                "routing_exact_set": exact - off * float(rng.normal(0, 0.3)),
                "top1_agreement": 0.9766 - off * float(rng.lognormal(0, 0.35)),
            }
            for d in DOMAINS
        },
        "positions": [
            {
                "from": start,
                "to": start + 32,
                "kld_mean": kld * (0.9 + start / 1500),
                "top1_agreement": 0.976 - off,
                "routing_exact_set": exact - start / 60000,
            }
            for start in range(128, 255, 32)
        ],
        "warnings": [],
    }
    if engine != "read":
        for layer in routing:
            layer["local_exact_set"] = 0.99951
        return build
    build["embedding_kld"] = kld / 5
    build["layers_kld"] = [
        {"layer": index, "kld_mean": kld / 8 * float(rng.lognormal(0, 0.4))}
        for index in range(layers + 2)
    ]
    build["experts"] = [
        {
            "layer": r["layer"],
            "expert": e,
            "tokens": int(32768 * 4 * share),
            "error": float(0.0052 * rng.lognormal(0, 0.12) * (1 + 0.002 / share)),
        }
        for r in routing
        for e, share in enumerate(r["reference_load"])
    ]
    return build


def _failures(builds: list[Document]) -> list[Document]:
    """A figure over its limit, one of a domain, and two that nothing measured."""
    first, (native,) = builds[0], [b for b in builds if b["engine"] == "onnxruntime"]
    at = {"path": native["path"], "engine": native["engine"]}
    domain = native["domains"]["ja"]["kld_mean"]
    return [
        at
        | {"figure": "kld.mean", "found": native["kld"]["mean"], "limit": 0.005}
        | {"why": "max_kld = 0.005"},
        at
        | {"figure": "domains.ja.kld_mean", "found": domain, "limit": 0.001}
        | {"why": "[domains.ja] max_kld = 0.001"},
        {"path": first["path"], "engine": "read", "figure": "routing.local_exact_set"}
        | {"found": None, "limit": 0.999}
        | {"why": "min_local_routing = 0.999; only --engine native measures it"},
        at
        | {"figure": "facts.bos_token_id", "found": 5, "limit": 1}
        | {"why": "the build says 5, the checkpoint 1"},
        {"path": first["path"], "engine": "read", "figure": "generation"}
        | {"found": None, "limit": None}
        | {"why": "[generation] has limits, and no generation check ran on this build"},
    ]


@pytest.fixture(scope="session")
def make_document() -> Callable[..., Document]:
    """Make a document: four formats, two engines each, all keys of docs/validation.md."""

    def make(layers: int = 4, experts: int = 16, formats: tuple[str, ...] = tuple(ENGINES)):
        rng = np.random.default_rng(7)
        builds = [
            _build(rng, format, engine, off, layers, experts)
            for format in formats
            for engine, off in (("read", 0.006), (ENGINES[format][0], 0.0068))
        ]
        builds[0]["generation"] = {
            "greedy": _generation(rng, 0.0),
            "sampled": _generation(rng, 0.083),
        }
        if "onnx" in formats:
            bad = [b for b in builds if b["engine"] == "onnxruntime"]
            bad[0]["warnings"] = ["onnxruntime 1.32.0 rounds activations of 8-bit experts"]
            bad[0]["kld"]["mean"] = 0.00912
            bad[0]["kld"]["ci95"] = [0.0083, 0.0101]
            bad[0]["facts"] = [{"name": "bos_token_id", "found": 5, "expected": 1}]
        sha = hashlib.sha256(b"text").hexdigest()
        return {
            "checkpoint": "lfm2moe-tiny",
            "text_sha256": sha,
            "tokens_scored": 8128,
            "reference": {"perplexity": 9.1234},
            "conditions": {
                "lfmq": "0.1.0",
                "torch": "2.13.0",
                "threads": 2,
                "sequence": 256,
                "tokens": 16384,
                "text_sha256": sha,
                "device": "cpu",
            },
            "noise_floor": {
                "kld_mean": 0.0012,
                "kld_stderr": 0.00008,
                "perplexity_ratio": 1.00012,
                "positions": [
                    {"from": start, "to": start + 32, "kld_mean": 0.0011}
                    | {"top1_agreement": 0.981, "routing_exact_set": 0.9875}
                    for start in range(128, 255, 32)
                ],
                "layers": [
                    {"layer": 2 + i, "exact_set": 0.993 - 0.002 * i} for i in range(layers)
                ],
                "top1_agreement": 0.981,
                "routing_exact_set": 0.9875,
                "domains": {
                    d: {"kld_mean": 0.0012 * float(rng.lognormal(0, 0.3)), "top1_agreement": 0.98}
                    for d in DOMAINS
                },
            },
            "builds": builds,
            "passed": "onnx" not in formats,
            "failures": _failures(builds) if "onnx" in formats else [],
        }

    return make


@pytest.fixture(scope="session")
def document(make_document: Callable[..., Document]) -> Document:
    """Four formats, two engines each."""
    return make_document()
