"""The inverse of a triangular matrix through products, which processors do best."""

import torch

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
