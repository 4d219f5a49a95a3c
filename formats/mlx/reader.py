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
    read_tensor,
    rows_of,
)
from lfmq.formats.huggingface.shards import read_build_tensors, refuse_others
from lfmq.formats.mlx.names import module_path
from lfmq.formats.plan import ModelConfig, Plan
from lfmq.quant.errors import CheckpointError, ValidationError, quoted

_LAYER = re.compile(r"model\.layers\.(\d+)\..*")
_BITS = (4, 5, 6, 8)
# Keys of ``quantization`` that are for all modules.
_FOR_ALL = ("group_size", "bits", "mode")


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
        except CheckpointError as error:
            raise ValidationError(str(error)) from error
        self._tensors = read_build_tensors(path)
        self._quantization = _quantization(path, config)
        self._legacy = config.get("quantization_config")

    def check(self, model: Plan) -> None:
        """The files hold the model's tensors as the config says, and no other.

        Raises:
            ValidationError: a tensor is missing, unexpected, or of another shape or type; the
                config quantizes a module that the model does not have.
        """
        if self._legacy not in (None, self._quantization):
            raise ValidationError(
                f"{self._path / 'config.json'}: quantization_config is not what quantization is; "
                "engines differ in which they read, write the build again"
            )
        expected: set[str] = set()
        modules: set[str] = set()
        for entry in model.entries:
            module, _ = module_path(entry.name, self.config.model_type)
            if module not in modules:
                modules.add(module)
                expected |= self._check_module(entry.name, entry.shape)
        refuse_others(self._tensors, expected)
        for key in self._quantization:
            if key not in _FOR_ALL and key not in modules:
                raise ValidationError(
                    f"{self._path / 'config.json'}: quantization has {quoted(key)}, which is no "
                    "module of the model; write the build again"
                )

    def _check_module(self, name: str, shape: tuple[int, ...]) -> set[str]:
        """The names of a module's tensors, which are as the config says; of all experts."""
        path, expert = module_path(name, self.config.model_type)
        entry = self._quantization.get(path)
        if not self._is_packed(path):
            if isinstance(entry, dict):
                raise ValidationError(
                    f"{self._path}: tensor {path}.scales is missing, config.json quantizes "
                    f"{path}; write the build again"
                )
            return {self._bare(name, path, expert, shape)[0]}
        if entry is False:
            raise ValidationError(
                f"{self._path / 'config.json'}: quantization of {path} is False, the file has its "
                "scales; write the build again"
            )
        self._packed(path, expert, shape)
        return {f"{path}.weight", f"{path}.scales", f"{path}.biases"}

    def _is_packed(self, path: str) -> bool:
        return f"{path}.scales" in self._tensors

    def is_float(self, name: str) -> bool:
        """Whether the tensor is stored as floats, not as integers with scales."""
        return not self._is_packed(module_path(name, self.config.model_type)[0])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """The dequantized tensor or a run of its rows, float32, in the checkpoint's shape.

        Raises:
            ValidationError: the build lacks it or is damaged.
        """
        path, expert = module_path(name, self.config.model_type)
        shape = _shape(name, self.config)
        if shape is None or (expert is not None and expert >= self.config.num_experts):
            raise ValidationError(f"{self._path}: tensor {name} is not part of this model")
        stop = shape[0] if stop is None else min(stop, shape[0])
        try:
            if self._is_packed(path):
                return self._dequantize(path, expert, shape, start, stop)
            _, tensor = self._bare(name, path, expert, shape)
            return read_floats(rows_of(tensor, start, stop)).reshape(stop - start, *shape[1:])
        except CheckpointError as error:
            raise ValidationError(str(error)) from error

    def _bare(
        self, name: str, path: str, expert: int | None, shape: tuple[int, ...]
    ) -> tuple[str, StoredTensor]:
        """A tensor stored as floats, and its name in the file."""
        bare = path if name.endswith("expert_bias") else f"{path}.weight"
        stored = (shape[0], shape[2], 1) if name.endswith("conv.conv.weight") else shape
        return bare, self._stored(bare, expert, stored, *FLOAT_DTYPES)

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

    def _packed(
        self, path: str, expert: int | None, shape: tuple[int, ...]
    ) -> tuple[_Grid, tuple[StoredTensor, StoredTensor, StoredTensor]]:
        """Codes, scales and biases, after checking that they are what the config implies."""
        *rows, columns = shape
        grid = self._grid(path, columns)
        words = (*rows, columns * grid.bits // 32)
        groups = (*rows, columns // grid.group)
        return grid, (
            self._stored(f"{path}.weight", expert, words, "U32"),
            self._stored(f"{path}.scales", expert, groups, *FLOAT_DTYPES),
            self._stored(f"{path}.biases", expert, groups, *FLOAT_DTYPES),
        )

    def _dequantize(
        self, path: str, expert: int | None, shape: tuple[int, ...], start: int, stop: int
    ) -> NDArray[np.float32]:
        """``scale * code + bias`` in float32; the product is exact, so is a symmetric sum."""
        grid, tensors = self._packed(path, expert, shape)
        codes, scale, bias = (rows_of(t, start, stop) for t in tensors)
        unpacked = unpack_codes(read_tensor(codes).view(np.uint8), grid.bits)
        values = unpacked.reshape(*scale.shape, grid.group).astype(np.float32)
        values *= read_floats(scale)[..., None]
        values += read_floats(bias)[..., None]
        return values.reshape(stop - start, *shape[1:])

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


def _quantization(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config's ``quantization``, where mlx-lm would find the same and nothing else."""
    source = folder / "config.json"
    for key in ("model_file", "quantize_activations", "compression_config"):
        if config.get(key):
            raise ValidationError(
                f"{source}: {key} is {quoted(config[key])}, with which mlx-lm would compute "
                "otherwise; write the build again"
            )
    if (other := folder / "hf_quant_config.json").exists():
        raise ValidationError(f"{other}: another quantization's file; take it away")
    quantization = config.get("quantization") or {}
    if not isinstance(quantization, dict):
        raise ValidationError(f"{source}: quantization is not an object; write the build again")
    return quantization


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
