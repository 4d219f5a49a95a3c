"""The GPU body of the grids with an offset against the compiled kernels."""

import numpy as np
import pytest

from lfmq.quant import gptq
from lfmq.quant.types import Scheme, dequantize

GRIDS: tuple[str, ...] = ("affine_bias", "affine_zero_point")
SCHEMES = [Scheme(b, g, grid) for grid in GRIDS for b, g in ((4, 32), (4, 64), (8, 64))]
SCHEMES += [Scheme(5, 32, "affine_bias"), Scheme(6, 64, "affine_bias")]


@pytest.fixture(scope="module")
def problem_size() -> tuple[int, int]:
    return 256, 2000


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("sweeps", [0, 3])
def test_nearly_the_codes_of_the_compiled_kernels(problem, scheme, sweeps, loss_of):
    """A sum in another order decides a code at a boundary, and those after it in the row adapt."""
    w, h = problem
    moments = gptq.factorize(h)
    ours = gptq.quantize(w, moments, scheme, sweeps=sweeps)
    other = gptq.quantize(w, moments, scheme, sweeps=sweeps, body="torch")
    assert other.offset is not None
    assert ours.offset is not None
    assert other.offset.dtype == ours.offset.dtype
    assert loss_of(other, w, moments.damped) == pytest.approx(
        loss_of(ours, w, moments.damped), rel=0.02
    )
    if scheme.bits == 4 and not sweeps:
        first = slice(0, scheme.group)
        assert (ours.codes[:, first] == other.codes[:, first]).mean() > 0.98


@pytest.mark.parametrize("grid", GRIDS)
def test_zeros_and_values_no_grid_can_hold(problem, grid):
    w, h = problem
    moments, scheme = gptq.factorize(h), Scheme(4, 32, grid)
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
        loss_of(ours, w, on_cpu.damped), rel=0.02
    )
