"""Tensor names: from the checkpoint's to GGUF's, through gguf-py's own table for lfm2moe."""

import re

from gguf import TensorNameMap

_EXPERT = re.compile(r"^model\.(.*\.experts)\.(\d+)\.(.*)$")


def split_expert(name: str) -> tuple[str, int | None]:
    """A checkpoint name as the key of its (stacked) tensor, and the expert's place in it."""
    found = _EXPERT.match(name)
    if found is None:
        return name, None
    return f"{found[1]}.{found[3]}", int(found[2])


def tensor_name(key: str, names: TensorNameMap) -> str:
    """The GGUF name for a key of :func:`split_expert`."""
    if key.endswith(".expert_bias"):
        key += ".bias"
    name: str | None = names.get_name(key, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise ValueError(f"gguf-py has no lfm2moe tensor for {key}")
    return name
