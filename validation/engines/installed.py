"""Whether an installed runtime, or a build's tokenizer files, are known to be wrong; as lines.

The releases are those of ``lfmq.formats.versions``. Nothing here runs a model: a version that is
known to be wrong fails in silence, which is why it has to be said.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Set
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnx
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

from lfmq.formats.build import Assets
from lfmq.formats.compressed_tensors.config import METHOD, engine_warnings
from lfmq.formats.gguf.pretokenizer import USUAL, text_rules
from lfmq.formats.huggingface.safetensors_file import read_header
from lfmq.formats.onnx.genai_tokenizer import unlike_genai
from lfmq.formats.onnx.reader import MODEL_FILE
from lfmq.formats.plan import Plan
from lfmq.formats.versions import (
    KNOWN_BAD,
    Concern,
    KnownBad,
    checkpoint_concerns,
    known_bad,
    plan_concerns,
)
from lfmq.validation.engines.tokenizer import from_before_the_update, tokenizer_difference

_PACKED_CONVOLUTIONS = (".conv.in_proj.weight_packed", ".conv.out_proj.weight_packed")


def installed_versions() -> dict[str, str]:
    """The runtimes of the table that are installed here."""
    found = {}
    for name in {row.what for row in KNOWN_BAD if row.specifier is not None}:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def warnings_for(
    format: str,
    concerns: Set[Concern],
    installed: Mapping[str, str],
    environment: Mapping[str, str] = os.environ,
) -> tuple[str, ...]:
    """What to know before a build runs in the runtimes installed here.

    Args:
        format: the build's container.
        concerns: what of the build some release gets wrong.
        installed: versions by package.
        environment: where a row's switch may be set.
    """
    return tuple(
        f"{row.what} {installed[row.what]} {row.wrong}; {row.remedy} ({row.source})"
        for row in known_bad(format, concerns)
        if row.what in installed
        and _is_bad(row, installed[row.what])
        and (row.switch is None or environment.get(row.switch[0]) != row.switch[1])
    )


def _is_bad(row: KnownBad, found: str) -> bool:
    if row.specifier is None:
        return False
    try:
        return SpecifierSet(row.specifier).contains(found, prereleases=True)
    except InvalidVersion:  # a build of one's own: nothing is known of it
        return False


def plan_warnings(
    plan: Plan,
    formats: Iterable[str],
    assets: Assets,
    installed: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Lines for a conversion: installed runtimes that would run its builds wrongly."""
    installed = installed_versions() if installed is None else installed
    concerns, chosen = plan_concerns(plan), tuple(formats)
    lines = [
        f"{name}: {line}" for name in chosen for line in warnings_for(name, concerns, installed)
    ]
    if METHOD in chosen:
        lines += [f"{METHOD}: {line}" for line in engine_warnings(plan)]
    if "gguf" in chosen:
        lines += _other_pre_tokenizer(plan, assets)
    unlike = unlike_genai(assets) if "onnx" in formats else None
    if unlike is not None:
        lines.append(
            f"onnx: onnxruntime-genai {unlike}, as the checkpoint's tokenizer.json asks: it makes "
            "other tokens of a text; transformers.js and transformers follow the file"
        )
    stale = from_before_the_update(assets)
    return tuple([*lines, stale] if stale else lines)


def _other_pre_tokenizer(plan: Plan, assets: Assets) -> Iterator[str]:
    """A line where a GGUF does not split text as LFM2 does, because the checkpoint does not."""
    pre = text_rules(assets, plan.config.bos_token_id).pre
    if pre is not USUAL:
        yield (
            f"gguf: the checkpoint does not split text as LFM2 does; the GGUF says "
            f"tokenizer.ggml.pre = {pre.name}, which splits it as the checkpoint does"
        )


def build_warnings(path: Path, format: str, assets: Assets) -> tuple[str, ...]:
    """Lines for a finished build, opened before by its reader.

    Args:
        path: the build.
        format: its container.
        assets: of the checkpoint it is compared with.
    """
    lines = list(warnings_for(format, build_concerns(path, format), installed_versions()))
    different = tokenizer_difference(path, format, assets)
    if different is not None:
        lines.append(
            f"its {different} is not the checkpoint's; it comes from another model or another "
            f"download{_hint(assets)}; convert once more"
        )
    return tuple(lines)


def _hint(assets: Assets) -> str:
    rows = known_bad("gguf", checkpoint_concerns(assets))
    return "".join(f" ({row.what} {row.bad} {row.wrong}: {row.source})" for row in rows)


def build_concerns(path: Path, format: str) -> frozenset[Concern]:
    """What of a finished build some release gets wrong, from its own files."""
    if format == "onnx":
        graph = onnx.load(path / MODEL_FILE, load_external_data=False).graph
        widths = {
            attribute.i
            for node in graph.node
            if node.op_type == "QMoE"
            for attribute in node.attribute
            if attribute.name == "expert_weight_bits"
        }
        found: set[Concern] = {"packed experts"} if widths else set()
        if 8 in widths:
            found.add("8-bit experts")
        return frozenset(found)
    if format == "compressed-tensors":
        names = {name for file in path.glob("model*.safetensors") for name in read_header(file)}
        packed = any(name.endswith(_PACKED_CONVOLUTIONS) for name in names)
        return frozenset({"packed convolutions"} if packed else ())
    return frozenset()
