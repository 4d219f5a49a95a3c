"""The compiled search against its plain definition, and against others' quantizers."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from lfmq.quant.rtn import quantize
from lfmq.quant.symmetric.bodies import TARGETS
from lfmq.quant.types import Scheme, dequantize

F32 = NDArray[np.float32]


def ratio(a: F32, b: F32) -> F32:
    """a / b, and 0 where b is 0; float32."""
    with np.errstate(all="ignore"):
        return np.where(b == 0, np.float32(0), a / b).astype(np.float32)


def fit(x: F32, h: F32, inverse: F32, scheme: Scheme) -> tuple[F32, F32, F32]:
    """Codes of x under 1/scale, and the sums of the least-squares scale, in order of the group."""
    low, high = scheme.lowest_code - scheme.zero_point, scheme.highest_code - scheme.zero_point
    q = np.clip(np.rint(x * inverse[:, None]), low, high).astype(np.float32)
    xq, qq = np.zeros(len(x), np.float32), np.zeros(len(x), np.float32)
    for j in range(x.shape[1]):
        hq = h[:, j] * q[:, j]
        xq = xq + hq * x[:, j]
        qq = qq + hq * q[:, j]
    return q, xq, qq


def definition(w: F32, scheme: Scheme, importance: F32 | None) -> tuple[F32, NDArray[np.float16]]:
    """The search in plain numpy: codes (centred) and float16 scale of groups [n, group]."""
    x = w.reshape(-1, scheme.group)
    h = np.ones_like(x)
    if importance is not None:
        h = np.broadcast_to(importance, w.shape).reshape(-1, scheme.group).astype(np.float32)
    peak = x[np.arange(len(x)), np.abs(x).argmax(1)]
    best, scale = np.full(len(x), -1, np.float32), np.zeros(len(x), np.float32)
    for target in TARGETS[scheme.bits]:
        _, xq, qq = fit(x, h, ratio(np.full_like(peak, -target), peak), scheme)
        s = ratio(xq, qq)
        better = s * xq > best
        best, scale = np.where(better, s * xq, best), np.where(better, s, scale)
    one = np.ones_like(scale)
    _, xq, qq = fit(x, h, ratio(one, scale), scheme)
    half = ratio(xq, qq).astype(np.float16)
    q, _, _ = fit(x, h, ratio(one, half.astype(np.float32)), scheme)
    return q, half


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("weighted", [False, True])
@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 35))
def test_equals_definition(bits: int, group: int, weighted: bool, seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (rows, 2 * group)
    w = (rng.standard_normal(shape) * np.exp(rng.normal(-4, 3, (rows, 1)))).astype(np.float32)
    w[rng.random(shape) < 0.1] = 0
    importance = rng.random(shape[1]).astype(np.float32) + 0.01 if weighted else None
    scheme = Scheme(bits, group)
    result = quantize(w, scheme, importance)
    codes, scale = definition(w, scheme, importance)
    np.testing.assert_array_equal(result.scale.reshape(-1), scale)
    np.testing.assert_array_equal(
        result.codes.reshape(-1, group).astype(np.float32) - scheme.zero_point, codes
    )


@pytest.mark.parametrize("bits", [4, 8])
@given(
    w=arrays(
        np.float32,
        (3, 64),
        elements=st.floats(-1e4, 1e4, width=32, allow_nan=False),
    )
)
@settings(max_examples=50)
def test_error_is_bounded_by_the_step(bits: int, w: F32) -> None:
    q = quantize(w, Scheme(bits))
    assert q.codes.min() >= q.scheme.lowest_code
    assert np.isfinite(q.scale).all()
    peak = np.abs(w.reshape(3, 2, 32)).max(-1, keepdims=True)
    error = np.abs(dequantize(q) - w).reshape(3, 2, 32)
    # a scale below half of float16's smallest step becomes 0, and with it up to 127 steps;
    # the coarsest candidate spends 6 levels on the peak; the other side may be cut by two steps
    assert (error <= peak / 6 * (3 if bits == 4 else 0.1) + 127 * 2**-25).all()


@pytest.mark.parametrize(
    ("bits", "kind"), [(4, GGMLQuantizationType.Q4_0), (8, GGMLQuantizationType.Q8_0)]
)
def test_less_squared_error_than_ggml(bits: int, kind: GGMLQuantizationType) -> None:
    rng = np.random.default_rng(5)
    w = (rng.standard_normal((256, 256)) * 0.02).astype(np.float32)
    ours = np.square(dequantize(quantize(w, Scheme(bits))) - w).sum()
    theirs = np.square(gguf_dequantize(gguf_quantize(w, kind), kind) - w).sum()
    assert ours < 0.9 * theirs


def test_importance_lowers_the_weighted_error() -> None:
    rng = np.random.default_rng(6)
    w = rng.standard_normal((64, 128)).astype(np.float32)
    h = np.exp(rng.normal(0, 2, 128)).astype(np.float32)

    def weighted(importance: F32 | None) -> float:
        error = dequantize(quantize(w, Scheme(4), importance)) - w
        return float((h * np.square(error)).sum())

    assert weighted(h) < weighted(None)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_refuses_what_it_cannot_hold(value: float) -> None:
    w = np.ones((2, 32), np.float32)
    w[1, 7] = value
    with pytest.raises(ValueError, match="NaN"):
        quantize(w, Scheme(4))


def test_zero_rows_stay_zero() -> None:
    q = quantize(np.zeros((3, 64), np.float32), Scheme(4))
    assert not dequantize(q).any()
    assert (q.codes == 8).all()
