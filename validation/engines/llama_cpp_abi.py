"""The C functions of llama.cpp, as the pinned release of the wheel xllamacpp exports them.

Structures follow llama.h and ggml.h of that release. They have no version of their own, so what is
taken from them is checked where it is used: parameters by their known defaults and by what the
context says of itself, tensors by the name of their type and the sizes that ggml gives.
"""

import ctypes
import os
from importlib.metadata import version
from typing import Any

from lfmq.quant.errors import ValidationError

EXTRA = "llama-cpp"
RELEASE = "2026.10.11549"
LOG_LEVEL_ERROR = 4

Pointer = ctypes.c_void_p
EvalCallback = ctypes.CFUNCTYPE(ctypes.c_bool, Pointer, ctypes.c_bool, Pointer)
LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, Pointer)
# Structures are passed by value: room for the part that is not named, of which only the callee
# knows the length.
_REST = ctypes.c_uint32 * 200


# llama_model_params up to what is set or checked here: fields and the release's defaults.
_MODEL: tuple[tuple[str, Any, float], ...] = (
    ("devices", Pointer, 0),
    ("tensor_buft_overrides", Pointer, 0),
    ("n_gpu_layers", ctypes.c_int32, -1),
    ("split_mode", ctypes.c_int32, 1),
    ("load_mode", ctypes.c_int32, -1),
    ("lazy_mode", ctypes.c_int32, 1),
    ("main_gpu", ctypes.c_int32, 0),
    ("tensor_split", Pointer, 0),
    ("progress_callback", Pointer, 0),
    ("progress_callback_user_data", Pointer, 0),
    ("kv_overrides", Pointer, 0),
    ("vocab_only", ctypes.c_bool, False),
    ("check_tensors", ctypes.c_bool, False),
    ("use_extra_bufts", ctypes.c_bool, True),
)


class ModelParams(ctypes.Structure):
    """llama_model_params."""

    _fields_ = [*((name, kind) for name, kind, _ in _MODEL), ("rest", _REST)]


# llama_context_params up to the types of the cache: fields and the release's defaults.
_CONTEXT: tuple[tuple[str, Any, float], ...] = (
    ("n_ctx", ctypes.c_uint32, 512),
    ("n_batch", ctypes.c_uint32, 2048),
    ("n_ubatch", ctypes.c_uint32, 512),
    ("n_seq_max", ctypes.c_uint32, 1),
    ("n_rs_seq", ctypes.c_uint32, 0),
    ("n_outputs_max", ctypes.c_uint32, 0),
    ("n_outputs_max_per_seq", ctypes.c_uint32, 1),
    ("n_threads", ctypes.c_int32, 4),
    ("n_threads_batch", ctypes.c_int32, 4),
    ("ctx_type", ctypes.c_int32, 0),
    ("rope_scaling_type", ctypes.c_int32, -1),
    ("pooling_type", ctypes.c_int32, -1),
    ("attention_type", ctypes.c_int32, -1),
    ("flash_attn_type", ctypes.c_int32, -1),
    ("rope_freq_base", ctypes.c_float, 0),
    ("rope_freq_scale", ctypes.c_float, 0),
    ("yarn_ext_factor", ctypes.c_float, -1),
    ("yarn_attn_factor", ctypes.c_float, -1),
    ("yarn_beta_fast", ctypes.c_float, -1),
    ("yarn_beta_slow", ctypes.c_float, -1),
    ("yarn_orig_ctx", ctypes.c_uint32, 0),
    ("defrag_thold", ctypes.c_float, -1),
    ("cb_eval", EvalCallback, 0),
    ("cb_eval_user_data", Pointer, 0),
    ("type_k", ctypes.c_int32, 1),  # GGML_TYPE_F16
    ("type_v", ctypes.c_int32, 1),
)


class ContextParams(ctypes.Structure):
    """llama_context_params."""

    _fields_ = [*((name, kind) for name, kind, _ in _CONTEXT), ("rest", _REST)]


class Batch(ctypes.Structure):
    """llama_batch; positions and sequences are counted by llama.cpp where they are null."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", Pointer),
        ("embd", Pointer),
        ("pos", Pointer),
        ("n_seq_id", Pointer),
        ("seq_id", Pointer),
        ("logits", Pointer),
    ]


class Tensor(ctypes.Structure):
    """ggml_tensor up to its sources."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", Pointer),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", Pointer * 10),
    ]


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_tensor_get": (None, [Pointer, Pointer, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_backend_tensor_set": (None, [Pointer, Pointer, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_get_name": (ctypes.c_char_p, [Pointer]),
    "ggml_nbytes": (ctypes.c_size_t, [Pointer]),
    "ggml_nelements": (ctypes.c_int64, [Pointer]),
    "ggml_type_name": (ctypes.c_char_p, [ctypes.c_int]),
    "llama_backend_init": (None, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_decode": (ctypes.c_int32, [Pointer, Batch]),
    "llama_free": (None, [Pointer]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [Pointer, ctypes.c_int32]),
    "llama_get_memory": (Pointer, [Pointer]),
    "llama_init_from_model": (Pointer, [Pointer, ContextParams]),
    "llama_log_set": (None, [LogCallback, Pointer]),
    "llama_memory_clear": (None, [Pointer, ctypes.c_bool]),
    "llama_model_default_params": (ModelParams, []),
    "llama_model_free": (None, [Pointer]),
    "llama_model_get_vocab": (Pointer, [Pointer]),
    "llama_model_load_from_file": (Pointer, [ctypes.c_char_p, ModelParams]),
    "llama_n_batch": (ctypes.c_uint32, [Pointer]),
    "llama_n_ctx": (ctypes.c_uint32, [Pointer]),
    "llama_n_ubatch": (ctypes.c_uint32, [Pointer]),
    "llama_set_n_threads": (None, [Pointer, ctypes.c_int32, ctypes.c_int32]),
    "llama_token_to_piece": (
        ctypes.c_int32,
        [Pointer, ctypes.c_int32, Pointer, ctypes.c_int32, ctypes.c_int32, ctypes.c_bool],
    ),
    "llama_tokenize": (
        ctypes.c_int32,
        [
            *(Pointer, ctypes.c_char_p, ctypes.c_int32, Pointer, ctypes.c_int32),
            *(ctypes.c_bool, ctypes.c_bool),
        ],
    ),
    "llama_version": (ctypes.c_char_p, []),
    "llama_vocab_n_tokens": (ctypes.c_int32, [Pointer]),
}


def load_library() -> ctypes.CDLL:
    """The wheel's library with its functions declared.

    Raises:
        ImportError: it is not installed.
        ValidationError: it is another release.
    """
    found = version("xllamacpp")
    if found != RELEASE:
        raise ValidationError(
            f"xllamacpp {found} is installed, lfmq knows the C structures of {RELEASE} only: "
            f"pip install 'lfmq[{EXTRA}]'"
        )
    os.environ["GGML_NO_BACKTRACE"] = "1"  # the last line of a crash is then its reason
    from xllamacpp import xllamacpp

    library = ctypes.CDLL(xllamacpp.__file__)
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def unlike(what: str) -> ValidationError:
    """The error of a structure or a graph that is not the pinned release's."""
    return ValidationError(
        f"llama.cpp's {what} is not what lfmq knows of xllamacpp {RELEASE}; install it again: "
        f"pip install --force-reinstall 'xllamacpp=={RELEASE}'"
    )


def default_model_params(library: ctypes.CDLL) -> ModelParams:
    """The library's defaults, after checking that they are where the release has them.

    Raises:
        ValidationError: they are not.
    """
    params: ModelParams = library.llama_model_default_params()
    if any((getattr(params, name) or 0) != default for name, _, default in _MODEL):
        raise unlike("llama_model_params")
    return params


def default_context_params(library: ctypes.CDLL) -> ContextParams:
    """The library's defaults, after checking that they are where the release has them.

    Raises:
        ValidationError: they are not.
    """
    params: ContextParams = library.llama_context_default_params()
    if any((getattr(params, name) or 0) != default for name, _, default in _CONTEXT):
        raise unlike("llama_context_params")
    return params
