"""Which schemes a container holds, as data, and the refusal of any other.

A refusal names the tensor, what the plan asks for and what the container holds;
``lfmq.formats.registry`` adds which other containers can hold the plan.
"""

from collections.abc import Iterable, Mapping

from lfmq.formats.plan import FLOAT_ROLES, TensorPlan
from lfmq.quant.errors import UnsupportedError

# By grid and bits of a code, the groups that a container holds.
Held = Mapping[str, Mapping[int, tuple[int, ...]]]


def check_scheme(entry: TensorPlan, held: Held, container: str) -> None:
    """Raise for an integer scheme that a container does not hold.

    Raises:
        UnsupportedError: its grid, bits or group, or a tensor that is float in every build.
    """
    scheme = entry.scheme
    if scheme is None:
        return
    where = f"{entry.name}: {container}"
    if entry.role in FLOAT_ROLES:
        raise UnsupportedError(f"{entry.name}: {scheme} asked for, {container} keeps it as floats")
    if scheme.grid not in held:
        grids = "grid " if len(held) == 1 else "grids "
        raise UnsupportedError(
            f"{where} holds the {grids}{_words(held, 'and')}, the plan asks for {scheme.grid!r}"
        )
    widths = held[scheme.grid]
    if scheme.bits not in widths:
        raise UnsupportedError(
            f"{where} holds codes of {_words(widths, 'or')} bits on the grid {scheme.grid}, the "
            f"plan asks for {scheme.bits}"
        )
    if scheme.group not in widths[scheme.bits]:
        raise UnsupportedError(
            f"{where} holds groups of {_words(widths[scheme.bits], 'or')} on the grid "
            f"{scheme.grid} with {scheme.bits} bits, the plan asks for groups of {scheme.group}"
        )
    if entry.shape[-1] % scheme.span:
        raise UnsupportedError(
            f"{entry.name}: rows of {entry.shape[-1]} weights do not divide into the groups of "
            f"{scheme.span} that share a scale"
        )


def _words(values: Iterable[object], last: str) -> str:
    *first, end = map(str, values)
    return f"{', '.join(first)} {last} {end}" if first else end
