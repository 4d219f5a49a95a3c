"""The ``quantization_config`` of a compressed-tensors build, read and checked.

Every key is one that is known to leave the weights as the reader computes them, or has the value
that does; any other is refused, because an engine may compute with it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from lfmq.formats.compressed_tensors.config import METHOD, PACKED
from lfmq.quant.errors import ValidationError, quoted

_short = partial(quoted, most=120)

_SCHEME = {"type": "int", "symmetric": True, "strategy": "group"}
# Keys of a group's weights beside these and the widths, and the values that change nothing.
_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "dynamic": (False,),
    "actorder": (None, False, "weight", "static"),
    "block_structure": (None,),
    "scale_dtype": (None,),
    "zp_dtype": (None,),
}
_OBSERVERS = ("observer", "observer_kwargs")  # how scales were found
_BLOCK: dict[str, tuple[Any, ...]] = {
    "kv_cache_scheme": (None,),
    "sparsity_config": (None, {}),
    "transform_config": (None, {}),
}
_STATES = ("quantization_status", "global_compression_ratio", "version")
_READ = ("quant_method", "format", "ignore", "config_groups")
_GROUP = ("targets", "weights", "input_activations", "output_activations", "format")
# A pattern's cost: re tries every way to share out a name between its repetitions.
_MOST_REPEATS = 3
_LONGEST_PATTERN = 20_000
_MOST_PATTERNS = 2_000


@dataclass(frozen=True, slots=True)
class Group:
    """A group of ``config_groups``, checked."""

    name: str
    targets: tuple[str, ...]
    bits: int
    group: int


@dataclass(frozen=True, slots=True)
class Block:
    """The quantization block: groups in their order, and the modules that stay as floats."""

    groups: tuple[Group, ...]
    ignored: tuple[str, ...]


def read_block(config: dict[str, Any], source: Path) -> Block:
    """The block of a ``config.json``.

    Raises:
        ValidationError: it is not one that compressed-tensors builds of lfmq have.
    """
    block = config.get("quantization_config")
    if not isinstance(block, dict):
        raise ValidationError(
            f"{source}: quantization_config is {_short(block)}, expected an object; this is not "
            f"a {METHOD} build"
        )
    for key, expected in (("quant_method", METHOD), ("format", PACKED)):
        if block.get(key) != expected:
            raise ValidationError(
                f"{source}: {key} of quantization_config is {_short(block.get(key))}, expected "
                f"{expected!r}; only {PACKED} builds can be read"
            )
    for key, value in block.items():
        if key not in (*_READ, *_STATES) and value not in _BLOCK.get(key, ()):
            raise ValidationError(
                f"{source}: {_short(key)} of quantization_config is {_short(value)}, which "
                "engines may compute with and lfmq does not read; write the build again"
            )
    ignored = _patterns(block.get("ignore", []), "ignore", source)
    return Block(_groups(block.get("config_groups"), source), ignored)


def names_module(module: str, targets: tuple[str, ...]) -> bool:
    """Whether one of the targets is the module's path or a pattern that matches it."""
    return any(
        re.match(t.removeprefix("re:"), module) if t.startswith("re:") else t == module
        for t in targets
    )


def _groups(groups: Any, source: Path) -> tuple[Group, ...]:
    if not isinstance(groups, dict) or not groups:
        raise ValidationError(
            f"{source}: config_groups is {_short(groups)}, expected an object of groups"
        )
    return tuple(_group(_short_name(name), group, source) for name, group in groups.items())


def _group(name: str, group: Any, source: Path) -> Group:
    fields = group if isinstance(group, dict) else {}
    weights = fields.get("weights")
    weights = weights if isinstance(weights, dict) else {}
    bits, size = weights.get("num_bits"), weights.get("group_size")
    if (
        type(bits) is not int
        or type(size) is not int
        or bits not in (4, 8)
        or not 1 <= size <= 2**20
        or any(weights.get(key) != value for key, value in _SCHEME.items())
        or fields.get("input_activations") is not None
        or fields.get("output_activations") is not None
        or fields.get("format", PACKED) != PACKED
    ):
        found = {k: weights.get(k) for k in ("num_bits", "group_size", *_SCHEME)}
        raise ValidationError(
            f"{source}: {name} of config_groups is {_short(found if weights else group)}, "
            f"expected {PACKED} weights of type int, symmetric, in groups, 4 or 8 bits, and plain "
            "activations"
        )
    _check_others(name, fields, weights, source)
    return Group(name, _patterns(fields.get("targets"), f"targets of {name}", source), bits, size)


def _check_others(
    name: str, fields: dict[str, Any], weights: dict[str, Any], source: Path
) -> None:
    """Keys that are not read have the values that change nothing."""
    known = {"num_bits", "group_size", *_SCHEME, *_OBSERVERS}
    odd = [(k, v) for k, v in fields.items() if k not in _GROUP]
    odd += [(k, v) for k, v in weights.items() if k not in known and v not in _WEIGHTS.get(k, ())]
    for key, value in odd:
        raise ValidationError(
            f"{source}: {_short(key)} of {name} in config_groups is {_short(value)}, which "
            "engines may compute with and lfmq does not read; write the build again"
        )


# ---- patterns


def _patterns(targets: Any, what: str, source: Path) -> tuple[str, ...]:
    """A list of module paths, class names and patterns, checked."""
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise ValidationError(f"{source}: {what} is {_short(targets)}, expected a list of texts")
    if len(targets) > _MOST_PATTERNS:
        raise ValidationError(
            f"{source}: {what} has {len(targets):,} items, expected at most {_MOST_PATTERNS:,}"
        )
    for target in targets:
        if target.startswith("re:"):
            _check_pattern(target.removeprefix("re:"), what, source)
    return tuple(targets)


def _check_pattern(pattern: str, what: str, source: Path) -> None:
    """It is a pattern, and one that is matched in little time."""
    where = f"{source}: {what} has {_short('re:' + pattern)}"
    if len(pattern) > _LONGEST_PATTERN:
        raise ValidationError(
            f"{where}, {len(pattern):,} characters, expected {_LONGEST_PATTERN:,}"
        )
    try:
        parsed = parser.parse(pattern)
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValidationError(f"{where}, which is not a pattern ({error!s:.80})") from error
    repeats = list(_repeats(parsed, inside=False))
    if len(repeats) > _MOST_REPEATS or any(repeats):
        raise ValidationError(
            f"{where}, which can take for ever to match; expected at most {_MOST_REPEATS} "
            "repetitions, none inside another, and no references"
        )


def _repeats(parsed: Any, *, inside: bool) -> Iterator[bool]:
    """Of each repetition or reference, whether it stands where its cost multiplies."""
    for code, argument in parsed:
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT):
            yield inside
            yield from _repeats(argument[2], inside=True)
        elif code is codes.SUBPATTERN:
            yield from _repeats(argument[3], inside=inside)
        elif code is codes.BRANCH:
            if inside:
                yield True  # (a|a)* has as many ways as a nested repetition
            for branch in argument[1]:
                yield from _repeats(branch, inside=inside)
        elif code not in (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN, codes.AT):
            yield True  # references, assertions, conditions


def _short_name(name: str) -> str:
    return name if name.isidentifier() and len(name) <= 60 else _short(name)[:60]
