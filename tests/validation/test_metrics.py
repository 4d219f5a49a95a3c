import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lfmq.validation.metrics import (
    Predictor,
    compare_routing,
    jensen_shannon,
    score_positions,
    scored_positions,
    standard_error,
)


@pytest.fixture
def predictors():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, 10, 16, generator=generator)
    head = torch.randn(40, 16, generator=generator)
    near = hidden + 0.1 * torch.randn(3, 10, 16, generator=generator)
    return Predictor(hidden, head), Predictor(near, head)


def test_scores_equal_torchs_losses_in_double(predictors):
    ids = np.random.default_rng(0).integers(0, 40, (3, 10))
    scores = score_positions(predictors[0], predictors[1], ids)
    assert scores.kld.shape == (3, 4)  # positions 5 to 8 of ten
    p, q = (F.log_softmax((m.hidden @ m.head.T).double(), -1)[:, 5:9] for m in predictors)
    expected = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(scores.kld, expected, atol=1e-5)
    losses = F.nll_loss(q.transpose(1, 2), torch.from_numpy(ids[:, 6:10]), reduction="none")
    np.testing.assert_allclose(scores.nll, losses, atol=1e-5)
    assert np.array_equal(scores.same_top, p.argmax(-1) == q.argmax(-1))


def test_chunks_do_not_change_scores(predictors, monkeypatch):
    ids = np.random.default_rng(0).integers(0, 40, (3, 10))
    whole = score_positions(predictors[0], predictors[1], ids)
    monkeypatch.setattr("lfmq.validation.metrics._LOGIT_BYTES", 1)
    split = score_positions(predictors[0], predictors[1], ids)
    np.testing.assert_allclose(split.kld, whole.kld, atol=1e-6)


def test_a_model_does_not_diverge_from_itself(predictors):
    ids = np.zeros((3, 10), np.int64)
    scores = score_positions(predictors[0], predictors[0], ids)
    assert (scores.kld == 0).all()
    assert scores.same_top.all()
    assert np.array_equal(scores.nll, scores.reference_nll)


def test_the_second_half_is_scored_as_llama_cpp_does():
    assert scored_positions(512) == slice(256, 511)


def test_routing_counts_sets_not_order():
    reference = torch.tensor([[0, 1], [2, 3], [4, 5], [0, 5]])
    build = torch.tensor([[1, 0], [2, 5], [4, 5], [1, 2]])
    found = compare_routing(7, reference, build, 6)
    assert found.layer == 7
    assert found.exact_set == 0.5
    assert found.jaccard == pytest.approx((1 + 1 / 3 + 1 + 0) / 4)
    load = np.array([2, 1, 1, 1, 1, 2]) / 8, np.array([1, 2, 2, 0, 1, 2]) / 8
    middle = torch.from_numpy((load[0] + load[1]) / 2).log()
    halves = [F.kl_div(middle, torch.from_numpy(x), reduction="sum") / 2 for x in load]
    assert found.load_shift == pytest.approx(float(sum(halves)))


def test_jensen_shannon_bounds():
    one, two = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert jensen_shannon(one, one) == 0
    assert jensen_shannon(one, two) == pytest.approx(np.log(2))


def test_standard_error_is_by_window():
    values = np.array([[1.0, 1.0], [3.0, 3.0]])
    assert standard_error(values) == pytest.approx(1.0)
    assert np.isnan(standard_error(values[:1]))
