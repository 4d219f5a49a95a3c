from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lfmq.validation.measure.routing import (
    Choices,
    compare_routing,
    jensen_shannon,
    same_sets,
)

LAYERS, WINDOWS, POSITIONS, EXPERTS, CHOSEN = (2, 5), 3, 4, 6, 2


def choices(seed: int, spread: float = 1.0) -> Choices:
    rng = np.random.default_rng(seed)
    shape = (WINDOWS, POSITIONS)
    selected = {
        n: np.argsort(rng.random((*shape, EXPERTS)), axis=-1)[..., :CHOSEN] for n in LAYERS
    }
    return Choices(selected, {n: rng.random(shape).astype(np.float32) * spread for n in LAYERS})


def one_layer(rows) -> Choices:
    selected = np.array(rows)[None]
    return Choices({7: selected}, {7: np.full(selected.shape[:2], 0.5, np.float32)})


def test_routing_counts_sets_not_order():
    reference = one_layer([[0, 1], [2, 3], [4, 5], [0, 5]])
    build = one_layer([[1, 0], [2, 5], [4, 5], [1, 2]])
    (found,) = compare_routing(reference, build, 6).layers
    assert found.layer == 7
    assert found.exact_set == 0.5
    assert found.jaccard == pytest.approx((1 + 1 / 3 + 1 + 0) / 4)
    load = np.array([2, 1, 1, 1, 1, 2]) / 8, np.array([1, 2, 2, 0, 1, 2]) / 8
    np.testing.assert_allclose(found.reference_load, load[0])
    np.testing.assert_allclose(found.load, load[1])
    middle = torch.from_numpy((load[0] + load[1]) / 2).log()
    halves = [F.kl_div(middle, torch.from_numpy(x), reduction="sum") / 2 for x in load]
    assert found.load_shift == pytest.approx(float(sum(halves)))
    assert found.experts == (0.5, 1.0, 1.0, 0.0, 1.0, 0.5)


def test_an_expert_the_reference_never_chose_has_no_agreement():
    (found,) = compare_routing(one_layer([[0, 1]]), one_layer([[0, 2]]), 3).layers
    assert found.experts[:2] == (1.0, 0.0)
    assert np.isnan(found.experts[2])


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_agreement_is_that_of_sets(first, second):
    reference, build = choices(first), choices(second)
    found = compare_routing(reference, build, EXPERTS, {2: 0.25, 5: 0.75})
    exact, jaccard = [], []
    for layer in found.layers:
        rows = zip(
            reference.selected[layer.layer].reshape(-1, CHOSEN),
            build.selected[layer.layer].reshape(-1, CHOSEN),
            strict=True,
        )
        pairs = [(set(map(int, a)), set(map(int, b))) for a, b in rows]
        exact.append(np.mean([a == b for a, b in pairs]))
        jaccard.append(np.mean([len(a & b) / len(a | b) for a, b in pairs]))
        for expert, share in enumerate(layer.experts):
            sent = [expert in b for a, b in pairs if expert in a]
            assert share == (
                pytest.approx(np.mean(sent)) if sent else pytest.approx(share, nan_ok=True)
            )
    assert found.exact_set == pytest.approx(np.mean(exact))
    assert found.jaccard == pytest.approx(np.mean(jaccard))
    assert found.local_exact_set == 0.5
    same = same_sets(reference, build, (WINDOWS, POSITIONS))
    assert same.mean() == pytest.approx(found.exact_set)


def test_margins_split_all_pairs_by_decade():
    reference, build = choices(1, spread=0.02), choices(1)
    reference.margin[2][0, 0] = 0.0
    build.selected[2][0, 0] = (build.selected[2][0, 0] + 1) % EXPERTS
    bins = compare_routing(reference, build, EXPERTS).margins
    assert sum(b.pairs for b in bins) == len(LAYERS) * WINDOWS * POSITIONS
    assert bins[0].low == 0
    assert all(a.high <= b.low for a, b in pairwise(bins))
    margins = np.concatenate([reference.margin[n].reshape(-1) for n in LAYERS])
    for found in bins:
        inside = (margins >= found.low) & (margins < found.high)
        assert found.pairs == inside.sum()
    assert bins[0].exact_set < 1
    assert all(b.exact_set == 1 for b in bins[1:])


def test_jensen_shannon_bounds():
    one, two = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert jensen_shannon(one, one) == 0
    assert jensen_shannon(one, two) == pytest.approx(np.log(2))
