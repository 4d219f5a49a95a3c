"""Module paths of mlx-lm's ``lfm2_moe`` for tensors of the checkpoint.

They are those mlx-lm's own ``sanitize`` makes of a checkpoint (mlx_lm/models/lfm2_moe.py, 0.32).
"""

import re

_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_EXPERT = re.compile(r"(.*\.feed_forward)\.experts\.(\d+)\.(w[123])\.weight")
_DENSE = re.compile(r"(.*\.feed_forward)\.(w[123])\.weight")


def module_path(name: str) -> tuple[str, int | None]:
    """The module or parameter that holds a checkpoint tensor, and its place in an expert stack."""
    if expert := _EXPERT.fullmatch(name):
        prefix, index, part = expert.groups()
        return f"{prefix}.switch_mlp.{_PROJECTIONS[part]}", int(index)
    if dense := _DENSE.fullmatch(name):
        return f"{dense[1]}.{_PROJECTIONS[dense[2]]}", None
    return name.removesuffix(".weight"), None
