"""What holds for every grid of the table, a new one included."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from lfmq.quant import gptq, rtn
from lfmq.quant.grids import ALIASES, GRIDS
from lfmq.quant.state import Body, bodies_of
from lfmq.quant.types import Quantized, Scheme, dequantize

SCHEMES = [
    Scheme(bits, groups[0], name)
    for name, grid in GRIDS.items()
    for bits, groups in grid.groups.items()
]
BODIES: tuple[Body, ...] = ("compiled", "torch")


@pytest.fixture(scope="module")
def problem_size() -> tuple[int, int]:
    return 512, 1500


def test_the_table() -> None:
    labels = {str(scheme) for scheme in SCHEMES}
    assert len(labels) == len(SCHEMES)
    assert not set(ALIASES) & set(GRIDS)
    for scheme in SCHEMES:
        grid = GRIDS[scheme.grid]
        assert scheme.span % scheme.group == 0
        assert scheme.bits < scheme.bits_per_weight < scheme.bits + 2
        assert set(bodies_of(grid).states) == set(BODIES)
        if grid.levels is not None:
            assert list(grid.levels) == sorted(grid.levels)
            assert len(grid.levels) == 2**scheme.bits


def test_data_needs_neither_numba_nor_torch() -> None:
    """So that a plan is made and checked before either is loaded."""
    program = (
        "import sys, lfmq.quant.rtn, lfmq.formats.registry\n"
        "print(sorted({'numba', 'llvmlite', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_weight_on_the_grid_is_what_it_dequantizes_to(scheme: Scheme, problem) -> None:
    """Codes at random make weights of which every one is scale times level and offset."""
    w, _ = problem
    q = rtn.quantize(w, scheme)
    rng = np.random.default_rng(3)
    codes = rng.integers(scheme.lowest_code, scheme.highest_code + 1, q.codes.shape, np.uint8)
    weight = Quantized(codes, q.scale, scheme, q.offset, q.sub_scale, q.sub_min)
    values, span = dequantize(weight), scheme.span
    assert values.shape == codes.shape
    assert np.isfinite(values).all()
    one = weight.map(lambda array: array[:, : array.shape[1] * span // w.shape[1]])
    np.testing.assert_array_equal(dequantize(one), values[:, :span])


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_each_stage_lowers_the_loss(scheme: Scheme, body, problem, loss_of) -> None:
    w, h = problem
    moments = gptq.factorize(h)
    found = [rtn.quantize(w, scheme)]
    found += [gptq.quantize(w, moments, scheme, sweeps=n, body=body) for n in (0, 3)]
    losses = [loss_of(q, w, moments.damped) for q in found]
    assert losses[1] < 0.8 * losses[0]
    assert losses[2] < losses[1]
    for q in found:
        assert (q.codes >= scheme.lowest_code).all()
        assert (q.codes <= scheme.highest_code).all()
        assert [a.dtype for a in q.arrays()] == [a.dtype for a in found[0].arrays()]


@pytest.mark.parametrize("sweeps", [0, 3])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_bodies_agree(scheme: Scheme, sweeps: int, problem, loss_of) -> None:
    """A sum in another order decides a code at a boundary, and those after it in the row adapt."""
    w, h = problem
    moments = gptq.factorize(h)
    one, other = (gptq.quantize(w, moments, scheme, sweeps=sweeps, body=body) for body in BODIES)
    assert loss_of(other, w, moments.damped) == pytest.approx(
        loss_of(one, w, moments.damped), rel=0.03
    )
    if scheme.bits == 4 and not sweeps and scheme.span == scheme.group:
        first = slice(0, scheme.group)
        assert (one.codes[:, first] == other.codes[:, first]).mean() > 0.98


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zeros_and_what_float16_lacks(scheme: Scheme, body, problem) -> None:
    w, h = problem
    moments = gptq.factorize(h)
    zeros = gptq.quantize(np.zeros_like(w), moments, scheme, body=body)
    assert not dequantize(zeros).any()
    assert not dequantize(rtn.quantize(np.zeros_like(w), scheme)).any()
    for value in (np.nan, np.inf, 1e6):
        bad = w.copy()
        bad[5, 300] = value
        for quantize in (rtn.quantize, lambda b, s: gptq.quantize(b, moments, s, body=body)):
            with pytest.raises(ValueError, match="NaN, Inf or beyond float16"):
                quantize(bad, scheme)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_gpu_gives_the_same_loss(scheme: Scheme, problem, loss_of) -> None:
    w, h = problem
    on_cpu, on_gpu = gptq.factorize(h), gptq.factorize(h.cuda())
    ours, other = gptq.quantize(w, on_cpu, scheme), gptq.quantize(w, on_gpu, scheme)
    assert loss_of(other, w, on_cpu.damped) == pytest.approx(
        loss_of(ours, w, on_cpu.damped), rel=0.03
    )
    assert torch.cuda.is_available()
