"""Reads a compressed-tensors build back, by the config's groups as engines resolve them.

Nothing is inferred from which tensors a file has: a pattern that misses its modules, or takes
others, is an error here as it is in an engine.
"""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lfmq.formats.bits import unpack_codes
from lfmq.formats.compressed_tensors.block import Group, names_module, read_block
from lfmq.formats.huggingface.config import parse_config, read_config
from lfmq.formats.huggingface.safetensors_file import (
    FLOAT_DTYPES,
    StoredTensor,
    read_floats,
    read_tensor,
    rows_of,
)
from lfmq.formats.huggingface.shards import read_build_tensors, refuse_others
from lfmq.formats.plan import ModelConfig, Plan
from lfmq.quant.errors import CheckpointError, ValidationError
from lfmq.quant.types import Scheme

_NAME = re.compile(r"model\.(?:layers\.(\d+)\.(?:.*\.experts\.(\d+)\.)?)?.*")
_CLASS = "Linear"  # what a module's class is called in a list of targets
# Keys beside the block that some engine takes for a quantization.
_FOREIGN = ("quantization", "compression_config", "quantize_activations")


class CompressedTensorsReader:
    """An opened compressed-tensors folder; tensors stay on disk until read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        source = path / "config.json"
        try:
            config = read_config(path)
            self.config = parse_config(config, source)
        except CheckpointError as error:
            raise ValidationError(str(error)) from error
        for key in _FOREIGN:
            if config.get(key) is not None:
                raise ValidationError(
                    f"{source}: {key} is set, which engines may compute with and lfmq does not "
                    "read; write the build again"
                )
        self._tensors = read_build_tensors(path)
        block = read_block(config, source)
        self._ignored, self._groups = block.ignored, block.groups

    def check(self, model: Plan) -> None:
        """The files hold the model's tensors as the config says, and no other.

        Raises:
            ValidationError: a tensor is missing, unexpected, or of another shape or type.
        """
        expected: set[str] = set()
        try:
            for entry in model.entries:
                expected |= self._check_entry(entry.name, entry.shape)
        except CheckpointError as error:
            raise ValidationError(str(error)) from error
        refuse_others(self._tensors, expected)

    def _check_entry(self, name: str, shape: tuple[int, ...]) -> set[str]:
        """The names of a weight's tensors, which are as the config says."""
        group = self._group_for(name, shape)
        if group is None:
            self._stored(name, shape, None, *FLOAT_DTYPES)
            return {name}
        self._packed(name, shape, group)
        return {f"{name}_packed", f"{name}_scale", f"{name}_shape"}

    def is_float(self, name: str) -> bool:
        """Whether the tensor is stored as floats, not as integers with scales."""
        return f"{name}_packed" not in self._tensors

    def _group_for(self, name: str, shape: tuple[int, ...]) -> Group | None:
        """The group of a weight; None for one that stays as floats."""
        is_linear = len(shape) == 2 and name != "model.embed_tokens.weight"
        return self._group_of(name.removesuffix(".weight")) if is_linear else None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """The dequantized tensor or a run of its rows, float32, in the checkpoint's shape.

        Raises:
            ValidationError: the build lacks it, is damaged, or its config speaks of it otherwise.
        """
        shape = _shape(name, self.config)
        if shape is None:
            raise ValidationError(f"{self._path}: tensor {name} is not part of this model")
        group = self._group_for(name, shape)
        stop = shape[0] if stop is None else stop
        try:
            if group is not None:
                return self._dequantize(name, shape, group, start, stop)
            tensor = self._stored(name, shape, None, *FLOAT_DTYPES)
            return read_floats(rows_of(tensor, start, stop))
        except CheckpointError as error:
            raise ValidationError(str(error)) from error

    def scheme(self, name: str) -> Scheme | None:
        """How the weight of a Linear is packed; None for one that stays as floats."""
        group = self._group_of(name.removesuffix(".weight"))
        return None if group is None else Scheme(group.bits, group.group)

    def _group_of(self, module: str) -> Group | None:
        """The group that a module belongs to; None for one that stays as floats.

        Engines look for its name in all groups before its class, the library takes the groups in
        their order; the two must agree.
        """
        if _CLASS in self._ignored or names_module(module, self._ignored):
            return None
        named = [g for g in self._groups if names_module(module, g.targets)]
        either = [g for g in self._groups if g in named or _CLASS in g.targets]
        if named and named[0] is not either[0]:
            raise ValidationError(
                f"{self._path / 'config.json'}: {module} is in {named[0].name} by name and in "
                f"{either[0].name}, which stands before it, by class; expected the group of "
                f"class {_CLASS} last, write the build again"
            )
        return either[0] if either else None

    def _stored(
        self, key: str, shape: tuple[int, ...], group: Group | None, *dtypes: str
    ) -> StoredTensor:
        """The tensor after checking that it is what the config implies."""
        tensor = self._tensors.get(key)
        if tensor is None:
            how = "as floats" if group is None else f"in {group.name}"
            raise ValidationError(
                f"{self._path}: tensor {key} is missing, config.json has the module {how}; write "
                "the build again"
            )
        if tensor.dtype not in dtypes or tensor.shape != shape:
            raise ValidationError(
                f"{tensor.path}: {key} is {tensor.dtype} {list(tensor.shape)}, expected "
                f"{' or '.join(dtypes)} {list(shape)}; write the build again"
            )
        return tensor

    def _packed(
        self, name: str, shape: tuple[int, ...], group: Group
    ) -> tuple[StoredTensor, StoredTensor]:
        """Codes and scales of a weight, after checking that they are what the config implies."""
        rows, columns = shape
        if columns % group.group:
            raise ValidationError(
                f"{self._path / 'config.json'}: {group.name} has groups of {group.group}, which "
                f"do not divide the {columns} columns of {name}; write the build again"
            )
        words, groups = (rows, columns * group.bits // 32), (rows, columns // group.group)
        packed = self._stored(f"{name}_packed", words, group, "I32")
        scale = self._stored(f"{name}_scale", groups, group, *FLOAT_DTYPES)
        stated = self._stored(f"{name}_shape", (2,), group, "I64")
        said = tuple(read_tensor(stated).tolist())
        if said != shape:
            raise ValidationError(
                f"{stated.path}: {name}_shape is {list(said)}, expected {list(shape)}; write the "
                "build again"
            )
        return packed, scale

    def _dequantize(
        self, name: str, shape: tuple[int, ...], group: Group, start: int, stop: int
    ) -> NDArray[np.float32]:
        """``scale * (code - 2 ** (bits - 1))`` in float32, which is exact."""
        packed, scale = (rows_of(t, start, stop) for t in self._packed(name, shape, group))
        codes = unpack_codes(read_tensor(packed).view(np.uint8), group.bits)
        values = codes.reshape(*scale.shape, group.group).astype(np.float32)
        values -= np.float32(2 ** (group.bits - 1))
        values *= read_floats(scale)[..., None]
        return values.reshape(scale.shape[0], shape[1])


# ---- the model


def _shape(name: str, g: ModelConfig) -> tuple[int, ...] | None:
    """The tensor's shape in the checkpoint; None for a name the model does not have."""
    if name == "lm_head.weight" and not g.tie_word_embeddings:
        return g.vocab_size, g.hidden_size
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    layer, expert = (None if n is None else int(n) for n in found.groups())
    if layer is not None and layer >= g.num_hidden_layers:
        return None
    if expert is not None and expert >= g.num_experts:
        return None
    width = g.moe_intermediate_size if expert is not None else g.intermediate_size
    hidden, heads, kv = g.hidden_size, g.num_attention_heads, g.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (g.vocab_size, hidden),
        "q_proj.weight": (heads * g.head_dim, hidden),
        "k_proj.weight": (kv * g.head_dim, hidden),
        "v_proj.weight": (kv * g.head_dim, hidden),
        "self_attn.out_proj.weight": (hidden, heads * g.head_dim),
        "layernorm.weight": (g.head_dim,),
        "norm.weight": (hidden,),
        "conv.in_proj.weight": (3 * hidden, hidden),
        "conv.out_proj.weight": (hidden, hidden),
        "conv.conv.weight": (hidden, 1, g.conv_L_cache),
        "feed_forward.gate.weight": (g.num_experts, hidden),
        "expert_bias": (g.num_experts,),
        "w1.weight": (width, hidden),
        "w2.weight": (hidden, width),
        "w3.weight": (width, hidden),
    }
    return next((shape for suffix, shape in shapes.items() if name.endswith(suffix)), None)


def open_reader(path: Path) -> CompressedTensorsReader:
    """Open a finished compressed-tensors folder.

    Raises:
        ValidationError: not a readable compressed-tensors build.
    """
    return CompressedTensorsReader(path)
