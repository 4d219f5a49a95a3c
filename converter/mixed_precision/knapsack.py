"""One choice for each unit: the least cost within limits on what the choices take.

A multiple-choice knapsack with any number of limits. The price of each limit that balances it
(Lagrange multipliers) gives a choice close to the best and a bound on what is better; moves of
one unit and of two at once fill what it leaves, and a search over what the bound leaves open ends
it (``tests/converter/test_allocation.py`` holds it against all choices tried).

U units, C choices, L limits.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Choice = NDArray[np.int64]

# Steps of the search for prices, halving the interval or the step.
_HALVINGS = 60
_ROUNDS = 40
# Moves of one unit that are tried in pairs, the most telling ones.
_PAIRED = 600
# Partial choices that the last search keeps.
_KEPT = 2000


def allocate(cost: F64, takes: F64, limits: F64) -> Choice | None:
    """The choice [U] of least cost within the limits; None when no choice is.

    Args:
        cost: [U, C]; infinite where a unit has no such choice.
        takes: [L, U, C], what each choice takes of each limit.
        limits: [L], positive.
    """
    takes = np.where(np.isfinite(cost), takes / limits[:, None, None], np.inf)
    prices = _balance(cost, takes)
    best: Choice | None = None
    for start in _starts(cost, takes, prices):
        found = _improve(cost, takes, start)
        if best is None or _sum(cost, found) < _sum(cost, best):
            best = found
    return best if best is None else _search(cost, takes, prices, best)


def _starts(cost: F64, takes: F64, prices: F64) -> Iterator[Choice]:
    """Choices within the limits: what balanced prices give, with each limit weighed otherwise."""
    count = len(takes)
    weights = [np.full(count, 1 / count), *np.eye(count)] if count > 1 else [np.ones(1)]
    for weight in (prices / prices.sum() if prices.any() else weights[0], *weights):
        found = _within(cost, takes, weight)
        if found is not None:
            yield found


def _sum(values: F64, choice: Choice) -> float:
    return float(values[np.arange(len(choice)), choice].sum())


def _taken(takes: F64, choice: Choice) -> F64:
    found: F64 = takes[:, np.arange(len(choice)), choice].sum(-1)
    return found


def _fits(takes: F64, choice: Choice) -> bool:
    return bool((_taken(takes, choice) <= 1 + 1e-12).all())


def _at(cost: F64, takes: F64, prices: F64) -> Choice:
    """What each unit chooses when the limits have these prices."""
    paid = np.where(np.isfinite(cost), 0.0, np.inf)
    for price, take in zip(prices, takes, strict=True):
        paid = paid + price * np.where(np.isfinite(take), take, 0.0)
    chosen: Choice = np.argmin(cost + paid, axis=1)
    return chosen


def _within(cost: F64, takes: F64, weight: F64) -> Choice | None:
    """The cheapest choice within all limits among those at prices along ``weight``."""
    found = _at(cost, takes, weight * 0)
    if _fits(takes, found):
        return found
    finite = cost[np.isfinite(cost)]
    low, high = -40.0, 40.0  # of the price's logarithm, base e, times the largest cost
    scale = float(finite.max()) or 1.0
    found = _at(cost, takes, weight * scale * np.exp(high))
    if not _fits(takes, found):
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        tried = _at(cost, takes, weight * scale * np.exp(middle))
        if _fits(takes, tried):
            found, high = tried, middle
        else:
            low = middle
    return found


def _balance(cost: F64, takes: F64) -> F64:
    """Prices of the dual problem, by coordinate ascent: each the least that keeps its limit."""
    prices = np.zeros(len(takes))
    scale = float(cost[np.isfinite(cost)].max()) or 1.0
    for _ in range(_ROUNDS if len(takes) > 1 else 1):
        before = prices.copy()
        for index in range(len(takes)):
            prices[index] = 0.0
            if _taken(takes, _at(cost, takes, prices))[index] <= 1:
                continue
            low, high = -40.0, 40.0
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                prices[index] = scale * np.exp(middle)
                if _taken(takes, _at(cost, takes, prices))[index] <= 1:
                    high = middle
                else:
                    low = middle
            prices[index] = scale * np.exp(high)
        if np.allclose(before, prices, rtol=1e-6):
            break
    return prices


def _improve(cost: F64, takes: F64, choice: Choice) -> Choice:
    """Moves of one unit or of two that lower the cost, until none is left."""
    choice = choice.copy()
    rows = np.arange(len(choice))
    while True:
        gain = cost[rows, choice][:, None] - cost
        more = takes - takes[:, rows, choice][:, :, None]
        room = 1 + 1e-12 - _taken(takes, choice)
        fits = (more <= room[:, None, None]).all(0)
        single = np.where(fits, gain, 0.0)
        unit, to = divmod(int(single.argmax()), single.shape[1])
        if single[unit, to] > 0:
            choice[unit] = to
            continue
        pair = _best_pair(gain, more, room)
        if pair is None:
            return choice
        for unit, to in pair:
            choice[unit] = to


def _best_pair(gain: F64, more: F64, room: F64) -> tuple[tuple[int, int], ...] | None:
    """Two moves that fit together and win most; None when no two win anything."""
    width = gain.shape[1]
    possible = np.isfinite(gain) & ((gain != 0) | (more != 0).any(0))
    flat = np.flatnonzero(possible)
    winners = flat[gain.reshape(-1)[flat] > 0]
    savers = flat[(more.reshape(len(more), -1)[:, flat] < 0).any(0)]
    each, takes = gain.reshape(-1), more.reshape(len(more), -1)
    # a winner's claim and a saver's price, by what they move
    weight = np.maximum(takes, 0).sum(0)
    winners = winners[np.argsort(-each[winners] / (weight[winners] + 1e-30), kind="stable")]
    freed = np.maximum(-takes, 0).sum(0)
    savers = savers[np.argsort(-each[savers] / (freed[savers] + 1e-30), kind="stable")]
    winners, savers = winners[:_PAIRED], savers[:_PAIRED]
    if not len(winners) or not len(savers):
        return None
    total = each[winners][:, None] + each[savers][None]
    fits = winners[:, None] // width != savers[None] // width
    for take, left in zip(takes, room, strict=True):
        fits &= take[winners][:, None] + take[savers][None] <= left
    total = np.where(fits, total, 0.0)
    i, j = np.unravel_index(int(total.argmax()), total.shape)
    if total[i, j] <= 1e-15 * np.abs(each[winners]).max():
        return None
    return tuple((int(m) // width, int(m) % width) for m in (winners[i], savers[j]))


def _search(cost: F64, takes: F64, prices: F64, best: Choice) -> Choice:
    """The best choice that the bound leaves open, unit by unit, the likeliest ones kept."""
    paid = cost + (prices[:, None, None] * np.where(np.isfinite(takes), takes, 0.0)).sum(0)
    over = paid - paid.min(1, keepdims=True)  # what a choice costs beyond the bound
    bound = float(paid.min(1).sum() - prices.sum())
    gap = _sum(cost, best) - bound
    open_ = over < gap
    chosen = np.argmin(paid, axis=1)
    fixed = open_.sum(1) <= 1
    free = np.flatnonzero(~fixed)
    free = free[np.argsort(-np.nanmax(np.where(open_[free], takes[0][free], np.nan), 1))]
    if not len(free):
        return best
    state = np.zeros((1, 1 + len(takes)))
    state[0, 1:] = takes[:, np.flatnonzero(fixed), chosen[fixed]].sum(-1)
    path = np.empty((1, 0), np.int8)
    least = np.flip(np.cumsum(np.flip(takes[:, free].min(-1), -1), -1), -1)
    for index, unit in enumerate(free):
        to = np.flatnonzero(open_[unit]).astype(np.int8)
        step = np.concatenate([over[unit, to][None], takes[:, unit, to]]).T
        state = (state[:, None] + step[None]).reshape(-1, state.shape[1])
        rest = least[:, index + 1] if index + 1 < len(free) else 0.0
        keep = np.flatnonzero((state[:, 0] < gap) & (state[:, 1:] + rest <= 1 + 1e-12).all(1))
        keep = keep[np.argsort(state[keep, 0], kind="stable")[:_KEPT]]
        state = state[keep]
        path = np.concatenate([path[keep // len(to)], to[keep % len(to)][:, None]], 1)
    for found in path:
        choice = chosen.copy()
        choice[free] = found
        if _sum(cost, choice) < _sum(cost, best):
            best = choice
    return best
