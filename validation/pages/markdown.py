"""The parity table as Markdown, for a model card or a release note."""

import re
from collections.abc import Mapping
from typing import Any

from lfmq.validation.pages.document import (
    Build,
    Located,
    list_builds,
    list_warnings,
    open_document,
    shown,
)
from lfmq.validation.pages.numbers import FIGURES, UNKNOWN, Kind, describe_figure, format_figure

_COLUMNS = (
    "build",
    "engine",
    "bits/weight",
    "perplexity ratio",
    "mean KLD (nats)",
    "same top token",
    "same experts",
)
_LOCAL = "same experts, local"
# What Markdown or HTML would take for its own.
_SPECIAL = re.compile(r"([\\`*_\[\]<>#|~&])")


def render_markdown(document: Mapping[str, Any]) -> str:
    """A table of all builds and engines, the verdict and the conditions.

    Args:
        document: what ``lfmq validate --json`` prints.
    """
    at = open_document(document)
    builds = list_builds(at)
    local = any(build.local for build in builds)
    header = (*_COLUMNS, _LOCAL) if local else _COLUMNS
    lines = [_row(header), _row(("---", "---", *("---:",) * (len(header) - 2)))]
    lines += [_row(_cells(build, local)) for build in builds]
    lines.append(_row(_floor(at, local)))
    lines += ["", _conditions(at), "", _verdict(at)]
    warned = list_warnings(builds)
    if warned:
        lines += ["", "Known to be wrong here:", ""]
        lines += [f"- {_plain(name)}: {_plain(line)}" for name, line in warned]
    return "\n".join(lines) + "\n"


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(build: Build, local: bool) -> tuple[str, ...]:
    found = build.found

    def figure(keys: str, kind: Kind) -> str:
        text = format_figure(found.number(*keys.split(".")), kind)
        return f"**{text}** (missed)" if keys in build.missed else text

    numbers = tuple(
        figure(key, FIGURES[key][1])
        for key in ("perplexity_ratio", "kld.mean", "top1_agreement", "routing.exact_set")
    )
    own = (figure("routing.local_exact_set", "share"),) if local else ()
    bits = figure("bits_per_weight", "bits")
    return (_plain(build.name), _plain(build.engine), bits, *numbers, *own)


def _floor(at: Located, local: bool) -> tuple[str, ...]:
    floor = at["noise_floor"]
    numbers = (
        format_figure(floor.number("kld_mean"), "nats"),
        format_figure(floor.number("top1_agreement"), "share"),
        format_figure(floor.number("routing_exact_set"), "share"),
    )
    own = (UNKNOWN,) if local else ()
    ratio = floor.number("perplexity_ratio")
    shown_ratio = "" if ratio is None else format_figure(ratio, "ratio")
    name = "noise floor: the reference in 16-bit arithmetic"
    return (name, "", "", shown_ratio, *numbers, *own)


def _conditions(at: Located) -> str:
    """Under what the figures were found, in one line."""
    perplexity = format_figure(at["reference"].number("perplexity"), "perplexity")
    parts = [
        f"{format_figure(at['tokens_scored'].value, 'count')} positions of "
        f"{_plain(at['checkpoint'].value)} (reference perplexity {perplexity})"
    ]
    conditions = at.get("conditions")
    found = conditions.value if conditions is not None else {}
    if "sequence" in found:
        parts.append(f"windows of {format_figure(found['sequence'], 'count')} tokens")
    text = found.get("text_sha256", at.value.get("text_sha256"))
    if text:
        parts.append(f"text sha256 {_plain(text)}")
    parts += [f"{name} {_plain(found[name])}" for name in ("lfmq", "torch") if name in found]
    if "threads" in found:
        parts.append(f"{_plain(found['threads'])} threads")
    engines = dict.fromkeys(
        str(b.found.value["engine_version"]) for b in list_builds(at) if b.engine != "read"
    )
    return "; ".join([*parts, *map(_plain, engines)]) + "."


def _verdict(at: Located) -> str:
    failures = list(at["failures"])
    if not failures:
        return "Passed: no limit was missed." if at["passed"].value else "Missed."
    lines = ["Missed:", ""]
    for failure in failures:
        figure = str(failure.value["figure"])
        name, kind = describe_figure(figure)
        found, limit = failure.number("found"), failure.number("limit")
        engine = failure.get("engine")
        where = _plain(failure.value["path"]) + (f" in {_plain(engine.value)}" if engine else "")
        is_ = "not measured" if found is None else format_figure(found, kind)
        held = "" if limit is None else f", limit {format_figure(limit, kind)}"
        if figure.startswith("facts."):
            is_, held = "not the checkpoint's", ""
        lines.append(f"- {where}: {_plain(name)} is {is_}{held}")
    return "\n".join(lines)


def _plain(text: Any) -> str:
    """Text that stays text, in one cell."""
    return _SPECIAL.sub(r"\\\1", shown(text))
