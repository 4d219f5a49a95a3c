import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lfmq.validation.measure.predictions import (
    Predictor,
    score_logits,
    score_positions,
    scored_positions,
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
    monkeypatch.setattr("lfmq.validation.measure.predictions._LOGIT_BYTES", 1)
    split = score_positions(predictors[0], predictors[1], ids)
    np.testing.assert_allclose(split.kld, whole.kld, atol=1e-6)


@pytest.mark.parametrize("block", [1, 2**27])
def test_logits_that_come_by_window_score_the_same(predictors, monkeypatch, block):
    monkeypatch.setattr("lfmq.validation.measure.predictions._LOGIT_BYTES", block)
    ids = np.random.default_rng(0).integers(0, 40, (3, 10))
    part = scored_positions(10)
    logits = (predictors[1].hidden @ predictors[1].head.T)[:, part].numpy()
    whole = score_positions(predictors[0], predictors[1], ids)
    streamed = score_logits(predictors[0], iter(logits), ids)
    for name in ("reference_nll", "nll", "kld"):
        np.testing.assert_allclose(getattr(streamed, name), getattr(whole, name), atol=1e-5)
    assert np.array_equal(streamed.same_top, whole.same_top)


def test_a_model_does_not_diverge_from_itself(predictors):
    ids = np.zeros((3, 10), np.int64)
    scores = score_positions(predictors[0], predictors[0], ids)
    assert (scores.kld == 0).all()
    assert scores.same_top.all()
    assert np.array_equal(scores.nll, scores.reference_nll)


def test_the_second_half_is_scored_as_llama_cpp_does():
    assert scored_positions(512) == slice(256, 511)
