"""The GPU body of K-quants against the compiled kernels."""

import numpy as np
import pytest

from lfmq.quant import gptq
from lfmq.quant.types import Scheme, dequantize

SCHEMES = [Scheme(b, g, "kquant") for b, g in ((4, 32), (5, 32), (6, 16))]


@pytest.fixture(scope="module")
def problem_size() -> tuple[int, int]:
    return 512, 3000


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("sweeps", [0, 3])
def test_the_loss_of_the_compiled_kernels(problem, scheme, sweeps, loss_of):
    """d and dmin start from the largest scales without a second fit: other codes, as good."""
    w, h = problem
    moments = gptq.factorize(h)
    ours = gptq.quantize(w, moments, scheme, sweeps=sweeps)
    other = gptq.quantize(w, moments, scheme, sweeps=sweeps, body="torch")
    assert [a.dtype for a in other.arrays()] == [a.dtype for a in ours.arrays()]
    assert [a.shape for a in other.arrays()] == [a.shape for a in ours.arrays()]
    assert loss_of(other, w, moments.damped) == pytest.approx(
        loss_of(ours, w, moments.damped), rel=0.03
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zeros_and_values_no_grid_can_hold(problem, scheme):
    w, h = problem
    moments = gptq.factorize(h)
    zeros = gptq.quantize(np.zeros_like(w), moments, scheme, sweeps=3, body="torch")
    assert not dequantize(zeros).any()
    for value in (np.nan, np.inf, 1e6):
        bad = w.copy()
        bad[5, 100] = value
        with pytest.raises(ValueError, match="beyond float16"):
            gptq.quantize(bad, moments, scheme, sweeps=3, body="torch")


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_gpu_gives_the_same_loss(problem, scheme, loss_of):
    w, h = problem
    on_cpu, on_gpu = gptq.factorize(h), gptq.factorize(h.cuda())
    ours, other = gptq.quantize(w, on_cpu, scheme), gptq.quantize(w, on_gpu, scheme)
    assert loss_of(other, w, on_cpu.damped) == pytest.approx(
        loss_of(ours, w, on_cpu.damped), rel=0.03
    )
