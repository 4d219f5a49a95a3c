"""Reads an MLX build back under checkpoint names, by the config's words and the files' headers.

Shapes follow from the config, as in mlx-lm, whose strict loading refuses any other.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfmq.formats.bits import unpack_codes
from lfmq.formats.huggingface.config import parse_config, read_config
from lfmq.formats.huggingface.safetensors_file import (
    FLOAT_DTYPES,
    StoredTensor,
    part_of,
    read_floats,
    read_header,
    read_tensor,
)
from lfmq.formats.mlx.names import module_path
from lfmq.formats.plan import ModelConfig
from lfmq.quant.errors import CheckpointError, ValidationError

_LAYER = re.compile(r"model\.layers\.(\d+)\..*")
_BITS = (4, 5, 6, 8)


@dataclass(frozen=True, slots=True)
class _Grid:
    """How a module is stored: ``quantization`` in config.json, checked."""

    bits: int
    group: int


class MlxReader:
    """An opened MLX folder; tensors stay on disk until read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            config = read_config(path)
            self.config = parse_config(config, path / "config.json")
            self._tensors: dict[str, StoredTensor] = {}
            for file in sorted(path.glob("model*.safetensors")):
                self._tensors |= read_header(file)
        except CheckpointError as error:
            raise ValidationError(str(error)) from error
        quantization = config.get("quantization") or {}
        if not isinstance(quantization, dict):
            raise ValidationError(
                f"{path / 'config.json'}: quantization is not an object; write the build again"
            )
        self._quantization: dict[str, Any] = quantization

    def read(self, name: str) -> NDArray[np.float32]:
        """The dequantized tensor, float32, in the checkpoint's shape.

        Raises:
            ValidationError: the build lacks it or is damaged.
        """
        path, expert = module_path(name, self.config.model_type)
        shape = _shape(name, self.config)
        if shape is None or (expert is not None and expert >= self.config.num_experts):
            raise ValidationError(f"{self._path}: tensor {name} is not part of this model")
        try:
            if f"{path}.scales" in self._tensors:
                return self._dequantize(path, expert, shape)
            bare = path if name.endswith("expert_bias") else f"{path}.weight"
            stored = (shape[0], shape[2], 1) if name.endswith("conv.conv.weight") else shape
            return read_floats(self._stored(bare, expert, stored, *FLOAT_DTYPES)).reshape(shape)
        except CheckpointError as error:
            raise ValidationError(str(error)) from error

    def _stored(
        self, key: str, expert: int | None, shape: tuple[int, ...], *dtypes: str
    ) -> StoredTensor:
        """The tensor, or one expert of it, after checking that it is what the config implies."""
        tensor = self._tensors.get(key)
        if tensor is None:
            raise ValidationError(f"{self._path}: tensor {key} is missing; write the build again")
        whole = shape if expert is None else (self.config.num_experts, *shape)
        if tensor.dtype not in dtypes or tensor.shape != whole:
            raise ValidationError(
                f"{tensor.path}: {key} is {tensor.dtype} {list(tensor.shape)}, expected "
                f"{' or '.join(dtypes)} {list(whole)}; write the build again"
            )
        return tensor if expert is None else part_of(tensor, expert)

    def _dequantize(
        self, path: str, expert: int | None, shape: tuple[int, ...]
    ) -> NDArray[np.float32]:
        """``scale * code + bias`` in float32; the product is exact, so is a symmetric sum."""
        *rows, columns = shape
        grid = self._grid(path, columns)
        words = (*rows, columns * grid.bits // 32)
        groups = (*rows, columns // grid.group)
        codes = read_tensor(self._stored(f"{path}.weight", expert, words, "U32")).view(np.uint8)
        scale = read_floats(self._stored(f"{path}.scales", expert, groups, *FLOAT_DTYPES))
        bias = read_floats(self._stored(f"{path}.biases", expert, groups, *FLOAT_DTYPES))
        values = unpack_codes(codes, grid.bits).reshape(*groups, grid.group).astype(np.float32)
        values *= scale[..., None]
        values += bias[..., None]
        return values.reshape(shape)

    def _grid(self, path: str, columns: int) -> _Grid:
        """The module's own entry in the config, else the one for all."""
        entry = self._quantization.get(path, self._quantization)
        fields = entry if isinstance(entry, dict) else {}
        bits, group = fields.get("bits"), fields.get("group_size")
        if (
            isinstance(bits, int)
            and bits in _BITS
            and isinstance(group, int)
            and group > 0
            and columns % group == 0
            and fields.get("mode", "affine") == "affine"
        ):
            return _Grid(bits, group)
        said = {key: fields.get(key) for key in ("bits", "group_size", "mode")}
        raise ValidationError(
            f"{self._path / 'config.json'}: quantization of {path} is "
            f"{str(said if fields else entry)[:100]}, expected 4, 5, 6 or 8 bits, mode "
            f"affine, in groups that divide {columns}"
        )


def _shape(name: str, g: ModelConfig) -> tuple[int, ...] | None:
    """The tensor's shape in the checkpoint; None for a name the model does not have."""
    layer = _LAYER.fullmatch(name)
    dense = layer is not None and int(layer[1]) < g.num_dense_layers
    width = g.intermediate_size if dense else g.moe_intermediate_size
    hidden, heads, kv = g.hidden_size, g.num_attention_heads, g.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (g.vocab_size, hidden),
        "q_proj": (heads * g.head_dim, hidden),
        "k_proj": (kv * g.head_dim, hidden),
        "v_proj": (kv * g.head_dim, hidden),
        "self_attn.out_proj": (hidden, heads * g.head_dim),
        "layernorm": (g.head_dim,),
        "norm": (hidden,),
        "conv.in_proj": (3 * hidden, hidden),
        "conv.out_proj": (hidden, hidden),
        "conv.conv": (hidden, 1, g.conv_L_cache),
        "feed_forward.gate": (g.num_experts, hidden),
        "expert_bias": (g.num_experts,),
        "w1": (width, hidden),
        "w2": (hidden, width),
        "w3": (width, hidden),
    }
    bare = name.removesuffix(".weight")
    return next((shape for suffix, shape in shapes.items() if bare.endswith(suffix)), None)


def open_reader(path: Path) -> MlxReader:
    """Open a finished MLX folder.

    Raises:
        ValidationError: not a readable MLX build.
    """
    return MlxReader(path)
