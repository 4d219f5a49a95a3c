"""GPTQ in torch operations against the compiled kernels, and on a GPU where there is one."""

import numpy as np
import pytest
import torch

from lfmq.quant import gptq
from lfmq.quant.types import Quantized, Scheme, dequantize


def problem(rows=96, columns=128, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, columns, generator=generator)
    x = x @ torch.randn(columns, columns, generator=generator) * 0.2
    w = torch.randn(rows, columns, generator=generator) * 0.05
    return w.numpy(), x.T @ x


def loss(w, q: Quantized, h) -> float:
    d = torch.from_numpy(dequantize(q) - w).double()
    return float(((d @ h.double()) * d).sum())


@pytest.mark.parametrize("sweeps", [0, 3])
@pytest.mark.parametrize("group", [32, 64])
def test_the_same_codes_at_four_bits(group, sweeps):
    """All but what another order of a group's sums tips over: one code in a hundred."""
    w, h = problem()
    moments, scheme = gptq.factorize(h), Scheme(4, group)
    ours = gptq.quantize(w, moments, scheme, sweeps=sweeps)
    other = gptq.quantize(w, moments, scheme, sweeps=sweeps, body="torch")
    assert np.mean(ours.codes == other.codes) > 0.99
    assert np.mean(ours.scale == other.scale) > 0.97
    assert loss(w, other, h) == pytest.approx(loss(w, ours, h), rel=0.01)


def test_as_good_at_eight_bits():
    """Scales that differ in their last bit move many of 255 levels by one; the loss tells."""
    w, h = problem()
    moments, scheme = gptq.factorize(h), Scheme(8)
    ours = gptq.quantize(w, moments, scheme)
    other = gptq.quantize(w, moments, scheme, sweeps=gptq.SWEEPS, body="torch")
    assert other.codes.min() >= 1
    np.testing.assert_allclose(other.scale, ours.scale, rtol=2**-6)
    assert loss(w, other, h) == pytest.approx(loss(w, ours, h), rel=0.02)


def test_zeros_and_what_float16_lacks():
    w, h = problem(rows=4)
    moments = gptq.factorize(h)
    zeros = gptq.quantize(np.zeros_like(w), moments, Scheme(4), sweeps=3, body="torch")
    assert not dequantize(zeros).any()
    for value in (np.nan, np.inf, 1e6):
        w[2, 70] = value
        with pytest.raises(ValueError, match="NaN, Inf or beyond float16"):
            gptq.quantize(w, moments, Scheme(4), sweeps=3, body="torch")


@pytest.mark.gpu
def test_on_a_gpu():
    w, h = problem(rows=512, columns=512)
    on_cpu, on_gpu = gptq.factorize(h), gptq.factorize(h.cuda())
    ours = gptq.quantize(w, on_cpu, Scheme(4))
    other = gptq.quantize(w, on_gpu, Scheme(4))
    assert np.mean(ours.codes == other.codes) > 0.98
    assert loss(w, other, h) == pytest.approx(loss(w, ours, h), rel=0.01)
