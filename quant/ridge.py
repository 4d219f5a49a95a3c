"""Ridge regression of what a weight's outputs lack on its inputs."""

import numpy as np
import torch
from numpy.typing import NDArray


def step_toward(
    w: torch.Tensor, moments: torch.Tensor, missing: torch.Tensor, ridge: float
) -> NDArray[np.float32]:
    """W + D with D the least-squares answer to what is missing, drawn to zero by the ridge.

    Solves ``D (H + ridge * mean(diag(H)) * I) = missing`` in float64. Without any input W itself.

    Args:
        w: [N, K].
        moments: H, the second moments of its inputs, [K, K].
        missing: sum over tokens of lacking output times input, [N, K].
        ridge: in units of the mean diagonal of H.
    """
    h = moments.double()
    mean = torch.diagonal(h).mean()
    if not mean > 0:
        return np.array(w.numpy())
    h = h + ridge * mean * torch.eye(len(h), dtype=h.dtype)
    step = torch.cholesky_solve(missing.double().T, torch.linalg.cholesky(h)).T
    stepped: NDArray[np.float32] = (w.double() + step).float().contiguous().numpy()
    return stepped
