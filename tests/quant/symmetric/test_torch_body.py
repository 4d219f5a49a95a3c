"""GPTQ in torch operations against the compiled kernels, code by code."""

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
