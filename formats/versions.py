"""Which releases of the runtimes a format's builds are proven with, and which run them wrongly.

The one place for both: model cards, warnings of the command line and docs/runtimes.md take them
from here; tests keep PROVEN equal to constraints.txt.
"""

from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

from lfmq.formats.build import Assets
from lfmq.formats.plan import EXPERT_ROLES, Plan, Role

# What of a build a release gets wrong; no concern means every build.
Concern = Literal["packed experts", "8-bit experts", "packed convolutions", "LFM2.5-8B-A1B"]

# By format: the packages, as constraints.txt pins them, that tests run every build in.
PROVEN: dict[str, tuple[str, ...]] = {
    "gguf": ("xllamacpp 2026.10.11549",),
    "mlx": ("mlx 0.32.4", "mlx-lm 0.32.2"),
    "onnx": ("onnxruntime 1.32.0", "onnxruntime-genai 0.18.0"),
    "compressed-tensors": ("transformers 5.23.0", "compressed-tensors 0.20.0"),
}


_UPDATED_MODEL = b"LFM2.5-8B-A1B"


@dataclass(frozen=True, slots=True)
class KnownBad:
    """Releases of something that make a build compute or load wrongly.

    Attributes:
        formats: whose builds.
        what: the package, or the files, in words.
        bad: the releases, in words.
        wrong: what happens.
        remedy: what to do.
        source: where it is reported or measured.
        specifier: PEP 440 versions of the package ``what``; None when it is not a package.
        concern: the builds it happens to; None for all.
        switch: an environment variable and its value that turn the fault off.
    """

    formats: tuple[str, ...]
    what: str
    bad: str
    wrong: str
    remedy: str
    source: str
    specifier: str | None = None
    concern: Concern | None = None
    switch: tuple[str, str] | None = None


KNOWN_BAD = (
    KnownBad(
        formats=("mlx",),
        what="mlx-lm",
        bad="up to 0.31.3",
        wrong="routes by softmax instead of sigmoid and mixes with the biased weights: half the "
        "tokens go to other experts, and nothing fails",
        remedy="use mlx-lm 0.32.0 or later",
        source="https://github.com/ml-explore/mlx-lm/issues/1883",
        specifier="<0.32",
    ),
    KnownBad(
        formats=("onnx",),
        what="onnxruntime",
        bad="below 1.25",
        wrong="has no routing weights in QMoE and refuses the graph",
        remedy="use onnxruntime 1.31 or later",
        source="https://github.com/microsoft/onnxruntime/issues/27675",
        specifier="<1.25",
        concern="packed experts",
    ),
    KnownBad(
        formats=("onnx",),
        what="onnxruntime",
        bad="from 1.31 on, 1.32 among them, on CPU",
        wrong="rounds the activations of 8-bit experts to int8, which moves logits by half a "
        "percent of the largest",
        remedy="set ORT_QMOE_CPU_QNBIT_GEMM=fp32, or give the experts 4 bits",
        source="https://github.com/microsoft/onnxruntime/pull/32644",
        specifier=">=1.31",
        concern="8-bit experts",
        switch=("ORT_QMOE_CPU_QNBIT_GEMM", "fp32"),
    ),
    KnownBad(
        formats=("compressed-tensors",),
        what="vllm",
        bad="up to 0.26.0",
        wrong="builds the short convolutions' projections without the quantization and fails "
        "while it loads",
        remedy="use vllm 0.27.0 or later, or leave the role conv as floats",
        source="https://github.com/vllm-project/vllm/pull/48917",
        specifier="<0.27",
        concern="packed convolutions",
    ),
    KnownBad(
        formats=("gguf", "mlx", "onnx", "compressed-tensors"),
        what="tokenizer files of LFM2.5-8B-A1B, and builds that hold them,",
        bad="from before commit feb5e04",
        wrong="make tool calls fail in llama.cpp",
        remedy="download the tokenizer files again and convert once more",
        source="https://huggingface.co/LiquidAI/LFM2.5-8B-A1B/commit/"
        "feb5e04da4910dd56d33f0cd03747ff298c1e801",
        concern="LFM2.5-8B-A1B",
    ),
)


def plan_concerns(plan: Plan) -> frozenset[Concern]:
    """What of a plan some release gets wrong."""
    found: set[Concern] = set()
    for entry in plan.entries:
        if entry.scheme is None:
            continue
        if entry.role in EXPERT_ROLES:
            found.add("packed experts")
            if entry.scheme.bits == 8:
                found.add("8-bit experts")
        if entry.role is Role.CONV:
            found.add("packed convolutions")
    return frozenset(found)


def checkpoint_concerns(assets: Assets) -> frozenset[Concern]:
    """LFM2.5-8B-A1B when the checkpoint's name, config or card speaks of it, a fine-tune's too."""
    named = f"{assets.name} {assets.config_json.get('_name_or_path')}".encode("utf-8", "replace")
    spoken = _UPDATED_MODEL in named or _UPDATED_MODEL in assets.files.get("README.md", b"")
    return frozenset({"LFM2.5-8B-A1B"}) if spoken else frozenset()


def known_bad(format: str, concerns: Set[Concern]) -> tuple[KnownBad, ...]:
    """The rows of a format that a build of these concerns has to fear."""
    return tuple(
        row
        for row in KNOWN_BAD
        if format in row.formats and (row.concern is None or row.concern in concerns)
    )
