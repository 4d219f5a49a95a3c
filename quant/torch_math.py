"""Arithmetic that the bodies for a GPU share, as the compiled kernels round."""

import torch

LARGEST = 65504.0  # largest float16


def divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The quotient, 0 where the divisor is 0."""
    return torch.where(b == 0, 0, a / b)


def inverse_of(s: torch.Tensor) -> torch.Tensor:
    """1 / s, 0 where that is 0."""
    return divide(torch.ones_like(s), s)


def half(values: torch.Tensor) -> torch.Tensor:
    """The nearest float16 that is finite, as float32."""
    return values.clamp(-LARGEST, LARGEST).half().float()
