"""Run a GGUF in llama.cpp on given tokens and save the logits of every position.

usage: llama_cpp.py MODEL.gguf TOKENS.npy LOGITS.npy

Runs in a process of its own: a mismatch with the pinned library ends the process, not the tests.
The library's parameter structures are passed through unread, so only the few fields named here
depend on its version (xllamacpp 2026.10.11549).
"""

import ctypes
import sys

import numpy as np
import xllamacpp.xllamacpp


class Opaque(ctypes.Structure):
    """Parameters by value; larger than the library's own, which reads only its part."""

    _fields_ = [("content", ctypes.c_uint32 * 256)]


class Batch(ctypes.Structure):
    """llama_batch of llama.h."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def bind(library: ctypes.CDLL) -> None:
    """Declare the functions in use."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_model_default_params", Opaque, []),
        ("llama_context_default_params", Opaque, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, Opaque]),
        ("llama_init_from_model", pointer, [pointer, Opaque]),
        ("llama_batch_init", Batch, [integer, integer, integer]),
        ("llama_decode", integer, [pointer, Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, integer]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", integer, [pointer]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def main(model_path: str, tokens_path: str, logits_path: str) -> None:
    """See the module."""
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    bind(library)
    tokens = np.load(tokens_path).tolist()
    library.llama_backend_init()
    model = library.llama_model_load_from_file(
        model_path.encode(), library.llama_model_default_params()
    )
    if not model:
        sys.exit("the model did not load")
    params = library.llama_context_default_params()
    params.content[0] = params.content[1] = params.content[2] = 512  # n_ctx, n_batch, n_ubatch
    context = library.llama_init_from_model(model, params)
    batch = library.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    if library.llama_decode(context, batch) != 0:
        sys.exit("llama_decode failed")
    size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    rows = [
        np.ctypeslib.as_array(library.llama_get_logits_ith(context, i), (size,)).copy()
        for i in range(len(tokens))
    ]
    np.save(logits_path, np.stack(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
