"""A calibration set chosen from a larger pool, so that every expert gets the tokens it needs.

W windows, L MoE layers, E experts.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.jobs.batches import batches, steady_torch
from lfmq.converter.model.forward import Model, embed, run_layer
from lfmq.converter.model.text import Windows
from lfmq.converter.quantize.settings import QUOTA
from lfmq.quant.errors import ValidationError

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Shortage:
    """An expert that stays below its quota.

    Attributes:
        layer: of the model.
        expert: in the layer.
        tokens: it gets from the chosen windows.
        pool: it would get from all of them.
    """

    layer: int
    expert: int
    tokens: int
    pool: int


@dataclass(frozen=True, slots=True)
class Balanced:
    """A choice of windows.

    Attributes:
        windows: the chosen ones, in the order of the pool.
        pool: tokens they were chosen from.
        quota: tokens each expert should get.
        experts: how many there are in all layers.
        short: those that get fewer.
    """

    windows: Windows
    pool: int
    quota: int
    experts: int
    short: tuple[Shortage, ...]

    def to_json(self) -> dict[str, Any]:
        """The object ``balance`` of ``lfmq calibrate --json``."""
        short = [
            {"layer": s.layer, "expert": s.expert, "tokens": s.tokens, "pool": s.pool}
            for s in self.short
        ]
        return {"pool_tokens": self.pool, "quota": self.quota, "short": short}

    def __str__(self) -> str:
        """A line for the terminal."""
        line = (
            f"balance: {self.windows.tokens:,} of {self.pool:,} tokens, "
            f"{self.experts - len(self.short)} of {self.experts} experts have their "
            f"{self.quota:,} tokens"
        )
        if self.short:
            worst = min(self.short, key=lambda s: (s.tokens, s.layer, s.expert))
            beyond = sum(s.pool < self.quota for s in self.short)
            line += (
                f"; the fewest has layer {worst.layer}, expert {worst.expert}: {worst.tokens:,}; "
                f"for {beyond} the whole pool is too small"
            )
        return line


def balance(
    checkpoint: Checkpoint,
    pool: Windows,
    tokens: int,
    *,
    threads: int = 2,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Balanced:
    """Choose windows of a pool that bring every expert to ``QUOTA`` times its inputs in tokens.

    Args:
        checkpoint: whose router decides.
        pool: what to choose from.
        tokens: to choose, rounded down to whole windows, at least one.
        threads: batches at a time; the choice does not depend on it.
        device: where matrices are multiplied.
        progress: called with 1 and the number of layers after each layer.

    Raises:
        CheckpointError: a tensor cannot be read.
        ValidationError: the model has no experts, a hidden state is not finite, or a token is
            outside the vocabulary.
    """
    g = checkpoint.config
    if not g.moe_layers:
        raise ValidationError(
            f"{checkpoint.assets.name}: has no experts to choose the text for; leave --balance out"
        )
    loads = window_loads(checkpoint, pool, threads=threads, device=device, progress=progress)
    quota = QUOTA * g.hidden_size
    take = max(1, tokens // pool.ids.shape[1])
    chosen = choose_windows(loads, pool.domains, take, quota)
    got, whole = loads[chosen].sum(0), loads.sum(0)
    short = tuple(
        Shortage(g.moe_layers[layer], int(expert), int(got[layer, expert]), int(n))
        for layer, expert in np.argwhere(got < quota)
        for n in (whole[layer, expert],)
    )
    windows = replace(pool, ids=pool.ids[chosen], domains=tuple(pool.domains[i] for i in chosen))
    return Balanced(windows, pool.tokens, quota, got.size, short)


def window_loads(
    checkpoint: Checkpoint,
    pool: Windows,
    *,
    threads: int = 2,
    device: str = "cpu",
    progress: Progress | None = None,
) -> NDArray[np.int64]:
    """Tokens [W, L, E] of each window that the reference sends to each expert.

    One layer's weights and the hidden states of all windows are in memory.

    Raises:
        CheckpointError: a tensor cannot be read.
        ValidationError: a hidden state is not finite, or a token is outside the vocabulary.
    """
    g = checkpoint.config
    model = Model(g, checkpoint.read, device=device)
    count = len(pool.ids)
    loads = np.zeros((count, len(g.moe_layers), g.num_experts), np.int64)
    parts = batches(*pool.ids.shape)
    with steady_torch(), ThreadPoolExecutor(threads) as executor:
        states = embed(model, pool.ids)
        for layer in range(g.num_hidden_layers):
            done = list(executor.map(lambda p: run_layer(model, layer, states[p]), parts))  # noqa: B023
            states = torch.cat([output for output, _ in done])
            for part, (_, routing) in zip(parts, done, strict=True):
                if routing is not None:
                    windows = loads[part, g.moe_layers.index(layer)]
                    _count(routing.selected.cpu().numpy(), windows)
            if progress is not None:
                progress(1, g.num_hidden_layers)
    return loads


def _count(selected: NDArray[np.int64], into: NDArray[np.int64]) -> None:
    """Add the experts [T, k] that windows selected to their counts [W, E]."""
    windows = len(into)
    window = np.repeat(np.arange(windows), selected.size // windows)
    np.add.at(into, (window, selected.reshape(-1)), 1)


def choose_windows(
    loads: NDArray[np.int64], domains: tuple[str, ...], take: int, quota: int
) -> NDArray[np.int64]:
    """Indices of ``take`` windows (all, if there are fewer), ascending.

    Each is the one that takes most from the sum of the squares of what experts still miss, so that
    the emptiest weigh most, and the first of equals; when nothing is missing that any window has,
    the next come from the domains that have the fewest.

    Args:
        loads: [W, L, E].
        domains: of each window.
        take: how many windows.
        quota: tokens every expert should get.
    """
    flat = loads.reshape(len(loads), -1)
    missing = np.full(flat.shape[1], quota, np.int64)
    free = np.ones(len(flat), bool)
    chosen: list[int] = []
    per_domain = dict.fromkeys(domains, 0)
    while len(chosen) < min(take, len(flat)):
        covered = np.minimum(flat, missing)
        covers = np.where(free, (covered * (2 * missing - covered)).sum(1), -1)
        best = int(covers.argmax())
        if covers[best] == 0:
            best = min(np.flatnonzero(free).tolist(), key=lambda i: (per_domain[domains[i]], i))
        free[best] = False
        chosen.append(best)
        per_domain[domains[best]] += 1
        missing = np.maximum(missing - flat[best], 0)
    return np.sort(np.array(chosen, np.int64))
