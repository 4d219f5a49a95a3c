"""compressed-tensors ``pack-quantized`` for vLLM, SGLang and transformers: a safetensors folder.

A quantized module is three tensors (compressed-tensors 0.20, ``compressors/pack_quantized``):
``weight_packed`` (int32, codes as a little-endian bit stream along the row), ``weight_scale``
(float16) and ``weight_shape`` (int64). The signed value is ``code - 2 ** (bits - 1)``, which is
the symmetric grid, and the library adds the same offset to pack it: codes are stored as they are.
docs/compressed-tensors.md lists files and names.
"""

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
from lfmq.formats.compressed_tensors.config import (
    METHOD,
    NEEDED,
    linear_entries,
    quantization_config,
)
from lfmq.formats.compressed_tensors.config import engine_warnings as engine_warnings
from lfmq.formats.compressed_tensors.reader import open_reader as open_reader
from lfmq.formats.huggingface.card import Runtime, model_card
from lfmq.formats.huggingface.chat_template import build_files
from lfmq.formats.huggingface.end_tokens import stating_end_tokens
from lfmq.formats.huggingface.safetensors_layout import TensorLayout, pack_float, shard_files
from lfmq.formats.plan import (
    Plan,
    Role,
    TensorPlan,
)
from lfmq.formats.schemes import Held, check_scheme
from lfmq.quant.errors import UnsupportedError
from lfmq.quant.types import Quantized, Weight, dequantize

NAME = METHOD
SUFFIX = "-compressed-tensors"
WIDTHS: WidthScope = "layer"
# What engines have kernels for.
SCHEMES: Held = {"symmetric": dict.fromkeys((4, 8), (32, 64, 128))}

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Keys of other quantizations, which loaders would take for this one's or apply on top.
_DROPPED = ("quantization", "quantization_config", "quantize_activations", "compression_config")
_RUNTIME = Runtime(
    library="transformers",
    needs="vLLM 0.33, SGLang 0.5.23, or transformers with compressed-tensors 0.20",
    how_to_run="""\
vllm serve FOLDER --dtype float16
python -m sglang.launch_server --model-path FOLDER --dtype float16
""",
)
_ENGINES = """
## What engines load

Scales are float16; an engine that runs in bfloat16 rounds them to it. The embedding and the
head are plain in this format.

"""
_EVERY_ENGINE = "No weight of this build is stored in a way that an engine refuses.\n"


def check(plan: Plan, assets: Assets) -> None:
    """Refuse what the format, as engines read it, cannot hold.

    Raises:
        UnsupportedError: the tensor, and what engines load.
    """
    for entry in plan.entries:
        check_scheme(entry, SCHEMES, NAME)
    if all(entry.scheme is None for entry in linear_entries(plan)):
        raise UnsupportedError(
            "the recipe keeps every weight that compressed-tensors packs as floats; give experts "
            "or attention bits, or use the checkpoint as it is"
        )


def layout(plan: Plan, assets: Assets) -> BuildLayout:
    """Safetensors files, index, config, the tokenizer's files and the model card."""
    return sharded_layout(plan, assets)


def sharded_layout(plan: Plan, assets: Assets, **options: int) -> BuildLayout:
    """As :func:`layout`, with ``shard_nbytes`` for files smaller than the usual 5 GiB."""
    tensors = [t for entry in plan.entries for t in _tensors(entry)]
    weights = sum(e.size for e in plan.entries)
    files = list(
        shard_files(tensors, metadata={"format": "pt"}, total_parameters=weights, **options)
    )
    config = {k: v for k, v in assets.config_json.items() if k not in _DROPPED}
    config = stating_end_tokens(config, assets, plan.config)
    config |= NEEDED[plan.config.model_type](plan.config)
    config |= {"quantization_config": quantization_config(plan)}
    files.append(text_file("config.json", as_json(config)))
    card = model_card(plan, assets, files, NAME, _RUNTIME, _stored_as) + _engines(plan)
    files.append(text_file("README.md", card))
    taken = {file.path for file in files}
    files += [text_file(n, c) for n, c in sorted(build_files(assets).items()) if n not in taken]
    return BuildLayout(NAME, tuple(files))


def _engines(plan: Plan) -> bytes:
    """The card's last section: what to know before an engine loads the build."""
    warnings = "".join(f"- {line}\n" for line in engine_warnings(plan))
    return (_ENGINES + (warnings or _EVERY_ENGINE)).encode()


def _is_packed(entry: TensorPlan) -> bool:
    """Whether the codes are stored; engines want a plain embedding, and a plain head."""
    return entry.scheme is not None and entry.role not in (Role.EMBEDDING, Role.HEAD)


def _tensors(entry: TensorPlan) -> Iterator[TensorLayout]:
    scheme = entry.scheme
    if scheme is None or not _is_packed(entry):
        yield _tensor(entry, entry.name, _float_dtype(entry), entry.shape, _pack_float)
        return
    rows, columns = entry.shape
    yield _tensor(
        entry, f"{entry.name}_packed", "I32", (rows, columns * scheme.bits // 32), _pack_codes
    )
    yield _tensor(
        entry, f"{entry.name}_scale", "F16", (rows, columns // scheme.group), _pack_scale
    )
    yield _tensor(entry, f"{entry.name}_shape", "I64", (2,), _pack_shape)


def _tensor(
    entry: TensorPlan,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    pack: Callable[[TensorPlan, Any], Bytes],
) -> TensorLayout:
    nbytes = TensorLayout(name, dtype, shape, ()).nbytes
    by_rows = pack is not _pack_shape
    segment = Segment(0, nbytes, (entry.name,), partial(pack, entry), by_rows=by_rows)
    return TensorLayout(name, dtype, shape, (segment,))


def _float_dtype(entry: TensorPlan) -> str:
    return "F32" if entry.scheme is not None else _DTYPES[str(entry.storage)]


def _stored_as(entry: TensorPlan) -> str:
    """The entry's storage in the model card."""
    if entry.scheme is None or _is_packed(entry):
        return str(entry.storage)
    return f"float32, on the grid of {entry.scheme}"


def _pack_codes(entry: TensorPlan, q: Quantized) -> Bytes:
    return pack_codes(np.ascontiguousarray(q.codes), q.scheme.bits)


def _pack_scale(entry: TensorPlan, q: Quantized) -> Bytes:
    return as_bytes(q.scale)


def _pack_shape(entry: TensorPlan, q: Quantized) -> Bytes:
    """The weight's rows and columns, whatever its values."""
    return as_bytes(np.array(entry.shape, np.int64))


def _pack_float(entry: TensorPlan, weight: Weight) -> Bytes:
    values: NDArray[np.float32] = dequantize(weight) if isinstance(weight, Quantized) else weight
    remedy = 'that the recipe asks for; give it float = "bfloat16"'
    return pack_float(entry, values, _float_dtype(entry), remedy)
