"""GGUF for llama.cpp.

Names and metadata are what llama.cpp's loader for the model requires, blocks of weights those of
``lfmq.formats.gguf.blocks``; docs/gguf.md lists both.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quant_shape_to_byte_shape
from numpy.typing import NDArray

from lfmq.formats.build import (
    Assets,
    BuildLayout,
    Bytes,
    FileLayout,
    Segment,
    WidthScope,
    as_bytes,
)
from lfmq.formats.gguf.blocks import PACKERS, QUANT_TYPES, SCHEMES
from lfmq.formats.gguf.metadata import TensorHeader, header_bytes, tokenizer_vocabulary
from lfmq.formats.gguf.names import name_map, split_expert, tensor_name
from lfmq.formats.gguf.pretokenizer import text_rules
from lfmq.formats.gguf.reader import open_reader as open_reader
from lfmq.formats.plan import Plan, Role, TensorPlan
from lfmq.formats.schemes import check_scheme
from lfmq.quant.errors import UnsupportedError
from lfmq.quant.types import Scheme, Storage

NAME = "gguf"
SUFFIX = ".gguf"
WIDTHS: WidthScope = "stack"
ALIGNMENT = 32

_FLOAT_TYPES = {
    "float32": GGMLQuantizationType.F32,
    "float16": GGMLQuantizationType.F16,
    "bfloat16": GGMLQuantizationType.BF16,
}


@dataclass(frozen=True, slots=True)
class _Stack:
    """One tensor of the file: its entries (an expert stack has one an expert) and type."""

    name: str
    entries: tuple[TensorPlan, ...]
    type: GGMLQuantizationType

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.entries[0].shape
        if self.entries[0].role is Role.CONV_KERNEL:  # [H, 1, L] is stored as [H, L]
            shape = (shape[0], shape[2])
        return (len(self.entries), *shape) if self.entries[0].expert is not None else shape

    @property
    def byte_shape(self) -> tuple[int, ...]:
        return tuple(quant_shape_to_byte_shape(self.shape, self.type))

    @property
    def nbytes(self) -> int:
        return math.prod(self.byte_shape)


def check(plan: Plan, assets: Assets) -> None:
    """Refuse what llama.cpp's loader cannot express.

    Raises:
        UnsupportedError: the setting or tensor, and what llama.cpp has.
    """
    g = plan.config
    if not g.norm_topk_prob:
        raise UnsupportedError(
            "config.json: norm_topk_prob is false, llama.cpp always normalizes the routing "
            "weights of lfm2moe"
        )
    if g.routed_scaling_factor != 1.0:
        raise UnsupportedError(
            f"config.json: routed_scaling_factor is {g.routed_scaling_factor}, llama.cpp's "
            "lfm2moe has no such factor (1 is the only value)"
        )
    if g.head_dim * g.num_attention_heads != g.hidden_size:
        raise UnsupportedError(
            f"config.json: head_dim {g.head_dim} x {g.num_attention_heads} heads is not "
            f"hidden_size {g.hidden_size}, which llama.cpp derives it from"
        )
    tokenizer_vocabulary(assets, g.vocab_size)
    text_rules(assets, g.bos_token_id)
    for entry in plan.entries:
        check_scheme(entry, SCHEMES, NAME)
    for _ in _stacks(plan):
        pass


def _stacks(plan: Plan) -> Iterator[_Stack]:
    """The file's tensors in plan order; an expert stack stands where its first expert does."""
    names = name_map(plan.config)
    grouped: dict[str, list[TensorPlan]] = {}
    for entry in plan.entries:
        grouped.setdefault(split_expert(entry.name)[0], []).append(entry)
    for key, entries in grouped.items():
        first = entries[0]
        for entry in entries:
            if entry.storage != first.storage:
                raise UnsupportedError(
                    f"{entry.name}: {entry.storage} beside {first.storage} in one layer; GGUF "
                    "holds a layer's experts of one projection in one type"
                )
        yield _Stack(tensor_name(key, names), tuple(entries), _tensor_type(first))


def _tensor_type(entry: TensorPlan) -> GGMLQuantizationType:
    storage: Storage = entry.storage
    if isinstance(storage, Scheme):
        return QUANT_TYPES[storage.grid, storage.bits]
    return _FLOAT_TYPES[storage]


def layout(plan: Plan, assets: Assets) -> BuildLayout:
    """The one file of a GGUF build: header, metadata, tensor table, aligned tensor bytes."""
    stacks = list(_stacks(plan))
    zero_biases = _missing_biases(plan)
    headers = [TensorHeader(s.name, s.byte_shape, s.nbytes, s.type) for s in stacks]
    headers += [
        TensorHeader(name, (plan.config.num_experts * 4,), plan.config.num_experts * 4, None)
        for name in zero_biases
    ]
    header = header_bytes(plan, assets, headers, _file_type(stacks))
    offset = len(header)
    segments: list[Segment] = []
    for stack in stacks:
        segments += _stack_segments(stack, offset)
        offset += _padded(stack.nbytes)
    offset += sum(_padded(h.nbytes) for h in headers[len(stacks) :])
    file = FileLayout("", offset, ((0, header),), tuple(segments))
    return BuildLayout(NAME, (file,), single_file=True)


def _missing_biases(plan: Plan) -> list[str]:
    """The loader wants a selection bias even where the model has none; zeros change nothing."""
    if plan.config.use_expert_bias:
        return []
    return [f"blk.{layer}.exp_probs_b.bias" for layer in plan.config.moe_layers]


def _stack_segments(stack: _Stack, offset: int) -> Iterator[Segment]:
    nbytes = stack.nbytes // len(stack.entries)
    for entry in stack.entries:
        yield Segment(offset, nbytes, (entry.name,), _packer(entry), by_rows=True)
        offset += nbytes


def _packer(entry: TensorPlan) -> "partial[Bytes]":
    if isinstance(entry.storage, Scheme):
        return partial(PACKERS[_tensor_type(entry)])
    return partial(_pack_float, dtype=entry.storage)


def _file_type(stacks: list[_Stack]) -> GGMLQuantizationType:
    """The type most weights have; only shown to users, never read by the loader."""
    sizes: dict[GGMLQuantizationType, int] = {}
    for stack in stacks:
        sizes[stack.type] = sizes.get(stack.type, 0) + math.prod(stack.shape)
    return max(sizes, key=lambda t: sizes[t])


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _pack_float(values: NDArray[np.float32], dtype: str) -> Bytes:
    if dtype == "bfloat16":
        return as_bytes(values.astype(ml_dtypes.bfloat16))
    return as_bytes(values.astype(dtype))
