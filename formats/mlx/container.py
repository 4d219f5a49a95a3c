"""MLX for mlx-lm: a folder of safetensors with a quantized model.

A quantized module is three tensors: ``weight`` (uint32, codes as a little-endian bit stream along
the row), ``scales`` and ``biases`` (float16), with ``w = scale * code + bias``. That is the affine
grid; the symmetric one is ``bias = -2 ** (bits - 1) * scale``, exact in float16. docs/mlx.md lists
files and names.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfmq.formats.bits import pack_codes
from lfmq.formats.build import (
    Assets,
    BuildLayout,
    Bytes,
    Segment,
    WidthScope,
    as_bytes,
    as_json,
    text_file,
)
from lfmq.formats.huggingface.card import Runtime, model_card
from lfmq.formats.huggingface.chat_template import build_files
from lfmq.formats.huggingface.end_tokens import stating_end_tokens
from lfmq.formats.huggingface.safetensors_layout import (
    FLOAT16_MAX,
    TensorLayout,
    pack_float,
    shard_files,
)
from lfmq.formats.mlx.names import NAMES, module_path
from lfmq.formats.mlx.reader import open_reader as open_reader
from lfmq.formats.plan import (
    Plan,
    Role,
    TensorPlan,
)
from lfmq.formats.schemes import Held, check_scheme
from lfmq.quant.errors import UnsupportedError
from lfmq.quant.types import Quantized, Scheme

NAME = "mlx"
SUFFIX = "-mlx"
WIDTHS: WidthScope = "stack"
_GROUPS = (32, 64, 128)
SCHEMES: Held = {
    "symmetric": dict.fromkeys((4, 8), _GROUPS),
    "affine_bias": dict.fromkeys((4, 5, 6, 8), _GROUPS),
}

# Activations take the dtype of norms and scales; the router's scores decide in float32.
_FLOAT16_ROLES = (Role.NORM, Role.CONV_KERNEL)
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Keys that would have mlx-lm load another class, or quantize otherwise.
_DROPPED = ("quantization", "quantization_config", "quantize_activations", "model_file")
_RUNTIME = Runtime(
    library="mlx",
    needs="mlx-lm 0.32.0 or later",
    how_to_run="""\
pip install mlx-lm
mlx_lm.generate --model FOLDER --prompt "..."
""",
)


def check(plan: Plan, assets: Assets) -> None:
    """Refuse what mlx-lm cannot hold or would compute otherwise.

    Raises:
        UnsupportedError: the setting or tensor, and what mlx-lm has.
    """
    g = plan.config
    if g.head_dim * g.num_attention_heads != g.hidden_size:
        raise UnsupportedError(
            f"config.json: head_dim {g.head_dim} x {g.num_attention_heads} heads is not "
            f"hidden_size {g.hidden_size}, which mlx-lm derives it from"
        )
    if not g.attention_layers or not g.conv_layers:
        raise UnsupportedError(
            "config.json: layer_types has only one kind, mlx-lm needs an attention and a conv "
            "layer"
        )
    if g.conv_L_cache < 2:
        raise UnsupportedError(
            f"config.json: conv_L_cache is {g.conv_L_cache}, with which mlx-lm's convolution "
            "cache keeps every token instead of none"
        )
    if not g.tie_word_embeddings:
        raise UnsupportedError(
            "lm_head.weight: differs from the embedding, mlx-lm's classes for LFM2 have no head "
            "but the embedding"
        )
    for entry in plan.entries:
        check_scheme(entry, SCHEMES, NAME)
    for _, entries in _modules(plan):
        _check_stack(entries)


def _check_stack(entries: tuple[TensorPlan, ...]) -> None:
    for entry in entries:
        if entry.storage != entries[0].storage:
            raise UnsupportedError(
                f"{entry.name}: {entry.storage} beside {entries[0].storage} of "
                f"{entries[0].name}; mlx stacks a layer's experts in one width"
            )


def layout(plan: Plan, assets: Assets) -> BuildLayout:
    """Safetensors files, index, config, the tokenizer's files and the model card."""
    return sharded_layout(plan, assets)


def sharded_layout(plan: Plan, assets: Assets, **options: int) -> BuildLayout:
    """As :func:`layout`, with ``shard_nbytes`` for files smaller than mlx-lm's 5 GiB."""
    tensors = [t for path, entries in _modules(plan) for t in _tensors(path, entries)]
    weights = sum(e.size for e in plan.entries)
    files = list(
        shard_files(tensors, metadata={"format": "mlx"}, total_parameters=weights, **options)
    )
    files.append(text_file("config.json", as_json(_config(plan, assets))))
    files.append(
        text_file("README.md", model_card(plan, assets, files, NAME, _RUNTIME, _stored_as))
    )
    taken = {file.path for file in files}
    files += [text_file(n, c) for n, c in sorted(build_files(assets).items()) if n not in taken]
    return BuildLayout(NAME, tuple(files))


def _modules(plan: Plan) -> Iterator[tuple[str, tuple[TensorPlan, ...]]]:
    """Module paths in file order with their entries; an expert stack has one for each expert."""
    modules: dict[str, list[TensorPlan]] = {}
    for entry in plan.entries:
        modules.setdefault(module_path(entry.name, plan.config.model_type)[0], []).append(entry)
    for path, entries in modules.items():
        yield path, tuple(entries)


def _tensors(path: str, entries: tuple[TensorPlan, ...]) -> Iterator[TensorLayout]:
    first = entries[0]
    stack = () if first.expert is None else (len(entries),)
    if first.scheme is None:
        dtype = _float_dtype(first)
        shape = first.shape
        if first.role is Role.CONV_KERNEL:  # [H, 1, L] becomes [H, L, 1], the same bytes
            shape = (shape[0], shape[2], 1)
        name = path if first.role is Role.EXPERT_BIAS else f"{path}.weight"
        yield _tensor(name, dtype, (*stack, *shape), entries, _pack_float)
        return
    *rows, columns = first.shape
    words, groups = columns * first.scheme.bits // 32, columns // first.scheme.group
    parts = (
        ("weight", "U32", words, _pack_codes),
        ("scales", "F16", groups, _pack_scales),
        ("biases", "F16", groups, _pack_biases),
    )
    for part, dtype, width, pack in parts:
        yield _tensor(f"{path}.{part}", dtype, (*stack, *rows, width), entries, pack)


def _tensor(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    entries: tuple[TensorPlan, ...],
    pack: Callable[[TensorPlan, Any], Bytes],
) -> TensorLayout:
    whole = TensorLayout(name, dtype, shape, ())
    nbytes = whole.nbytes // len(entries)
    segments = tuple(
        Segment(i * nbytes, nbytes, (e.name,), partial(pack, e), by_rows=True)
        for i, e in enumerate(entries)
    )
    return TensorLayout(name, dtype, shape, segments)


def _float_dtype(entry: TensorPlan) -> str:
    if entry.role in _FLOAT16_ROLES:
        return "F16"
    return _DTYPES[str(entry.storage)]


def _stored_as(entry: TensorPlan) -> str:
    """The entry's storage in the model card."""
    if entry.scheme is not None:
        return str(entry.scheme)
    dtype = _float_dtype(entry)
    return next(name for name, short in _DTYPES.items() if short == dtype)


def _config(plan: Plan, assets: Assets) -> dict[str, Any]:
    """The checkpoint's config with the scheme of every module; nothing is left to inference."""
    schemes: dict[str, Scheme | None] = {}
    for path, entries in _modules(plan):
        if entries[0].role not in (*_FLOAT16_ROLES, Role.EXPERT_BIAS):
            schemes[path] = entries[0].scheme
    counts = Counter(s for s in schemes.values() if s is not None)
    quantization: dict[str, Any] = {}
    if counts:
        quantization = _scheme_json(counts.most_common(1)[0][0]) | {
            path: False if scheme is None else _scheme_json(scheme)
            for path, scheme in schemes.items()
        }
    g = plan.config
    config = {k: v for k, v in assets.config_json.items() if k not in _DROPPED}
    config = stating_end_tokens(config, assets, g)
    config |= {"layer_types": list(g.layer_types)}
    if "full_attn_idxs" in config:  # read in place of layer_types
        config["full_attn_idxs"] = list(g.attention_layers)
    if "rope_theta" not in (config.get("rope_parameters") or {}):  # rope_scaling is not read
        config["rope_theta"] = g.rope_theta
    config |= NAMES[g.model_type].config(g)
    config.setdefault("conv_bias", False)
    if not quantization:
        return config
    return config | {"quantization": quantization, "quantization_config": quantization}


def _scheme_json(scheme: Scheme) -> dict[str, Any]:
    return {"group_size": scheme.group, "bits": scheme.bits, "mode": "affine"}


def _pack_codes(entry: TensorPlan, q: Quantized) -> Bytes:
    return pack_codes(np.ascontiguousarray(q.codes), q.scheme.bits)


def _pack_scales(entry: TensorPlan, q: Quantized) -> Bytes:
    return as_bytes(q.scale)


def _pack_biases(entry: TensorPlan, q: Quantized) -> Bytes:
    """The affine offset; symmetric: -2 ** (bits - 1) scales, exact unless that overflows."""
    if q.offset is not None:
        return as_bytes(q.offset)
    largest = float(np.abs(q.scale).max(initial=0))
    if largest * q.scheme.zero_point > FLOAT16_MAX:
        raise UnsupportedError(
            f"{entry.name}: a scale of {largest} is too large for mlx, whose float16 bias is "
            f"{q.scheme.zero_point} times it; use gguf or onnx"
        )
    return as_bytes(q.scale * np.float16(-q.scheme.zero_point))


def _pack_float(entry: TensorPlan, values: NDArray[np.float32]) -> Bytes:
    remedy = "that mlx stores it in; use gguf or onnx"
    return pack_float(entry, values, _float_dtype(entry), remedy)
