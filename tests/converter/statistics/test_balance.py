"""Choosing windows for a calibration set in which every expert has its quota."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.checkpoint.locate import sample_file
from lfmq.converter.model.forward import Model, run_model
from lfmq.converter.model.text import load_windows
from lfmq.converter.statistics.balance import balance, choose_windows, window_loads
from lfmq.quant.errors import ValidationError


@pytest.fixture(scope="module")
def sample(sample_folder):
    return open_checkpoint(sample_folder)


@pytest.fixture(scope="module")
def pool(sample):
    path = sample_file("calibration.jsonl")
    return load_windows([path], sample.assets, sample.config, tokens=4096, sequence=128)


def test_loads_are_what_the_router_chose(sample, pool):
    loads = window_loads(sample, pool)
    routing = run_model(Model(sample.config, sample.read), pool.ids).routing
    assert loads.shape == (len(pool.ids), len(routing), sample.config.num_experts)
    for place, decided in enumerate(routing.values()):
        selected = decided.selected.numpy().reshape(len(pool.ids), -1)
        wanted = [np.bincount(row, minlength=loads.shape[2]) for row in selected]
        # other batches give other last bits: a tie may fall to the other side
        assert np.abs(loads[:, place] - wanted).sum() <= 4


def test_the_rare_experts_windows_are_found():
    """Expert 3 is in two windows of 40; a first-come choice of eight misses both."""
    rng = np.random.default_rng(0)
    loads = rng.integers(5, 9, (40, 1, 4))
    loads[:, 0, 3] = 0
    loads[[29, 33], 0, 3] = 10
    chosen = choose_windows(loads, ("a",) * 40, 8, 20)
    assert {29, 33} <= set(chosen.tolist())
    assert (loads[chosen].sum(0) >= 20).all()


def test_the_rest_keeps_domains_mixed():
    loads = np.full((12, 1, 2), 50)
    domains = ("a",) * 8 + ("b",) * 4
    chosen = choose_windows(loads, domains, 6, 10)
    assert [domains[i] for i in chosen].count("b") == 3


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 3), st.integers(1, 4), st.integers(1, 15),
    st.integers(0, 60), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_a_choice_is_a_subset_of_the_size_asked_for(windows, layers, experts, take, quota, seed):
    loads = np.random.default_rng(seed).integers(0, 20, (windows, layers, experts))
    domains = tuple("abc"[i % 3] for i in range(windows))
    chosen = choose_windows(loads, domains, take, quota)
    assert len(chosen) == len(set(chosen.tolist())) == min(take, windows)
    assert sorted(chosen.tolist()) == chosen.tolist()
    assert 0 <= chosen.min() <= chosen.max() < windows
    missing = (np.maximum(quota - loads, 0) ** 2).sum(axis=(1, 2))
    assert missing[chosen].min() == missing.min()  # the best one is in


def test_a_model_without_experts_is_refused(sample, pool):
    dense = replace(sample, config=replace(sample.config, num_dense_layers=6))
    with pytest.raises(ValidationError, match="has no experts to choose the text for"):
        balance(dense, pool, 1024)


def test_balanced_text_of_the_sample(sample, pool):
    one, two = (balance(sample, pool, 1024, threads=n) for n in (1, 2))
    assert np.array_equal(one.windows.ids, two.windows.ids)
    assert one.windows.tokens == 1024
    assert one.pool == pool.tokens
    assert one.quota == 2 * sample.config.hidden_size
    rows = {row.tobytes() for row in pool.ids}
    assert all(row.tobytes() in rows for row in one.windows.ids)
    loads = window_loads(sample, pool)
    got = window_loads(sample, one.windows).sum(0)
    assert got.min() > 2 * loads[:8].sum(0).min()  # of the emptiest expert
    assert len(one.short) == (got < one.quota).sum()
    for s in one.short:
        assert s.tokens < one.quota
        assert s.tokens <= s.pool
    assert "1,024 of 4,096 tokens" in str(one)
