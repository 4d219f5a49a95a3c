"""Choices within limits, against all choices tried."""

from itertools import product

import numpy as np
import pytest

from lfmq.converter.mixed_precision.knapsack import allocate


def tried(cost, takes, limits):
    """The least cost of all choices within the limits."""
    best, rows = np.inf, np.arange(len(cost))
    for choice in product(range(cost.shape[1]), repeat=len(cost)):
        c = np.array(choice)
        if (takes[:, rows, c].sum(1) <= limits).all():
            best = min(best, cost[rows, c].sum())
    return best


def instance(seed, units=6, choices=4, kinds=2):
    """Units of sizes of their own; more bytes cost less, as widths do."""
    rng = np.random.default_rng(seed)
    bits = np.array([4.5, 5.5, 6.5625, 8.5, 16])[:choices]
    size = rng.choice([1.0, 2.0, 3.0, 8.0], units)
    cost = rng.lognormal(size=(units, 1)) * size[:, None] * 4.0 ** -(bits - 4)
    read = np.where(rng.random(units) < 0.5, 1.0, 0.125)
    takes = np.stack([size[:, None] * bits, (size * read)[:, None] * bits])[:kinds]
    least, most = takes.min(-1).sum(-1), takes.max(-1).sum(-1)
    return cost, takes, least + rng.uniform(0.05, 0.95, kinds) * (most - least)


@pytest.mark.parametrize("kinds", [1, 2])
def test_it_is_the_best(kinds):
    for seed in range(60):
        cost, takes, limits = instance(seed, kinds=kinds)
        choice = allocate(cost, takes, limits)
        rows = np.arange(len(cost))
        assert (takes[:, rows, choice].sum(1) <= limits * (1 + 1e-9)).all()
        best = tried(cost, takes, limits)
        assert cost[rows, choice].sum() == pytest.approx(best, rel=1e-9)


def test_equal_units_are_taken_by_what_they_win():
    rng = np.random.default_rng(0)
    gain = rng.lognormal(size=40)
    cost = np.stack([gain, np.zeros(40)], 1)
    takes = np.broadcast_to([1.0, 2.0], (1, 40, 2))
    choice = allocate(cost, takes, np.array([53.5]))
    assert cost[np.arange(40), choice].sum() == pytest.approx(np.sort(gain)[: 40 - 13].sum())


def test_room_for_all_and_for_none():
    cost, takes, _ = instance(1)
    assert (allocate(cost, takes, np.array([1e9, 1e9])) == cost.argmin(1)).all()
    assert allocate(cost, takes, np.array([1e9, 1.0])) is None
    least = takes.min(-1).sum(-1)
    assert (allocate(cost, takes, least) == takes[0].argmin(1)).all()


def test_a_choice_that_a_unit_has_not():
    cost, takes, limits = instance(2)
    cost[3, 0] = np.inf
    choice = allocate(cost, takes, limits * 1.2)
    assert choice is not None
    assert choice[3] != 0
