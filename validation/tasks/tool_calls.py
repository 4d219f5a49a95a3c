"""The Pythonic tool calls of LFM2: ``<|tool_call_start|>[f(a='x', n=5), g()]<|tool_call_end|>``.

Between the markers stands a list of calls with keyword arguments, as the model's chat template
writes them: strings in quotes, numbers, True, False and None, lists, and mappings as JSON, so that
true, false and null occur too (vLLM's parser for lfm2 takes both spellings). The text is parsed as
a Python expression and walked; nothing is evaluated. Runtimes repair some broken calls (a quote
within quotes, a number with leading zeros); here a call that must be repaired is not valid.
"""

import ast
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lfmq.quant.errors import ValidationError

START, END = "<|tool_call_start|>", "<|tool_call_end|>"
_JSON_NAMES = {"true": True, "false": False, "null": None}
# Far beyond any call; Python's parser needs memory in proportion to the text.
_MOST_CHARACTERS = 100_000


@dataclass(frozen=True, slots=True)
class Call:
    """One call; ``function`` may be dotted, arguments are JSON values."""

    function: str
    arguments: Mapping[str, Any]


def parse_calls(text: str) -> tuple[Call, ...]:
    """The calls of the first marked block in a text; what stands around it is ignored.

    Raises:
        ValidationError: there is no block, or it is not a list of calls.
    """
    _, start, rest = text.partition(START)
    block, end, _ = rest.partition(END)
    if not start or not end:
        raise ValidationError(f"{END if start else START} is missing")
    elements = _parse(block.strip())
    if not isinstance(elements, ast.List) or not elements.elts:
        raise ValidationError(f"expected a list of calls between the markers, found {block!r}")
    try:
        return tuple(_call(node) for node in elements.elts)
    except RecursionError as error:
        raise ValidationError("the call is nested too deeply") from error


def same_functions(found: tuple[Call, ...], wanted: tuple[Call, ...]) -> bool:
    """Whether both call the same functions equally often, in any order."""
    return sorted(c.function for c in found) == sorted(c.function for c in wanted)


def same_calls(found: tuple[Call, ...], wanted: tuple[Call, ...]) -> bool:
    """Whether both make the same calls with equal arguments, in any order."""
    left = list(wanted)
    for call in found:
        match = next((c for c in left if _same_call(call, c)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _same_call(one: Call, other: Call) -> bool:
    return one.function == other.function and _equal(one.arguments, other.arguments)


def _equal(one: Any, other: Any) -> bool:
    """Equality of JSON values: 5 equals 5.0, but True does not equal 1."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _parse(block: str) -> ast.expr:
    if len(block) > _MOST_CHARACTERS:
        raise ValidationError(f"the call has {len(block):,} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown escapes in strings
            return ast.parse(block, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ValidationError(f"not a Python expression: {block!r} ({reason})") from error


def _call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call):
        raise _unexpected(node, "a call")
    if node.args:
        raise _unexpected(node.args[0], "a keyword argument")
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise _unexpected(keyword.value, "a keyword argument given once")
        arguments[keyword.arg] = _value(keyword.value)
    return Call(_name(node.func), arguments)


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise _unexpected(node, "a function's name")


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | bool() | int() | None as value):
            return value
        case ast.Constant(value=float() as value) if math.isfinite(value):
            return value
        case ast.Name(id=name) if name in _JSON_NAMES:
            return _JSON_NAMES[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            if not isinstance(value, bool) and math.isfinite(value):
                return -value
        case ast.List(elts=elements):
            return [_value(element) for element in elements]
        case ast.Dict(keys=keys, values=values):
            return dict(zip(_keys(keys, node), map(_value, values), strict=True))
    raise _unexpected(node, "a literal")


def _keys(keys: list[ast.expr | None], node: ast.expr) -> list[str]:
    names = [k.value for k in keys if isinstance(k, ast.Constant) and isinstance(k.value, str)]
    if len(set(names)) < len(keys):
        raise _unexpected(node, "a mapping whose keys are different strings")
    return names


def _unexpected(node: ast.expr, expected: str) -> ValidationError:
    return ValidationError(f"expected {expected}, found {ast.unparse(node)!r}")
