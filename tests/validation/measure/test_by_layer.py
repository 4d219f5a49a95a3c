import numpy as np
import pytest

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.model.forward import Model
from lfmq.converter.model.text import load_windows
from lfmq.validation.measure.by_layer import attribute
from lfmq.validation.measure.runs import compare_model, run_reference

SEQUENCE = 64


@pytest.fixture(scope="module")
def sample(sample_folder):
    return open_checkpoint(sample_folder)


@pytest.fixture(scope="module")
def reference(sample, sample_folder):
    text = sample_folder.parent / "evaluation.jsonl"
    windows = load_windows(
        [text], sample.assets, sample.config, tokens=6 * SEQUENCE, sequence=SEQUENCE
    )
    return run_reference(Model(sample.config, sample.read), windows)


def changed(sample, *names, scale=1.1):
    def read(name):
        weight = sample.read(name)
        return weight * np.float32(scale) if name in names else weight

    return Model(sample.config, read)


def test_an_unchanged_build_costs_nothing(sample, reference):
    found = attribute(reference, Model(sample.config, sample.read), changed(sample))
    assert found.embedding_kld == 0
    assert [layer.kld_mean for layer in found.layers] == [0] * 6
    assert {expert.error for expert in found.experts} == {0.0}


def test_a_layer_alone_costs_what_it_costs_in_a_build_of_it_alone(sample, reference):
    weight = "model.layers.3.conv.out_proj.weight"
    build = changed(sample, weight, scale=1.3)
    found = attribute(reference, Model(sample.config, sample.read), build)
    klds = [layer.kld_mean for layer in found.layers]
    whole = compare_model(reference, build).scores.kld.mean()
    assert klds[3] == pytest.approx(whole, rel=1e-3)
    assert whole > 1e-4
    assert [kld for i, kld in enumerate(klds) if i != 3] == [0] * 5
    assert found.embedding_kld == 0


def test_the_embedding_alone(sample, reference):
    build = changed(sample, "model.embed_tokens.weight", scale=1.2)
    found = attribute(reference, Model(sample.config, sample.read), build)
    whole = compare_model(reference, build).scores.kld.mean()
    assert found.embedding_kld == pytest.approx(whole, rel=1e-3)
    assert [layer.kld_mean for layer in found.layers] == [0] * 6


def test_errors_of_experts_are_of_their_three_matrices(sample, reference):
    prefix = "model.layers.4.feed_forward.experts.5."
    names = [f"{prefix}{part}.weight" for part in ("w1", "w3", "w2")]
    build = changed(sample, names[0], names[2])
    found = attribute(reference, Model(sample.config, sample.read), build)
    w1, w3, w2 = (np.linalg.norm(sample.read(name).astype(float)) for name in names)
    (expert,) = [e for e in found.experts if e.error]
    assert (expert.layer, expert.expert) == (4, 5)
    assert expert.error == pytest.approx(0.1 * np.hypot(w1, w2) / np.hypot(w3, np.hypot(w1, w2)))
    chosen = reference.choices.selected[4]
    assert expert.tokens == (chosen == 5).sum()
    assert len(found.experts) == 4 * 16
