"""The GPU body of K-quants against the compiled kernels."""

import numpy as np
import pytest
import torch

from lfmq.quant import gptq
from lfmq.quant.superblock_torch import quantize_rows
from lfmq.quant.types import Quantized, Scheme, dequantize

SCHEMES = [Scheme(b, g, "superblock") for b, g in ((4, 32), (5, 32), (6, 16))]


@pytest.fixture(scope="module")
def problem() -> tuple[np.ndarray, torch.Tensor]:
    rng = np.random.default_rng(3)
    w = (rng.standard_normal((80, 512)) * 0.05).astype(np.float32)
    x = rng.standard_normal((3000, 512)) @ (rng.standard_normal((512, 512)) * 0.3 + np.eye(512))
    return w, torch.from_numpy((x.T @ x).astype(np.float32))


def loss(q: Quantized, w: np.ndarray, h: torch.Tensor) -> float:
    d = torch.from_numpy(dequantize(q) - w).double()
    return float(((d @ h.double()) * d).sum())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("sweeps", [0, 3])
def test_the_loss_of_the_compiled_kernels(problem, scheme, sweeps):
    """d and dmin start from the largest scales without a second fit: other codes, as good."""
    w, h = problem
    moments = gptq.factorize(h)
    ours = gptq.quantize(w, moments, scheme, sweeps=sweeps)
    other = quantize_rows(w, moments.damped, moments.factor, scheme, sweeps)
    assert [a.dtype for a in other.arrays()] == [a.dtype for a in ours.arrays()]
    assert [a.shape for a in other.arrays()] == [a.shape for a in ours.arrays()]
    assert loss(other, w, moments.damped) == pytest.approx(loss(ours, w, moments.damped), rel=0.03)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zeros_and_values_no_grid_can_hold(problem, scheme):
    w, h = problem
    moments = gptq.factorize(h)
    zeros = quantize_rows(np.zeros_like(w), moments.damped, moments.factor, scheme, 3)
    assert not dequantize(zeros).any()
    for value in (np.nan, np.inf, 1e6):
        bad = w.copy()
        bad[5, 100] = value
        with pytest.raises(ValueError, match="beyond float16"):
            quantize_rows(bad, moments.damped, moments.factor, scheme, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_gpu_gives_the_same_loss(problem, scheme):
    w, h = problem
    on_cpu, on_gpu = gptq.factorize(h), gptq.factorize(h.cuda())
    ours, other = gptq.quantize(w, on_cpu, scheme), gptq.quantize(w, on_gpu, scheme)
    assert loss(other, w, on_cpu.damped) == pytest.approx(loss(ours, w, on_cpu.damped), rel=0.03)
