"""The search for scale and offset against its plain definition, and against mlx's quantizer."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.quant.affine.search import MOVES, SPANS
from lfmq.quant.rtn import quantize
from lfmq.quant.types import (
    Quantized,
    Scheme,
    dequantize,
)

F32 = NDArray[np.float32]
ZERO, ONE = np.float32(0), np.float32(1)
GRIDS: tuple[str, ...] = ("affine_bias", "affine_zero_point")
CASES = tuple(SPANS)  # grids with their bits
LARGEST = float(np.finfo(np.float16).max)


def ratio(a: F32, b: F32) -> F32:
    """a / b, and 0 where b is 0; float32."""
    with np.errstate(all="ignore"):
        return np.where(b == 0, ZERO, a / b).astype(np.float32)


def half(a: F32) -> F32:
    return a.astype(np.float16).astype(np.float32)


def total(columns: F32) -> F32:
    """The sum over a group, in its order."""
    result = np.zeros(len(columns), np.float32)
    for column in columns.T:
        result = result + column
    return result


def span(low: F32, high: F32) -> F32:
    return np.where(high - low >= np.float32(2.0**-25), high - low, ZERO)


def affine(x: F32, h: F32, scheme: Scheme) -> tuple[F32, F32]:
    """Scale and offset of groups [n, group]: the regression on codes of the best candidate."""
    top = np.float32(scheme.highest_code)
    centre = top * np.float32(0.5)
    width = span(x.min(1), x.max(1))
    middle = x.min(1) + (x.max(1) - x.min(1)) * np.float32(0.5)
    u = x - middle[:, None]
    share, sx = ratio(np.ones(len(x), np.float32), total(h)), total(h * u)

    def fit(inverse: F32, shift: F32) -> tuple[F32, F32, F32, F32]:
        p = np.clip(np.rint(u * inverse[:, None] + shift[:, None]), ZERO, top) - centre
        hp = h * p
        sp, spp, spx = total(hp), total(hp * p), total(hp * u)
        mean = sp * share
        spread, along = spp - mean * sp, spx - mean * sx
        apart = spread > np.float32(2.0**-16) * spp
        s = np.where(apart, ratio(np.maximum(along, ZERO), spread), ZERO)
        b = ((sx - s * sp) * share).astype(np.float32)
        return s, b, s * along, sp

    best, s, b = np.full(len(x), -ONE), np.zeros(len(x), np.float32), np.zeros(len(x), np.float32)
    key = scheme.grid, scheme.bits
    for levels, move in product(SPANS[key], MOVES[key]):
        shift = np.full(len(x), centre - move)
        fitted, offset, gain, _ = fit(ratio(np.full_like(width, levels), width), shift)
        better = gain > best
        best, s, b = (np.where(better, *c) for c in ((gain, best), (fitted, s), (offset, b)))
    for _ in range(2):
        inverse = ratio(np.ones_like(s), s)
        s, b, _, sp = fit(inverse, centre - b * inverse)
    s = half(s)
    return s, half(np.clip(middle + ((sx - s * sp) * share - s * centre), -LARGEST, LARGEST))


def asymmetric(x: F32, h: F32, scheme: Scheme) -> tuple[F32, F32]:
    """Scale and zero point of groups [n, group]."""
    top = np.float32(scheme.highest_code)
    low, high = np.minimum(x.min(1), ZERO), np.maximum(x.max(1), ZERO)
    width = span(low, high)
    first = np.clip(np.rint(-low * ratio(np.full_like(low, top), width)), ZERO, top)

    def fit(inverse: F32, zero: F32) -> tuple[F32, F32]:
        z = zero[:, None]
        p = np.clip(np.rint(x * inverse[:, None]), -z, top - z)
        hp = h * p
        xp = total(hp * x)
        s = ratio(xp, total(hp * p))
        return s, s * xp

    best, s, zero = np.full(len(x), -ONE), np.zeros(len(x), np.float32), first
    key = scheme.grid, scheme.bits
    for move, levels in product(MOVES[key], SPANS[key]):
        tried = np.clip(first + move, ZERO, top)
        fitted, gain = fit(ratio(np.full_like(width, levels), width), tried)
        better = gain > best
        best, s, zero = (np.where(better, *c) for c in ((gain, best), (fitted, s), (tried, zero)))
    return half(fit(ratio(np.ones_like(s), s), zero)[0]), zero


def definition(w: F32, scheme: Scheme, importance: F32 | None) -> Quantized:
    """The search in plain numpy."""
    x = w.reshape(-1, scheme.group)
    h = np.ones_like(x)
    if importance is not None:
        h = np.broadcast_to(importance, w.shape).reshape(-1, scheme.group).astype(np.float32)
    search = affine if scheme.grid == "affine_bias" else asymmetric
    s, offset = search(x, h, scheme)
    b = offset if scheme.grid == "affine_bias" else -s * offset
    codes = np.rint((x - b[:, None]) * ratio(np.ones_like(s), s)[:, None])
    codes = np.clip(codes, 0, scheme.highest_code).astype(np.uint8)
    shape = (*w.shape[:-1], w.shape[-1] // scheme.group)
    stored = offset.astype(np.float16 if scheme.grid == "affine_bias" else np.uint8)
    return Quantized(
        codes.reshape(w.shape), s.astype(np.float16).reshape(shape), scheme, stored.reshape(shape)
    )


def assert_same(found: Quantized, expected: Quantized) -> None:
    assert found.offset is not None
    assert expected.offset is not None
    assert found.offset.dtype == expected.offset.dtype
    np.testing.assert_array_equal(found.scale, expected.scale)
    np.testing.assert_array_equal(found.offset, expected.offset)
    np.testing.assert_array_equal(found.codes, expected.codes)


@pytest.mark.parametrize(("grid", "bits"), CASES)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("weighted", [False, True])
@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 35))
def test_equals_definition(
    grid: str, bits: int, group: int, weighted: bool, seed: int, rows: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = (rows, 2 * group)
    spread = np.exp(rng.normal(-4, 3, (2, rows, 1)))
    w = rng.standard_normal(shape) * spread[0] + rng.normal(0, 1, (rows, 1)) * spread[1]
    w[rng.random(shape) < 0.1] = 0
    w = np.clip(w, -LARGEST, LARGEST).astype(np.float32)
    importance = rng.random(shape[1]).astype(np.float32) if weighted else None
    if importance is not None:
        importance[rng.random(shape[1]) < 0.2] = 0
    scheme = Scheme(bits, group, grid)
    assert_same(quantize(w, scheme, importance), definition(w, scheme, importance))


@pytest.mark.parametrize(("grid", "bits"), CASES)
@given(
    w=arrays(
        np.float32, (3, 64), elements=st.floats(-65504, 65504, width=32, allow_subnormal=True)
    )
)
@settings(max_examples=60)
def test_error_is_bounded_by_the_step(grid: str, bits: int, w: F32) -> None:
    q = quantize(w, Scheme(bits, 32, grid))
    assert_same(q, definition(w, q.scheme, None))
    assert (q.scale >= 0).all()
    assert q.offset is not None
    assert np.isfinite(q.scale).all()
    assert np.isfinite(q.offset).all()
    groups = w.reshape(3, 2, 32)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    if grid == "affine_zero_point":
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    error = np.abs(dequantize(q).astype(np.float64).reshape(groups.shape) - groups)
    # the candidate with the most levels cuts a quarter of the range off, the regression may move
    # the grid by as much again; float16 rounds the offset, and scales below its smallest step
    step = np.maximum(np.abs(low), np.abs(high)) * 2.0**-11
    assert (error <= 0.5 * (high.astype(np.float64) - low) + step + 256 * 2.0**-25).all()


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_less_squared_error_than_mlx(bits: int, group: int, sample_folder: Path) -> None:
    """On the affine grid it is mlx's own format; the asymmetric one must still win."""
    mx = pytest.importorskip("mlx.core")
    rng = np.random.default_rng(5)
    checkpoint = open_checkpoint(sample_folder)
    layer = "model.layers.3"
    names = [f"{layer}.feed_forward.experts.1.{w}.weight" for w in ("w1", "w2", "w3")]
    weights = [checkpoint.read(name) for name in (*names, f"{layer}.conv.in_proj.weight")]
    weights.append((rng.standard_normal((256, 256)) * 0.02).astype(np.float32))
    for w in weights:
        packed = mx.quantize(mx.array(w), group_size=group, bits=bits)
        theirs = np.array(mx.dequantize(*packed, group_size=group, bits=bits))
        loss = np.square(theirs - w).sum()
        for grid, share in (("affine_bias", 0.9), ("affine_zero_point", 0.98)):
            if (grid, bits) in SPANS:
                ours = dequantize(quantize(w, Scheme(bits, group, grid)))
                assert np.square(ours - w).sum() < share * loss


@pytest.mark.parametrize("bits", [4, 8])
def test_grids_with_an_offset_beat_the_symmetric_one(bits: int) -> None:
    rng = np.random.default_rng(7)
    w = (rng.standard_normal((64, 256)) * 0.02 + 0.01).astype(np.float32)
    symmetric, affine_, asymmetric_ = (
        np.square(dequantize(quantize(w, Scheme(bits, 64, grid))) - w).sum()
        for grid in ("symmetric", *GRIDS)
    )
    assert affine_ < asymmetric_ < symmetric


@pytest.mark.parametrize("grid", GRIDS)
def test_importance_lowers_the_weighted_error(grid: str) -> None:
    rng = np.random.default_rng(6)
    w = rng.standard_normal((64, 128)).astype(np.float32)
    h = np.exp(rng.normal(0, 2, 128)).astype(np.float32)

    def weighted(importance: F32 | None) -> float:
        error = dequantize(quantize(w, Scheme(4, 32, grid), importance)) - w
        return float((h * np.square(error)).sum())

    assert weighted(h) < 0.9 * weighted(None)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_refuses_what_it_cannot_hold(grid: str, value: float) -> None:
    for column in (0, 7, 31):
        w = np.ones((2, 32), np.float32)
        w[1, column] = value
        with pytest.raises(ValueError, match="NaN"):
            quantize(w, Scheme(4, 32, grid))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 65504.0, -65504.0, 2.0**-24])
def test_constant_groups(grid: str, value: float) -> None:
    """A float16 comes back as it is from the affine grid, within a step from the other."""
    w = np.full((3, 2, 64), value, np.float32)
    q = quantize(w, Scheme(4, 64, grid))
    assert q.codes.shape == w.shape
    assert q.offset is not None
    assert q.scale.shape == q.offset.shape == (3, 2, 1)
    rounding = 0 if grid == "affine_bias" or value == 0 else abs(value) * 2**-10 + 2**-24
    np.testing.assert_allclose(dequantize(q), w, rtol=0, atol=rounding)


@pytest.mark.parametrize("grid", GRIDS)
def test_without_offsets_there_are_no_weights(grid: str) -> None:
    q = Quantized(np.zeros((1, 32), np.uint8), np.ones((1, 1), np.float16), Scheme(4, 32, grid))
    with pytest.raises(ValueError, match=f"{grid} grid has no offsets"):
        dequantize(q)
