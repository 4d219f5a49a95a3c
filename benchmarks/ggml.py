"""ggml's own quantizers, from the library that libggml-python brings."""

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quant_shape_to_byte_shape
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def load_library() -> ctypes.CDLL:
    """libggml-base with the signature of ``ggml_quantize_chunk``."""
    spec = importlib.util.find_spec("libggml")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install libggml-python first")
    folder = Path(next(iter(spec.submodule_search_locations)))
    library = ctypes.CDLL(str(next(folder.rglob("libggml-base.so"))))
    floats = ctypes.POINTER(ctypes.c_float)
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, floats, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, floats,
    ]  # fmt: skip
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def round_trip(
    library: ctypes.CDLL, w: F32, kind: GGMLQuantizationType, importance: F32 | None
) -> F32:
    """A weight [N, K] quantized by ggml and dequantized by gguf-py."""
    w = np.ascontiguousarray(w, np.float32)
    packed = np.empty(quant_shape_to_byte_shape(w.shape, kind), np.uint8)
    pointer = ctypes.POINTER(ctypes.c_float)
    weights = None
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        weights = importance.ctypes.data_as(pointer)
    source = w.ctypes.data_as(pointer)
    library.ggml_quantize_chunk(kind, source, packed.ctypes.data, 0, *w.shape, weights)
    return np.asarray(dequantize(packed, kind), np.float32)
