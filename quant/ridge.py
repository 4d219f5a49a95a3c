"""Ridge regression of what a weight's outputs lack on its inputs."""

import torch

from lfmq.quant.triangular import invert_lower


def ridge_factor(moments: torch.Tensor, ridge: float) -> torch.Tensor | None:
    """The inverse L of the lower Cholesky factor of ``H + ridge * mean(diag(H)) * I``, [K, K].

    Args:
        moments: H, the second moments of a weight's inputs, [K, K].
        ridge: in units of the mean diagonal of H; it bounds the condition number by K / ridge,
            so float32 is enough.

    Returns:
        None without any input.
    """
    mean = torch.diagonal(moments).mean()
    if not mean > 0:
        return None
    h = moments.clone()
    torch.diagonal(h).add_(ridge * mean)
    return invert_lower(torch.linalg.cholesky(h))


def regression(factor: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
    """D with ``D (H + ridge * mean(diag(H)) * I) = missing``, [M, K].

    The least-squares answer to what is missing, drawn to zero by the ridge.

    Args:
        factor: of :func:`ridge_factor`; several weights with the same inputs share it.
        missing: sum over tokens of what is lacking times input, [M, K].
    """
    return (missing @ factor.T) @ factor


def step_toward(
    w: torch.Tensor, factor: torch.Tensor | None, missing: torch.Tensor
) -> torch.Tensor:
    """W + D, W [N, K], with D the regression of what its outputs lack, [N, K]."""
    return w if factor is None else w + regression(factor, missing)
