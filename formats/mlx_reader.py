"""Reads an MLX build back under checkpoint names."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfmq.formats.hf_config import parse_geometry, read_config
from lfmq.formats.mlx_names import module_path
from lfmq.formats.safetensors_file import (
    StoredTensor,
    part_of,
    read_floats,
    read_header,
    read_tensor,
)
from lfmq.quant.errors import CheckpointError, ValidationError


class MlxReader:
    """An opened MLX folder; tensors stay on disk until read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            config = read_config(path)
            self.geometry = parse_geometry(config, path / "config.json")
            self._tensors: dict[str, StoredTensor] = {}
            for file in sorted(path.glob("model*.safetensors")):
                self._tensors |= read_header(file)
        except CheckpointError as error:
            raise ValidationError(str(error)) from error
        self._quantization: dict[str, Any] = config.get("quantization") or {}

    def read(self, name: str) -> NDArray[np.float32]:
        """The dequantized tensor, float32, in the checkpoint's shape.

        Raises:
            ValidationError: the build lacks it or is damaged.
        """
        path, expert = module_path(name)
        try:
            if f"{path}.scales" in self._tensors:
                return self._dequantize(path, expert)
            bare = path if name.endswith("expert_bias") else f"{path}.weight"
            values = read_floats(self._stored(bare, expert))
        except CheckpointError as error:
            raise ValidationError(str(error)) from error
        if name.endswith("conv.conv.weight"):  # stored as [H, L, 1]
            values = values.reshape(values.shape[0], 1, -1)
        return values

    def _stored(self, key: str, expert: int | None) -> StoredTensor:
        tensor = self._tensors.get(key)
        if tensor is None:
            raise ValidationError(f"{self._path}: tensor {key} is missing; write the build again")
        if expert is None:
            return tensor
        if not tensor.shape or expert >= tensor.shape[0]:
            raise ValidationError(f"{self._path}: {key} has no expert {expert}")
        return part_of(tensor, expert)

    def _dequantize(self, path: str, expert: int | None) -> NDArray[np.float32]:
        """``scale * code + bias`` in float32, which is exact for the symmetric grid."""
        words = read_tensor(self._stored(f"{path}.weight", expert))
        scales = read_floats(self._stored(f"{path}.scales", expert))[..., None]
        biases = read_floats(self._stored(f"{path}.biases", expert))[..., None]
        scheme = self._quantization.get(path) or self._quantization
        bits, group = scheme.get("bits"), scheme.get("group_size")
        groups = scales.shape[-2]
        if (
            bits not in (4, 8)
            or not isinstance(group, int)
            or words.shape[-1] * 32 != groups * group * bits
        ):
            raise ValidationError(
                f"{self._path}: config.json says {bits} bits in groups of {group} for {path}, "
                f"its weight has rows of {words.shape[-1]} words and {groups} scales"
            )
        codes = words.view(np.uint8)
        if bits == 4:
            codes = np.stack((codes & 15, codes >> 4), axis=-1)
        grouped = codes.reshape(*scales.shape[:-1], group).astype(np.float32)
        values: NDArray[np.float32] = grouped * scales + biases
        return values.reshape(*values.shape[:-2], -1)


def open_reader(path: Path) -> MlxReader:
    """Open a finished MLX folder.

    Raises:
        ValidationError: not a readable MLX build.
    """
    return MlxReader(path)
