"""Second moments of a weight's inputs."""

import torch

# Columns whose products with all that follow are taken at once.
_BLOCK = 512


def second_moments(x: torch.Tensor) -> torch.Tensor:
    """``x^T x`` [K, K] of inputs [T, K]; what is below the diagonal mirrors what is above."""
    columns = x.shape[1]
    moments = x.new_empty(columns, columns)
    for start in range(0, columns, _BLOCK):
        part, rest = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
        rows = x[:, part].T @ x[:, start:]
        moments[part, start:] = rows
        moments[rest, part] = rows[:, _BLOCK:].T
    return moments
