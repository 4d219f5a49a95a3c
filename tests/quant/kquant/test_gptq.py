"""GPTQ on K-quants against its plain definition, and the loss it lowers."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from lfmq.quant import gptq, rtn
from lfmq.quant.kquant.spec import KQUANT_BLOCK
from lfmq.quant.types import Scheme, dequantize

SCHEMES = [Scheme(b, g, "kquant") for b, g in ((4, 32), (5, 32), (6, 16))]


@pytest.fixture(scope="module")
def problem_size() -> tuple[int, int]:
    return 512, 2500


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_each_stage_lowers_the_output_error(scheme, weight, moments, damped_loss):
    nearest = damped_loss(weight, dequantize(rtn.quantize(weight, scheme)), moments)
    losses = [
        damped_loss(weight, dequantize(gptq.quantize(weight, moments, scheme, sweeps=n)), moments)
        for n in (0, 1, 2, 3, 8)
    ]
    assert losses[0] < 0.7 * nearest
    assert losses[1] < 0.97 * losses[0]
    # float32 gradients: a step that is worth less than their rounding may go wrong
    for before, after in pairwise(losses):
        assert after <= before * (1 + 1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_columns_make_up_for_those_before(scheme, weight, moments):
    """The plain definition, a column at a time in float64, under the scales that were chosen.

    They hold for blocks that the changes of all columns before have reached: the second
    superblock's codes are the plain algorithm's only when every product between blocks is right.
    """
    q = gptq.quantize(weight, moments, scheme, sweeps=0)
    assert q.sub_scale is not None
    size = np.repeat(q.scale, KQUANT_BLOCK // scheme.group, 1).astype(np.float64) * q.sub_scale
    base = np.zeros_like(size)
    if q.offset is not None and q.sub_min is not None:
        base = -np.repeat(q.offset, KQUANT_BLOCK // scheme.group, 1).astype(np.float64) * q.sub_min
    size, base = (np.repeat(v, scheme.group, 1) for v in (size, base))
    zero = 0 if scheme.has_offset else scheme.zero_point
    w, u = weight.astype(np.float64), moments.factor.double().numpy()
    same = []
    for c in range(w.shape[1]):
        code = np.clip(
            np.rint((w[:, c] - base[:, c]) / size[:, c]), -zero, 2**scheme.bits - 1 - zero
        )
        same.append(code + zero == q.codes[:, c])
        value = (q.codes[:, c].astype(np.float64) - zero) * size[:, c] + base[:, c]
        w[:, c + 1 :] -= np.outer((w[:, c] - value) / u[c, c], u[c, c + 1 :])
    # float32 sums decide a value at the boundary of two codes otherwise
    assert np.mean(same[:KQUANT_BLOCK]) > 0.999
    assert np.mean(same[KQUANT_BLOCK:]) > 0.999


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_single_change_lowers_the_loss_after_many_sweeps(scheme, weight, moments):
    """Coordinate descent ends where each code and step is the best with all others fixed."""
    q = gptq.quantize(weight, moments, scheme, sweeps=60)
    assert q.sub_scale is not None
    values, h = dequantize(q), moments.damped.numpy().astype(np.float64)
    gradient = (values - weight).astype(np.float64) @ h
    each, groups = KQUANT_BLOCK // scheme.group, weight.shape[1] // scheme.group
    d = np.repeat(q.scale, each, 1).astype(np.float64)
    size = np.repeat(d * q.sub_scale, scheme.group, 1)
    zero = 0 if scheme.has_offset else scheme.zero_point
    low, high = (0, 63) if scheme.has_offset else (-128, 127)
    levels = (q.codes.astype(np.float64) - zero).reshape(len(weight), groups, -1)
    for direction in (-1, 1):
        change = direction * size
        gain = 2 * change * gradient + change**2 * np.diag(h)
        code = q.codes.astype(int) + direction
        legal = (code >= 0) & (code < 2**scheme.bits)
        assert (gain[legal] > -1e-3 * np.abs(gain[legal]).mean()).mean() > 0.998
        along = levels * d[..., None] * direction
        blocks = h.reshape(groups, scheme.group, groups, scheme.group)
        curve = np.stack(
            [((along[:, i] @ blocks[i, :, i]) * along[:, i]).sum(1) for i in range(groups)], 1
        )
        gain = 2 * (along * gradient.reshape(levels.shape)).sum(-1) + curve
        step = q.sub_scale.astype(int) + direction
        legal = (step >= low) & (step <= high)
        assert (gain[legal] > -1e-3 * np.abs(gain[legal]).mean()).mean() > 0.98


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_and_scales_are_legal(scheme, weight, moments):
    q = gptq.quantize(weight, moments, scheme)
    assert q.sub_scale is not None
    assert q.codes.dtype == np.uint8
    assert q.codes.max() <= scheme.highest_code
    assert q.scale.dtype == np.float16
    assert q.scale.shape == (37, 2)
    assert np.isfinite(q.scale).all()
    assert q.sub_scale.dtype == np.int8
    assert q.sub_scale.shape == (37, 512 // scheme.group)
    if scheme.has_offset:
        assert q.offset is not None
        assert q.sub_min is not None
        assert q.offset.dtype == np.float16
        assert (q.offset >= 0).all()
        assert q.sub_scale.min() >= 0
        assert 0 <= q.sub_min.min() <= q.sub_min.max() <= 63
    again = gptq.quantize(weight, moments, scheme)
    for one, other in zip(q.arrays(), again.arrays(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dead", ["all", "some"])
def test_inputs_never_seen(scheme, dead, weight, inputs):
    h = inputs.T @ inputs
    if dead == "all":
        h = torch.zeros_like(h)
    else:
        h[:64], h[:, :64] = 0, 0
    q = gptq.quantize(weight, gptq.factorize(h), scheme)
    difference = dequantize(q) - weight
    assert np.isfinite(difference).all()
    nearest = np.square(dequantize(rtn.quantize(weight, scheme)) - weight)[:, :64].sum()
    assert np.square(difference)[:, :64].sum() < 1.2 * nearest


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rows_of_one_value(scheme, moments):
    """Zeros stay zeros; a constant stays near, through codes, steps and d of few digits."""
    zeros = gptq.quantize(np.zeros((3, 512), np.float32), moments, scheme)
    assert not dequantize(zeros).any()
    for value in (0.75, -0.75):
        w = np.full((3, 512), value, np.float32)
        assert np.abs(dequantize(gptq.quantize(w, moments, scheme)) - w).max() < 0.04


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("size", [2.0**-10, 1e4])
def test_small_and_large_weights(scheme, size, weight, moments, damped_loss):
    w = (weight * np.float32(size)).astype(np.float32)
    ours = damped_loss(w, dequantize(gptq.quantize(w, moments, scheme)), moments)
    nearest = damped_loss(w, dequantize(rtn.quantize(w, scheme)), moments)
    assert ours <= nearest


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_values_no_scale_can_hold_are_refused(scheme, value, weight, moments):
    bad = weight.copy()
    bad[3, 200] = value
    with pytest.raises(ValueError, match="NaN, Inf or beyond float16"):
        gptq.quantize(bad, moments, scheme)


def test_superblocks_must_divide_rows(weight):
    with pytest.raises(ValueError, match="groups of 256"):
        gptq.quantize(weight[:, :128].copy(), gptq.factorize(torch.eye(128)), SCHEMES[0])
