"""Reads a compressed-tensors build back, by the config's groups as engines resolve them.

Nothing is inferred from which tensors a file has: a pattern that misses its modules, or takes
others, is an error here as it is in an engine.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfmq.formats.bits import unpack_codes
from lfmq.formats.compressed_tensors.config import METHOD, PACKED
from lfmq.formats.huggingface.config import parse_config, read_config
from lfmq.formats.huggingface.safetensors_file import (
    FLOAT_DTYPES,
    StoredTensor,
    read_floats,
    read_header,
    read_tensor,
)
from lfmq.formats.plan import ModelConfig
from lfmq.quant.errors import CheckpointError, ValidationError
from lfmq.quant.types import Scheme

_NAME = re.compile(r"model\.(?:layers\.(\d+)\.(?:.*\.experts\.(\d+)\.)?)?.*")
_CLASS = "Linear"  # what a module's class is called in a list of targets
_SCHEME = {"type": "int", "symmetric": True, "strategy": "group"}


@dataclass(frozen=True, slots=True)
class _Group:
    """A group of ``config_groups``, checked."""

    name: str
    targets: tuple[str, ...]
    bits: int
    group: int


class CompressedTensorsReader:
    """An opened compressed-tensors folder; tensors stay on disk until read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        source = path / "config.json"
        try:
            config = read_config(path)
            self.config = parse_config(config, source)
            self._tensors: dict[str, StoredTensor] = {}
            for file in sorted(path.glob("model*.safetensors")):
                self._tensors |= read_header(file)
        except CheckpointError as error:
            raise ValidationError(str(error)) from error
        block = _block(config, source)
        self._ignored = _patterns(block.get("ignore", []), "ignore", source)
        self._groups = _groups(block.get("config_groups"), source)

    def read(self, name: str) -> NDArray[np.float32]:
        """The dequantized tensor, float32, in the checkpoint's shape.

        Raises:
            ValidationError: the build lacks it, is damaged, or its config speaks of it otherwise.
        """
        shape = _shape(name, self.config)
        if shape is None:
            raise ValidationError(f"{self._path}: tensor {name} is not part of this model")
        is_linear = len(shape) == 2 and name != "model.embed_tokens.weight"
        group = self._group_of(name.removesuffix(".weight")) if is_linear else None
        try:
            if group is not None:
                return self._dequantize(name, shape, group)
            return read_floats(self._stored(name, shape, None, *FLOAT_DTYPES))
        except CheckpointError as error:
            raise ValidationError(str(error)) from error

    def scheme(self, name: str) -> Scheme | None:
        """How the weight of a Linear is packed; None for one that stays as floats."""
        group = self._group_of(name.removesuffix(".weight"))
        return None if group is None else Scheme(group.bits, group.group)

    def _group_of(self, module: str) -> _Group | None:
        """The group that a module belongs to; None for one that stays as floats.

        Engines look for its name in all groups before its class, the library takes the groups in
        their order; the two must agree.
        """
        if _CLASS in self._ignored or _names(module, self._ignored):
            return None
        named = [g for g in self._groups if _names(module, g.targets)]
        either = [g for g in self._groups if g in named or _CLASS in g.targets]
        if named and named[0] is not either[0]:
            raise ValidationError(
                f"{self._path / 'config.json'}: {module} is in {named[0].name} by name and in "
                f"{either[0].name}, which stands before it, by class; expected the group of "
                f"class {_CLASS} last, write the build again"
            )
        return either[0] if either else None

    def _stored(
        self, key: str, shape: tuple[int, ...], group: _Group | None, *dtypes: str
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

    def _dequantize(self, name: str, shape: tuple[int, ...], group: _Group) -> NDArray[np.float32]:
        """``scale * (code - 2 ** (bits - 1))`` in float32, which is exact."""
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
        codes = unpack_codes(read_tensor(packed).view(np.uint8), group.bits)
        values = codes.reshape(*groups, group.group).astype(np.float32)
        values -= np.float32(2 ** (group.bits - 1))
        values *= read_floats(scale)[..., None]
        return values.reshape(shape)


def _names(module: str, targets: tuple[str, ...]) -> bool:
    """Whether one of the targets is the module's path or a pattern that matches it."""
    return any(
        re.match(t.removeprefix("re:"), module) if t.startswith("re:") else t == module
        for t in targets
    )


# ---- the config


def _block(config: dict[str, Any], source: Path) -> dict[str, Any]:
    block = config.get("quantization_config")
    if not isinstance(block, dict):
        raise ValidationError(
            f"{source}: quantization_config is {_short(block)}, expected an object; this is not "
            f"a {METHOD} build"
        )
    for key, expected in (("quant_method", METHOD), ("format", PACKED)):
        if block.get(key) != expected:
            raise ValidationError(
                f"{source}: {key} of quantization_config is {_short(block.get(key))}, expected "
                f"{expected!r}; only {PACKED} builds can be read"
            )
    return block


def _groups(groups: Any, source: Path) -> tuple[_Group, ...]:
    if not isinstance(groups, dict) or not groups:
        raise ValidationError(
            f"{source}: config_groups is {_short(groups)}, expected an object of groups"
        )
    return tuple(_group(name, group, source) for name, group in groups.items())


def _group(name: str, group: Any, source: Path) -> _Group:
    fields = group if isinstance(group, dict) else {}
    weights = fields.get("weights")
    weights = weights if isinstance(weights, dict) else {}
    bits, size = weights.get("num_bits"), weights.get("group_size")
    if (
        type(bits) is not int
        or type(size) is not int
        or bits not in (4, 8)
        or size < 1
        or any(weights.get(key) != value for key, value in _SCHEME.items())
        or fields.get("input_activations") is not None
        or fields.get("format", PACKED) != PACKED
    ):
        found = {k: weights.get(k) for k in ("num_bits", "group_size", *_SCHEME)}
        raise ValidationError(
            f"{source}: {name} of config_groups is {_short(found if weights else group)}, "
            f"expected {PACKED} weights of type int, symmetric, in groups, 4 or 8 bits, and plain "
            "activations"
        )
    return _Group(name, _patterns(fields.get("targets"), f"targets of {name}", source), bits, size)


def _patterns(targets: Any, what: str, source: Path) -> tuple[str, ...]:
    """A list of module paths, class names and patterns, checked."""
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise ValidationError(f"{source}: {what} is {_short(targets)}, expected a list of texts")
    for target in targets:
        try:
            re.compile(target.removeprefix("re:"))
        except (re.error, RecursionError, OverflowError) as error:
            raise ValidationError(
                f"{source}: {what} has {_short(target)}, which is not a pattern ({error})"
            ) from error
    return tuple(targets)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


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
