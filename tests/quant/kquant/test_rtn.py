"""The search for a superblock's scales against its plain definition, and against ggml's."""

import ctypes
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quant_shape_to_byte_shape
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.quant.kquant.search import MOVES, ROUNDS, SPANS, TARGETS
from lfmq.quant.rtn import quantize
from lfmq.quant.types import Quantized, Scheme, dequantize

F32 = NDArray[np.float32]
ZERO, ONE = np.float32(0), np.float32(1)
FAR, SAME = np.float32(3e38), np.float32(2.0**-16)
SCHEMES = (Scheme(4, 32, "kquant"), Scheme(5, 32, "kquant"), Scheme(6, 16, "kquant"))
KINDS = {
    4: GGMLQuantizationType.Q4_K,
    5: GGMLQuantizationType.Q5_K,
    6: GGMLQuantizationType.Q6_K,
}
LARGEST = float(np.finfo(np.float16).max)


def ratio(a: F32, b: F32) -> F32:
    """a / b, and 0 where b is 0; float32."""
    with np.errstate(all="ignore"):
        return np.where(b == 0, ZERO, a / b).astype(np.float32)


def half(a: F32) -> F32:
    return a.astype(np.float16).astype(np.float32)


def total(columns: F32) -> F32:
    """The sum over the last axis, in its order."""
    result = np.zeros(columns.shape[:-1], np.float32)
    for j in range(columns.shape[-1]):
        result = result + columns[..., j]
    return result


def nearest(x: F32, low: float, high: float) -> F32:
    return np.clip(np.rint(x), np.float32(low), np.float32(high)).astype(np.float32)


class Shifted:
    """Codes from 0 with an offset: x [n, 8, 32], w = d step q - dmin shift."""

    def __init__(self, x: F32, h: F32, scheme: Scheme) -> None:
        self.x, self.h, self.scheme, self.top = x, h, scheme, scheme.highest_code
        self.hx, self.share = total(h * x), ratio(np.ones_like(x[..., 0]), total(h))

    def codes(self, inverse: F32, base: F32) -> F32:
        return nearest(self.x * inverse[..., None] + base[..., None], 0, self.top)

    def sums(self, inverse: F32, base: F32) -> tuple[F32, F32, F32]:
        q = self.codes(inverse, base)
        hq = self.h * q
        return total(hq), total(hq * q), total(hq * self.x)

    def fit(self) -> tuple[F32, F32]:
        low, high = np.minimum(self.x.min(-1), ZERO), self.x.max(-1)
        width = high - low
        middle = low + width * np.float32(0.5)
        width = np.where(width > np.float32(2.0**-25), width, ZERO)
        best, s, m = np.full_like(low, -FAR), np.zeros_like(low), np.zeros_like(low)
        tried = [(span, move) for span in SPANS[self.scheme.bits] for move in self.moves]
        for trial in [*tried, None]:
            if trial:
                inverse = ratio(np.full_like(width, trial[0]), width)
                centre = np.float32(self.top) * np.float32(0.5) - trial[1]
                base = centre - middle * inverse
            else:
                inverse = ratio(np.ones_like(s), np.where(s > np.float32(2.0**-25), s, ZERO))
                base = m * inverse
            q1, q2, qx = self.sums(inverse, base)
            mean = q1 * self.share
            along, spread = qx - mean * self.hx, q2 - mean * q1
            fitted = np.where(spread > q2 * SAME, ratio(np.maximum(along, ZERO), spread), ZERO)
            lowered = (fitted * q1 - self.hx) * self.share
            through = ratio(np.maximum(qx, ZERO), q2)
            alone = through * qx - (self.hx * self.share) * self.hx
            gain = np.where(lowered < 0, alone, fitted * along)
            fitted = np.where(lowered < 0, through, fitted)
            better = gain > best
            best, s = np.where(better, gain, best), np.where(better, fitted, s)
            m = np.where(better, np.maximum(lowered, ZERO), m)
        return s, m

    @property
    def moves(self) -> F32:
        return MOVES[self.scheme.bits]

    def first_scales(self, s: F32, m: F32) -> tuple[F32, F32]:
        parts = (np.maximum(v.max(-1), ZERO) / np.float32(63) for v in (s, m))
        d, dmin = (half(p) for p in parts)
        return d, dmin

    def steps(self, s: F32, m: F32, d: F32, dmin: F32) -> tuple[F32, F32, F32]:
        first = nearest(ratio(s, d[:, None]), 0, 63)
        best, step, shift = np.full_like(s, FAR), np.zeros_like(s), np.zeros_like(s)
        for beside in (-1, 0, 1):
            code = nearest(first + np.float32(beside), 0, 63)
            size = d[:, None] * code
            inverse = ratio(np.ones_like(size), size)
            q1 = total(self.h * self.codes(inverse, m * inverse))
            below = nearest(ratio((size * q1 - self.hx) * self.share, dmin[:, None]), 0, 63)
            offset = dmin[:, None] * below
            q = self.codes(inverse, offset * inverse)
            miss = (self.x - size[..., None] * q) + offset[..., None]
            error = total((self.h * miss) * miss)
            better = error < best
            best, step = np.where(better, error, best), np.where(better, code, step)
            shift = np.where(better, below, shift)
        return step, shift, total(best)

    def refit(self, step: F32, shift: F32, d: F32, dmin: F32) -> tuple[F32, F32]:
        inverse = ratio(np.ones_like(step), d[:, None] * step)
        q1, q2, qx = self.sums(inverse, (dmin[:, None] * shift) * inverse)
        aa, ab = total((step * step) * q2), total((step * shift) * q1)
        bb = total((shift * shift) * total(self.h))
        xa, xb = total(step * qx), total(shift * self.hx)
        apart, least = aa * bb - ab * ab, (aa * bb) * SAME
        new = half(np.maximum(ratio(xa * bb - xb * ab, apart), ZERO))
        new_min = half(np.maximum(ratio(xa * ab - xb * aa, apart), ZERO))
        return np.where(apart > least, new, d), np.where(apart > least, new_min, dmin)

    def final(self, step: F32, shift: F32, d: F32, dmin: F32) -> F32:
        inverse = ratio(np.ones_like(step), d[:, None] * step)
        return self.codes(inverse, (dmin[:, None] * shift) * inverse)


class Signed:
    """Signed codes without an offset: x [n, 16, 16], w = d step q."""

    def __init__(self, x: F32, h: F32, scheme: Scheme) -> None:
        self.x, self.h, self.top = x, h, scheme.zero_point - 1

    def codes(self, inverse: F32) -> F32:
        return nearest(self.x * inverse[..., None], -self.top - 1, self.top)

    def sums(self, inverse: F32) -> tuple[F32, F32]:
        q = self.codes(inverse)
        hq = self.h * q
        return total(hq * q), total(hq * self.x)

    def fit(self) -> tuple[F32, F32]:
        at = np.abs(self.x).argmax(-1)[..., None]
        peak = np.take_along_axis(self.x, at, -1)[..., 0]
        peak = np.where(np.abs(peak) > np.float32(2.0**-25), peak, ZERO)
        best, s = np.full_like(peak, -FAR), np.zeros_like(peak)
        for target in [*TARGETS, None]:
            ones = np.ones_like(peak)
            inverse = ratio(ones, s) if target is None else ratio(-target * ones, peak)
            q2, qx = self.sums(inverse)
            fitted = ratio(qx, q2)
            better = fitted * qx > best
            best, s = np.where(better, fitted * qx, best), np.where(better, fitted, s)
        return s, s * ZERO

    def first_scales(self, s: F32, m: F32) -> tuple[F32, F32]:
        widest = s[np.arange(len(s)), np.abs(s).argmax(-1)]
        d = half(widest / np.float32(-128))
        return d, np.zeros_like(d)

    def steps(self, s: F32, m: F32, d: F32, dmin: F32) -> tuple[F32, F32, F32]:
        first = nearest(ratio(s, d[:, None]), -128, 127)
        best, step = np.full_like(s, FAR), np.zeros_like(s)
        for beside in (-1, 0, 1):
            code = nearest(first + np.float32(beside), -128, 127)
            size = d[:, None] * code
            miss = self.x - size[..., None] * self.codes(ratio(np.ones_like(size), size))
            error = total((self.h * miss) * miss)
            better = error < best
            best, step = np.where(better, error, best), np.where(better, code, step)
        return step, step * ZERO, total(best)

    def refit(self, step: F32, shift: F32, d: F32, dmin: F32) -> tuple[F32, F32]:
        q2, qx = self.sums(ratio(np.ones_like(step), d[:, None] * step))
        aa, xa = total((step * step) * q2), total(step * qx)
        return np.where(aa > 0, half(ratio(xa, aa)), d), dmin

    def final(self, step: F32, shift: F32, d: F32, dmin: F32) -> F32:
        found = self.codes(ratio(np.ones_like(step), d[:, None] * step))
        return found + np.float32(self.top + 1)


def definition(w: F32, scheme: Scheme, importance: F32 | None) -> tuple[F32, ...]:
    """The search in plain numpy: codes, d, dmin, step and shift by superblock."""
    x = w.reshape(-1, 256 // scheme.group, scheme.group)
    h = np.ones(w.shape[-1], np.float32) if importance is None else importance
    h = np.broadcast_to(h, w.shape).reshape(x.shape)
    body = Shifted(x, h, scheme) if scheme.has_offset else Signed(x, h, scheme)
    s, m = body.fit()
    d, dmin = body.first_scales(s, m)
    best = np.full(len(x), FAR)
    kept: tuple[F32, ...] = (d * 0, d * 0, s * 0, s * 0)
    step, shift = s, m
    for turn in range(ROUNDS):
        if turn:
            d, dmin = body.refit(step, shift, d, dmin)
            s, m = d[:, None] * step, dmin[:, None] * shift
        step, shift, error = body.steps(s, m, d, dmin)
        better = error < best
        best, found = np.where(better, error, best), (d, dmin, step, shift)
        kept = tuple(
            np.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b)
            for a, b in zip(found, kept, strict=True)
        )
    d, dmin, step, shift = kept
    return body.final(step, shift, d, dmin), d, dmin, step, shift


def assert_equal(found: Quantized, expected: tuple[F32, ...]) -> None:
    codes, d, dmin, step, shift = expected
    assert found.sub_scale is not None
    np.testing.assert_array_equal(found.scale.reshape(-1), d)
    np.testing.assert_array_equal(found.sub_scale.reshape(step.shape), step)
    np.testing.assert_array_equal(found.codes.reshape(codes.shape), codes)
    if found.scheme.has_offset:
        assert found.offset is not None
        assert found.sub_min is not None
        np.testing.assert_array_equal(found.offset.reshape(-1), dmin)
        np.testing.assert_array_equal(found.sub_min.reshape(shift.shape), shift)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 35))
def test_equals_definition(scheme: Scheme, weighted: bool, seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (rows, 512)
    spread = np.exp(rng.normal(-4, 3, (2, rows, 1)))
    w = rng.standard_normal(shape) * spread[0] + rng.normal(0, 1, (rows, 1)) * spread[1]
    w[rng.random(shape) < 0.1] = 0
    w = np.clip(w, -LARGEST, LARGEST).astype(np.float32)
    importance = rng.random(shape[1]).astype(np.float32) if weighted else None
    if importance is not None:
        importance[rng.random(shape[1]) < 0.2] = 0
        importance[32:64] = 0
    assert_equal(quantize(w, scheme, importance), definition(w, scheme, importance))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@given(
    w=arrays(
        np.float32, (3, 256), elements=st.floats(-65504, 65504, width=32, allow_subnormal=True)
    )
)
@settings(max_examples=100)
def test_any_weights_stay_sound(scheme: Scheme, w: F32) -> None:
    q = quantize(w, scheme)
    assert all(np.isfinite(a).all() for a in q.arrays())
    assert q.codes.max() <= scheme.highest_code
    assert q.sub_scale is not None
    if q.offset is not None and q.sub_min is not None:
        assert (q.offset >= 0).all()
        assert min(q.sub_scale.min(), q.sub_min.min()) >= 0
        assert max(q.sub_scale.max(), q.sub_min.max()) <= 63
    # Never worse than zeros but for what float16's smallest step costs, 63 codes of 31 levels.
    error = np.square(dequantize(q) - w, dtype=np.float64).sum(1)
    assert (
        error <= np.square(w, dtype=np.float64).sum(1) * 1.001 + 256 * (63 * 2.0**-24) ** 2
    ).all()
    assert_equal(q, definition(w, scheme, None))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("value", [65504.0, -65504.0, 5.0, -5.0, 1e-3, -1e-3, 1e-7, 1e-30, 0.0])
def test_constant_rows(scheme: Scheme, value: float) -> None:
    w = np.full((17, 512), value, np.float32)
    # float16's relative step of the scale, and its smallest step times the codes
    tolerance = abs(value) * 2**-10 + 63 * 31 * 2.0**-25
    assert np.abs(dequantize(quantize(w, scheme)) - w).max() <= tolerance


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_bfloat16_rows_are_read_as_they_are(scheme: Scheme) -> None:
    w = np.random.default_rng(3).standard_normal((21, 512)).astype(ml_dtypes.bfloat16)
    narrow, wide = quantize(w, scheme), quantize(w.astype(np.float32), scheme)
    for a, b in zip(narrow.arrays(), wide.arrays(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_importance_lowers_the_weighted_error(scheme: Scheme) -> None:
    rng = np.random.default_rng(6)
    w = rng.standard_normal((64, 512)).astype(np.float32)
    h = np.exp(rng.normal(0, 2, 512)).astype(np.float32)

    def weighted(importance: F32 | None) -> float:
        error = dequantize(quantize(w, scheme, importance)) - w
        return float((h * np.square(error)).sum())

    assert weighted(h) < 0.9 * weighted(None)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -65536.0])
def test_refuses_what_it_cannot_hold(scheme: Scheme, value: float) -> None:
    w = np.ones((2, 512), np.float32)
    w[1, 307] = value
    with pytest.raises(ValueError, match="NaN"):
        quantize(w, scheme)
    with pytest.raises(ValueError, match="groups of 256"):
        quantize(w[:, :384], scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_without_steps_there_are_no_weights(scheme: Scheme) -> None:
    q = quantize(np.ones((1, 256), np.float32), scheme)
    with pytest.raises(ValueError, match=r"no (offsets|scales of sub-blocks)"):
        dequantize(Quantized(q.codes, q.scale, scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_many_more_candidates_win_little(
    scheme: Scheme, sample_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = open_checkpoint(sample_folder).read("model.embed_tokens.weight")[:512]
    w = np.concatenate((w, np.random.default_rng(8).standard_normal(w.shape) * 0.02)).astype("f")

    def error() -> float:
        return float(np.square(dequantize(quantize(w, scheme)) - w, dtype=np.float64).sum())

    found, top = error(), scheme.highest_code
    dense = np.arange(top - 3, top + 7, 0.25, dtype=np.float32)
    monkeypatch.setitem(SPANS, scheme.bits, dense)
    monkeypatch.setitem(MOVES, scheme.bits, np.arange(-0.45, 0.5, 0.1, dtype=np.float32))
    targets = np.arange(26, 35, 0.125, dtype=np.float32)
    monkeypatch.setattr("lfmq.quant.kquant.bodies.TARGETS", targets)
    assert 0.985 * found < error() < found


def ggml_round_trip(library: ctypes.CDLL, w: F32, kind: GGMLQuantizationType) -> F32:
    """A weight [N, K] quantized by ggml without importance and dequantized by gguf-py."""
    packed = np.empty(quant_shape_to_byte_shape(w.shape, kind), np.uint8)
    floats = w.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    library.ggml_quantize_chunk(
        ctypes.c_int(kind),
        floats,
        ctypes.c_void_p(packed.ctypes.data),
        *(ctypes.c_int64(n) for n in (0, *w.shape)),
        None,
    )
    return np.asarray(gguf_dequantize(packed, kind), np.float32)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_less_squared_error_than_ggml_on_every_weight_of_the_sample(
    scheme: Scheme, sample_folder: Path, ggml: ctypes.CDLL
) -> None:
    checkpoint = open_checkpoint(sample_folder)
    ratios = {}
    for name in checkpoint.stored:
        if name.endswith("embed_tokens.weight") or "experts.3." in name or "_proj" in name:
            w = np.ascontiguousarray(checkpoint.read(name)[:1024], np.float32)
            ours = np.square(dequantize(quantize(w, scheme)) - w, dtype=np.float64).sum()
            theirs = np.square(ggml_round_trip(ggml, w, KINDS[scheme.bits]) - w).sum()
            ratios[name] = ours / theirs
    assert len(ratios) > 20
    assert max(ratios.values()) < {4: 0.97, 5: 0.94, 6: 0.91}[scheme.bits], ratios
