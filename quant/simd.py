"""Sixteen float32 values as one value of a kernel, a row a lane.

LLVM turns loops over small arrays into SIMD code only where it can prove that they do not overlap,
which it rarely can in a kernel with a dozen of them, and then keeps sums in memory. Here a kernel
says what it means: ``a * b + c`` multiplies and adds sixteen lanes that stay in registers. What a
processor has is used: one instruction with AVX-512, two with AVX, four with SSE or NEON. Every
operation rounds as its scalar one does; none are fused or reordered.

Scratch arrays have one vector a row, float32 [n, 16].
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model
from numpy.typing import NDArray

from lfmq.quant.grid import LANES as LANES
from lfmq.quant.kernels import inner

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_INT = ir.IntType(32)
_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to nearest even
_TINY = 2.0**-14  # smallest normal float16
_SUBNORMAL = 0.75  # adding and subtracting it rounds to a multiple of 2^-24

Build = Callable[..., Any]
_code: Any = intrinsic  # whose own type leaves the first argument in


class _Vector(types.Type):
    """The type of a vector in numba."""

    def __init__(self) -> None:
        super().__init__("float32x16")


VECTOR = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


def _operation(build: Build, count: int) -> Any:
    """A function of ``count`` vectors whose code ``build(builder, *vectors)`` gives."""

    def typed(*found: Any) -> Any:
        if any(kind != VECTOR for kind in found):
            return None
        return VECTOR(*found), lambda _, builder, __, values: build(builder, *values)

    if count == 1:
        return _code(lambda context, a: typed(a))
    if count == 2:
        return _code(lambda context, a, b: typed(a, b))
    return _code(lambda context, a, b, x, y: typed(a, b, x, y))


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * LANES)


def _absolute(b: Any, x: Any) -> Any:
    bits = b.and_(b.bitcast(x, _INTS), ir.Constant(_INTS, [0x7FFFFFFF] * LANES))
    return b.bitcast(bits, _FLOATS)


def _ratio(b: Any, x: Any, y: Any) -> Any:
    zero = _constant(0.0)
    return b.select(b.fcmp_ordered("==", y, zero), zero, b.fdiv(x, y))


def _half(b: Any, x: Any) -> Any:
    def ints(value: int) -> ir.Constant:
        return ir.Constant(_INTS, [value] * LANES)

    bits = b.bitcast(x, _INTS)
    odd = b.and_(b.lshr(bits, ints(13)), ints(1))
    rounded = b.and_(b.add(b.add(bits, ints(0xFFF)), odd), ints(-8192))
    small = b.fsub(b.fadd(x, _constant(_SUBNORMAL)), _constant(_SUBNORMAL))
    is_small = b.fcmp_ordered("<", _absolute(b, x), _constant(_TINY))
    return b.select(is_small, small, b.bitcast(rounded, _FLOATS))


_add = _operation(lambda b, x, y: b.fadd(x, y), 2)
_subtract = _operation(lambda b, x, y: b.fsub(x, y), 2)
_multiply = _operation(lambda b, x, y: b.fmul(x, y), 2)
_divide = _operation(lambda b, x, y: b.fdiv(x, y), 2)

# The smaller and the larger of two, the second where they do not compare.
least = _operation(lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), x, y), 2)
most = _operation(lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y), 2)
# |x|.
absolute = _operation(_absolute, 1)
# x / y, 0 where y is 0.
ratio = _operation(_ratio, 2)
# The nearest float16, ties to even; for values that do not overflow it.
half = _operation(_half, 1)
# where_above(a, b, x, y): x where a > b, else y.
where_above = _operation(lambda b, p, q, x, y: b.select(b.fcmp_ordered(">", p, q), x, y), 4)
# where_within(a, b, x, y): x where a <= b, else y; y for a NaN.
where_within = _operation(lambda b, p, q, x, y: b.select(b.fcmp_ordered("<=", p, q), x, y), 4)


@_code
def any_above(_: Any, one: Any, other: Any) -> Any:
    """Whether a lane of one vector is above the other's."""

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        bits = b.bitcast(b.fcmp_ordered(">", *values), ir.IntType(LANES))
        return b.icmp_unsigned("!=", bits, ir.Constant(ir.IntType(LANES), 0))

    return types.boolean(VECTOR, VECTOR), build


@_code
def splat(_: Any, value: Any) -> Any:
    """The vector of sixteen times a float32."""
    if value != types.float32:
        return None

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        empty = ir.Constant(_FLOATS, ir.Undefined)
        first = b.insert_element(empty, values[0], ir.Constant(_INT, 0))
        return b.shuffle_vector(first, empty, ir.Constant(_INTS, [0] * LANES))

    return VECTOR(value), build


def _overload(symbol: Any, function: Any) -> None:
    @overload(symbol, inline="always", strict=False)
    def _(a: Any, b: Any) -> Any:
        if a == VECTOR and b == VECTOR:
            return lambda a, b: function(a, b)
        if a == VECTOR and b == types.float32:
            return lambda a, b: function(a, splat(b))
        if a == types.float32 and b == VECTOR:
            return lambda a, b: function(splat(a), b)
        return None


for _symbol, _function in (
    (operator.add, _add),
    (operator.sub, _subtract),
    (operator.mul, _multiply),
    (operator.truediv, _divide),
):
    _overload(_symbol, _function)


@overload(operator.neg, inline="always", strict=False)
def _negative(a: Any) -> Any:
    return (lambda a: splat(np.float32(-0.0)) - a) if a == VECTOR else None


@inner
def nearest(value: Any, low: Any, high: Any) -> Any:
    """The nearest integers, ties to even, between two vectors."""
    return least(most((value + _ROUND) - _ROUND, low), high)


# ---- memory


def whole_lanes(w: NDArray[Any]) -> NDArray[Any]:
    """The matrix [N, K] with rows of zeros up to a multiple of sixteen."""
    missing = -len(w) % LANES
    return np.concatenate((w, np.zeros((missing, w.shape[1]), w.dtype))) if missing else w


@_code
def load(_: Any, scratch: Any, j: Any) -> Any:
    """Row j of scratch."""

    def build(context: Any, b: Any, sig: Any, values: Any) -> Any:
        return b.load(next(_scratch(context, b, sig.args[0], values[0], values[1], 1)), align=4)

    return VECTOR(scratch, types.intp), build


@_code
def store(_: Any, scratch: Any, j: Any, value: Any) -> Any:
    """Make a vector row j of scratch."""

    def build(context: Any, b: Any, sig: Any, values: Any) -> Any:
        place = next(_scratch(context, b, sig.args[0], values[0], values[1], 1))
        b.store(values[2], place, align=4)
        return context.get_dummy_value()

    return types.void(scratch, types.intp, VECTOR), build


@_code
def load_columns(_: Any, rows: Any, row: Any, column: Any, scratch: Any, j: Any) -> Any:
    """Rows j to j + 31 of scratch become as many columns of sixteen rows of a matrix.

    The matrix [N, K] is C-contiguous and float32, or uint16 with the bits of bfloat16.
    """
    narrow = rows.dtype == types.uint16
    element = ir.IntType(16) if narrow else ir.FloatType()

    def build(context: Any, b: Any, sig: Any, values: Any) -> Any:
        matrix, row, column, scratch, j = values
        lines: tuple[list[Any], list[Any]] = ([], [])
        for place in _lines(context, b, sig.args[0], matrix, row, column):
            for side in (0, 1):  # a line of the cache is read at once
                at = b.gep(place, [ir.Constant(_INT, side * LANES)])
                kind = ir.VectorType(element, LANES).as_pointer()
                line = b.load(b.bitcast(at, kind), align=2 if narrow else 4)
                lines[side].append(_widen(b, line) if narrow else line)
        places = _scratch(context, b, sig.args[3], scratch, j, 2 * LANES)
        for side in (0, 1):
            for line in _transpose(b, lines[side]):
                b.store(line, next(places), align=4)
        return context.get_dummy_value()

    return types.void(rows, types.intp, types.intp, scratch, types.intp), build


def _widen(b: Any, line: Any) -> Any:
    """Bits of bfloat16 as float32."""
    wide = b.shl(b.zext(line, _INTS), ir.Constant(_INTS, [16] * LANES))
    return b.bitcast(wide, _FLOATS)


@_code
def store_columns(_: Any, rows: Any, row: Any, column: Any, scratch: Any, j: Any) -> Any:
    """The reverse of :func:`load_columns`, into a float32 matrix."""

    def build(context: Any, b: Any, sig: Any, values: Any) -> Any:
        matrix, row, column, scratch, j = values
        places = _scratch(context, b, sig.args[3], scratch, j, 2 * LANES)
        columns = [b.load(place, align=4) for place in places]
        lines = [_transpose(b, columns[:LANES]), _transpose(b, columns[LANES:])]
        for lane, place in enumerate(_lines(context, b, sig.args[0], matrix, row, column)):
            for side in (0, 1):
                at = b.gep(place, [ir.Constant(_INT, side * LANES)])
                b.store(lines[side][lane], b.bitcast(at, _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(rows, types.intp, types.intp, scratch, types.intp), build


@_code
def store_codes(_: Any, rows: Any, row: Any, column: Any, scratch: Any, j: Any) -> Any:
    """Rows j to j + 31 of scratch, whole numbers from 0 to 255, as columns of a uint8 matrix."""

    def build(context: Any, b: Any, sig: Any, values: Any) -> Any:
        matrix, row, column, scratch, j = values
        places = list(_scratch(context, b, sig.args[3], scratch, j, 2 * LANES))
        codes = [b.fptosi(b.load(place, align=4), _INTS) for place in places]
        words = []
        for first in range(0, len(codes), 4):  # four codes a lane, the first lowest
            word = codes[first]
            for k in range(1, 4):
                amount = ir.Constant(_INTS, [8 * k] * LANES)
                word = b.or_(word, b.shl(codes[first + k], amount))
            words.append(word)
        half = ir.VectorType(_INT, LANES // 2)
        lines = []
        for pair in _transpose(b, words):  # two rows of eight words
            for start in (0, LANES // 2):
                index = ir.Constant(half, list(range(start, start + LANES // 2)))
                lines.append(b.shuffle_vector(pair, pair, index))
        for line, place in zip(
            lines, _lines(context, b, sig.args[0], matrix, row, column), strict=True
        ):
            b.store(line, b.bitcast(place, half.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(rows, types.intp, types.intp, scratch, types.intp), build


def _lines(context: Any, b: Any, kind: Any, matrix: Any, row: Any, column: Any) -> Iterator[Any]:
    """Addresses at a column of sixteen rows of a C-contiguous matrix."""
    found = context.make_array(kind)(context, b, matrix)
    width = b.extract_value(found.shape, 1)
    for lane in range(LANES):
        start = b.mul(b.add(row, ir.Constant(row.type, lane)), width)
        yield b.gep(found.data, [b.add(start, column)])


def _scratch(context: Any, b: Any, kind: Any, scratch: Any, j: Any, count: int) -> Iterator[Any]:
    """Addresses of rows of scratch."""
    data = context.make_array(kind)(context, b, scratch).data
    for k in range(count):
        row = b.add(j, ir.Constant(j.type, k))
        place = b.gep(data, [b.mul(row, ir.Constant(j.type, LANES))])
        yield b.bitcast(place, _FLOATS.as_pointer())


def _transpose(b: Any, lines: list[Any]) -> list[Any]:
    """The transpose of n vectors, a power of two, in row-major order.

    Interleaving the first half of the vectors with the second moves the highest bit of an
    element's row below its lane; as many times as a row has bits exchanges rows and lanes.
    """
    n, low = len(lines), list(range(LANES // 2))
    first = [lane + side for lane in low for side in (0, LANES)]
    second = [index + LANES // 2 for index in first]
    for _ in range(n.bit_length() - 1):
        lines = [
            b.shuffle_vector(lines[i], lines[i + n // 2], ir.Constant(_INTS, order))
            for i in range(n // 2)
            for order in (first, second)
        ]
    return lines
