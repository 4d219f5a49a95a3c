"""Linear algebra of calibration: second moments, triangular inverses, ridge regression."""

import torch

# Columns whose products with all that follow are taken at once.
_COLUMNS_AT_ONCE = 512


def second_moments(x: torch.Tensor) -> torch.Tensor:
    """``x^T x`` [K, K] of inputs [T, K]; what is below the diagonal mirrors what is above."""
    columns = x.shape[1]
    moments = x.new_empty(columns, columns)
    for start in range(0, columns, _COLUMNS_AT_ONCE):
        part, rest = slice(start, start + _COLUMNS_AT_ONCE), slice(start + _COLUMNS_AT_ONCE, None)
        rows = x[:, part].T @ x[:, start:]
        moments[part, start:] = rows
        moments[rest, part] = rows[:, _COLUMNS_AT_ONCE:].T
    return moments


# Below this size the plain solver is as fast.
_SMALL = 128


def invert_lower(lower: torch.Tensor) -> torch.Tensor:
    """The inverse of a lower triangular matrix [K, K].

    For blocks [[A, 0], [B, C]] it is [[A', 0], [-C' B A', C']] with A' and C' the inverses of A
    and C (Golub and Van Loan, Matrix Computations, 4th edition, section 3.1.8 turned to products).
    """
    size = len(lower)
    if size <= _SMALL:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        solved: torch.Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
        return solved
    half = size // 2
    first, last = invert_lower(lower[:half, :half]), invert_lower(lower[half:, half:])
    inverse = torch.zeros_like(lower)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[half:, :half] = -(last @ (lower[half:, :half] @ first))
    return inverse


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
