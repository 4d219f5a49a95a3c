"""Tells a checkpoint that is quantized already, by its config and by its tensors."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfmq.formats.huggingface.safetensors_file import StoredTensor
from lfmq.quant.errors import CheckpointError

# What quantizers put beside or in place of a weight: bitsandbytes, GPTQ and AWQ,
# compressed-tensors and FP8, MLX, MXFP4.
_COMPANION = re.compile(
    r"(?:[._](?:scales?|biases|blocks|absmax|quant_map|nested_absmax|nested_quant_map|SCB"
    r"|weight_format|qweight|qzeros|g_idx|qdata|zero_point|zeros"
    r"|(?:weight|input|output)_(?:scale\w*|zero_point|packed|shape|g_idx|global_scale))"
    r"|\.quant_state\.[\w.]+|:(?:qdata|scale))$"
)
_MLX = ".switch_mlp."
_REMEDY = "convert the original weights, in BF16, F16 or F32"


def refuse_quantized(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> None:
    """Refuse weights that are codes of some grid, or laid out for MLX.

    Args:
        folder: of the checkpoint.
        config: its ``config.json``.
        tensors: by their names in the files.

    Raises:
        CheckpointError: says by which method, where the config or the names tell.
    """
    for key in ("quantization_config", "compression_config", "quantization"):
        if block := config.get(key):
            method = block.get("quant_method") if isinstance(block, dict) else None
            if key == "quantization":
                method = "MLX"
            by = f" by {str(method)[:40]}" if method else ""
            raise CheckpointError(
                f"{folder / 'config.json'}: {key} says that the checkpoint is quantized{by}; "
                f"{_REMEDY}"
            )
    for name, tensor in tensors.items():
        if _COMPANION.search(name):
            raise CheckpointError(
                f"{tensor.path}: {name} belongs to a quantized weight; {_REMEDY}"
            )
        if _MLX in name:
            raise CheckpointError(
                f"{tensor.path}: {name} is laid out for MLX, perhaps quantized; {_REMEDY}"
            )
        if tensor.dtype.startswith(("F8_", "F6_", "F4")):
            raise CheckpointError(
                f"{tensor.path}: {name} has dtype {tensor.dtype}, it is quantized; {_REMEDY}"
            )
