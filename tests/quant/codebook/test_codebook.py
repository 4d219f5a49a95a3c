"""The codebook grid against its plain definition, against ggml, and in a GGUF build."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quant_shape_to_byte_shape
from numpy.typing import NDArray

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import parse_recipe
from lfmq.converter.quantize.rtn import quantize_entry
from lfmq.converter.run.convert import convert, plan_builds
from lfmq.formats.gguf.blocks import PACKERS, QUANT_TYPES
from lfmq.formats.registry import FORMATS
from lfmq.quant import gptq
from lfmq.quant.codebook.bodies import TARGETS
from lfmq.quant.codebook.spec import LEVELS
from lfmq.quant.rtn import quantize
from lfmq.quant.types import Quantized, Scheme, dequantize

F32 = NDArray[np.float32]
IQ4_NL = GGMLQuantizationType.IQ4_NL
SCHEME = Scheme(4, 32, "codebook")
TABLE = np.array(LEVELS, np.float32)
RECIPE = '[[rule]]\nbits = 8\n[[rule]]\nroles = ["experts"]\nbits = 4\ngrid = "codebook"\n'


def ratio(a: F32, b: F32) -> F32:
    """a / b, and 0 where b is 0; float32."""
    with np.errstate(all="ignore"):
        return np.where(b == 0, np.float32(0), a / b).astype(np.float32)


def codes_of(value: F32) -> NDArray[np.intp]:
    """The nearest level's index, of two as near the lower."""
    return np.searchsorted((TABLE[1:] + TABLE[:-1]) / 2, value)


def fit(x: F32, h: F32, inverse: F32) -> tuple[F32, F32]:
    """Sums of the least-squares scale, in order of the group."""
    q = TABLE[codes_of(x * inverse[:, None])]
    xq, qq = np.zeros(len(x), np.float32), np.zeros(len(x), np.float32)
    for j in range(x.shape[1]):
        hq = h[j] * q[:, j]
        xq, qq = xq + hq * x[:, j], qq + hq * q[:, j]
    return xq, qq


def definition(x: F32, h: F32) -> tuple[NDArray[np.intp], NDArray[np.float16]]:
    """The search in plain numpy: codes and float16 scale of groups [n, 32]."""
    peak = x[np.arange(len(x)), np.abs(x).argmax(1)]
    best, scale = np.full(len(x), -1, np.float32), np.zeros(len(x), np.float32)
    for target in TARGETS[4]:
        xq, qq = fit(x, h, ratio(np.full_like(peak, -target), peak))
        s = ratio(xq, qq)
        better = s * xq > best
        best, scale = np.where(better, s * xq, best), np.where(better, s, scale)
    one = np.ones_like(scale)
    half = ratio(*fit(x, h, ratio(one, scale))).astype(np.float16)
    return codes_of(x * ratio(one, half.astype(np.float32))[:, None]), half


@pytest.mark.parametrize("weighted", [False, True])
def test_equals_definition(weighted: bool) -> None:
    rng = np.random.default_rng(1)
    w = (rng.standard_normal((70, 96)) * np.exp(rng.normal(-4, 3, (70, 1)))).astype(np.float32)
    w[rng.random(w.shape) < 0.1] = 0
    h = rng.random(96).astype(np.float32) + 0.01 if weighted else np.ones(96, np.float32)
    q = quantize(w, SCHEME, h)
    for g in range(3):
        part = slice(32 * g, 32 * g + 32)
        codes, scale = definition(w[:, part], h[part])
        np.testing.assert_array_equal(q.codes[:, part], codes)
        np.testing.assert_array_equal(q.scale[:, g], scale)


def test_gguf_py_dequantizes_to_the_same() -> None:
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 16, (7, 64), np.uint8)
    scale = (rng.standard_normal((7, 2)) * 0.01).astype(np.float16)
    q = Quantized(codes, scale, SCHEME)
    block = PACKERS[QUANT_TYPES["codebook", 4]](q).reshape(7, -1)
    np.testing.assert_array_equal(gguf_dequantize(block, IQ4_NL), dequantize(q))


def test_less_squared_error_than_ggml(ggml: ctypes.CDLL) -> None:
    rng = np.random.default_rng(3)
    w = (rng.standard_normal((64, 512)) * 0.02).astype(np.float32)
    packed = np.empty(quant_shape_to_byte_shape(w.shape, IQ4_NL), np.uint8)
    floats = w.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    ggml.ggml_quantize_chunk(
        ctypes.c_int(IQ4_NL),
        floats,
        ctypes.c_void_p(packed.ctypes.data),
        *(ctypes.c_int64(n) for n in (0, *w.shape)),
        None,
    )
    theirs = np.square(gguf_dequantize(packed, IQ4_NL) - w).sum()
    ours = np.square(dequantize(quantize(w, SCHEME)) - w).sum()
    symmetric = np.square(dequantize(quantize(w, Scheme(4))) - w).sum()
    assert ours < 0.98 * theirs
    assert ours < 0.9 * symmetric


def test_no_single_level_lowers_the_loss_after_many_sweeps(weight, moments) -> None:
    """Coordinate descent over a table ends where each level is the best with all others fixed."""
    q = gptq.quantize(weight, moments, SCHEME, sweeps=60)
    h = moments.damped.numpy().astype(np.float64)
    gradient = (dequantize(q) - weight).astype(np.float64) @ h
    scale = np.repeat(q.scale.astype(np.float64), 32, 1)
    for direction in (-1, 1):
        code = q.codes.astype(int) + direction
        legal = (code >= 0) & (code < 16)
        change = (TABLE[code.clip(0, 15)] - TABLE[q.codes]) * scale
        gain = 2 * change * gradient + change**2 * np.diag(h)
        assert (gain[legal] > -1e-3 * np.abs(gain[legal]).mean()).mean() > 0.999


def test_a_build(sample_folder: Path, tmp_path: Path) -> None:
    """Experts on the grid from a recipe: refused by all but GGUF, read back exactly from it."""
    checkpoint, recipe = open_checkpoint(sample_folder), parse_recipe(RECIPE, "c", "a test")
    plan = resolve_plan(checkpoint.config, recipe)
    refused = {b.format: b.refused for b in plan_builds(checkpoint, plan, FORMATS)}
    assert refused.pop("gguf") is None
    for text in refused.values():
        assert text is not None
        assert text.endswith("the plan asks for 'codebook'; gguf can hold it")
    (done,) = convert(checkpoint, recipe, plan, {"gguf": FORMATS["gguf"]}, tmp_path)
    reader, found = FORMATS["gguf"].open_reader(done.path), set()
    for entry in plan.entries:
        weight = quantize_entry(checkpoint, entry)
        values = dequantize(weight) if isinstance(weight, Quantized) else weight
        np.testing.assert_array_equal(reader.read(entry.name), values, err_msg=entry.name)
        found.add(str(entry.storage))
    assert "iq4_nl" in found
    assert IQ4_NL in {t.tensor_type for t in GGUFReader(done.path).tensors}
