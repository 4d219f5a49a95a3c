"""A weight and inputs like hidden states, and what a rounding of the weight loses on them.

A module of tests has as many columns and tokens as its fixture ``problem_size`` says.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from lfmq.quant import gptq
from lfmq.quant.types import Quantized, dequantize


@pytest.fixture(scope="module")
def problem_size() -> tuple[int, int]:
    return 256, 1500


@pytest.fixture(scope="module")
def weight(problem_size) -> np.ndarray:
    return (np.random.default_rng(1).standard_normal((37, problem_size[0])) * 0.05).astype(
        np.float32
    )


@pytest.fixture(scope="module")
def inputs(problem_size) -> torch.Tensor:
    """Correlated inputs of very different size and of no zero mean, as hidden states are."""
    columns, tokens = problem_size
    rng = np.random.default_rng(2)
    mix = rng.standard_normal((columns, columns)) * np.exp(rng.standard_normal(columns))
    mean = rng.standard_normal(columns) * 10
    return torch.from_numpy(rng.standard_normal((tokens, columns)) @ mix + mean).float()


@pytest.fixture(scope="module")
def moments(inputs) -> gptq.FactorizedHessian:
    return gptq.factorize(inputs.T @ inputs)


@pytest.fixture(scope="module")
def damped_loss() -> Callable[[np.ndarray, np.ndarray, gptq.FactorizedHessian], float]:
    """tr((Q - W) H (Q - W)^T) of W and Q under the moments that the algorithm is given."""

    def loss(w: np.ndarray, values: np.ndarray, moments: gptq.FactorizedHessian) -> float:
        d = torch.from_numpy(values - w).double()
        return float(((d @ moments.damped.double()) * d).sum())

    return loss


@pytest.fixture(scope="module")
def problem(problem_size) -> tuple[np.ndarray, torch.Tensor]:
    """A weight and moments of mildly correlated inputs."""
    columns, tokens = problem_size
    rng = np.random.default_rng(3)
    w = (rng.standard_normal((80, columns)) * 0.05).astype(np.float32)
    mix = rng.standard_normal((columns, columns)) * 0.3 + np.eye(columns)
    x = rng.standard_normal((tokens, columns)) @ mix
    return w, torch.from_numpy((x.T @ x).astype(np.float32))


@pytest.fixture(scope="module")
def loss_of() -> Callable[[Quantized, np.ndarray, torch.Tensor], float]:
    """tr((Q - W) H (Q - W)^T) of a quantized weight."""

    def loss(q: Quantized, w: np.ndarray, h: torch.Tensor) -> float:
        d = torch.from_numpy(dequantize(q) - w).double()
        return float(((d @ h.double()) * d).sum())

    return loss
