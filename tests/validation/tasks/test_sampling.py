import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as theirs

from lfmq.quant.errors import ValidationError
from lfmq.validation.tasks.sampling import (
    PLAIN_CARD,
    THINKING_CARD,
    Sampling,
    card_sampling,
    draws,
    sample,
    stop_tokens,
)

VOCABULARY = 300


def with_files(assets, **files):
    names = {"template": "chat_template.jinja", "generation": "generation_config.json"}
    changed = {names[k]: v.encode() for k, v in files.items()}
    return replace(assets, files={**assets.files, **changed})


def probabilities(logits, prompt, s: Sampling) -> np.ndarray:
    """transformers' distribution of the next token."""
    steps = [theirs.RepetitionPenaltyLogitsProcessor(s.repetition_penalty)]
    steps.append(theirs.TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        steps.append(theirs.TopKLogitsWarper(s.top_k))
    steps += [theirs.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    steps += [theirs.MinPLogitsWarper(s.min_p)] if s.min_p else []
    scores = theirs.LogitsProcessorList(steps)(torch.tensor([prompt]), logits[None].clone())
    return torch.softmax(scores[0].double(), -1).numpy()


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(),
        THINKING_CARD,
        PLAIN_CARD,
        Sampling(temperature=1.7, top_k=5),
        Sampling(temperature=0.9, top_p=0.6),
        Sampling(temperature=1.2, top_k=40, top_p=0.9, min_p=0.1, repetition_penalty=1.3),
        Sampling(top_k=VOCABULARY + 5, repetition_penalty=0.8),
    ],
    ids=str,
)
def test_the_distribution_is_that_of_transformers(settings):
    """A fine grid of draws reaches each token as often as its probability says."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(VOCABULARY, generator=generator)
    prompt = [int(t) for t in torch.topk(logits, 3).indices] + [5, 9]
    n = 20_000
    seen = torch.zeros(1, VOCABULARY, dtype=torch.bool)
    seen[0, prompt] = True
    grid = (np.arange(n) + 0.5) / n
    tokens = sample(logits.expand(n, -1), seen.expand(n, -1), settings, grid)
    found = np.bincount(tokens, minlength=VOCABULARY) / n
    expected = probabilities(logits, prompt, settings)
    # a token's share of the grid is off by less than two of its points
    assert np.abs(found - expected).max() < 2 / n
    assert expected[tokens].min() > 0


def test_likely_tokens_come_first_and_ends_are_safe():
    logits = torch.tensor([[0.0, 2.0, 1.0, -9.0]])
    seen = torch.zeros(1, 4, dtype=torch.bool)
    settings = Sampling(top_k=3)
    assert sample(logits, seen, settings, np.array([0.0])) == [1]
    assert sample(logits, seen, settings, np.array([np.nextafter(1, 0)])) == [0]
    assert sample(logits, seen, Sampling(min_p=0.9), np.array([np.nextafter(1, 0)])) == [1]


def test_close_distributions_give_the_same_tokens():
    logits = 3 * torch.randn(2000, VOCABULARY, generator=torch.Generator().manual_seed(2))
    noise = 1e-4 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    seen, uniform = torch.zeros(logits.shape, dtype=torch.bool), draws(0, 1, 0, 2000)
    one, two = (sample(x, seen, THINKING_CARD, uniform) for x in (logits, logits + noise))
    assert np.mean(one == two) > 0.995


def test_draws_belong_to_a_task_and_a_run():
    assert np.array_equal(draws(0, 3, 1, 4), draws(0, 3, 1, 9)[:4])
    others = [draws(1, 3, 1, 4), draws(0, 4, 1, 4), draws(0, 3, 2, 4)]
    assert not any(np.array_equal(draws(0, 3, 1, 4), o) for o in others)


def test_settings_are_the_checkpoints_or_its_cards(tiny_assets):
    plain = with_files(tiny_assets, template="{{ messages[0].content.split('</think>')[-1] }}")
    assert card_sampling(tiny_assets) == THINKING_CARD
    assert card_sampling(plain) == PLAIN_CARD
    given = {"temperature": 0.3, "min_p": 0.15, "top_k": None, "do_sample": True}
    found = card_sampling(with_files(tiny_assets, generation=json.dumps(given)))
    assert found == Sampling(0.3, min_p=0.15, source="generation_config.json")
    names = Sampling.__dataclass_fields__.keys() - {"source"}
    assert names <= set(vars(GenerationConfig()))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", 0),
        ("temperature", "0.2"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 1.5),
        ("min_p", float("nan")),
        ("repetition_penalty", 0),
    ],
)
def test_settings_out_of_bounds_are_refused(tiny_assets, key, value):
    bad = with_files(tiny_assets, generation=json.dumps({key: value}))
    with pytest.raises(ValidationError, match=rf"generation_config.json: {key} is .*expected"):
        card_sampling(bad)


def test_stop_tokens(tiny_assets, tiny_config):
    assert stop_tokens(tiny_assets, tiny_config) == {4}
    listed = with_files(tiny_assets, generation='{"eos_token_id": [2, 7]}')
    assert stop_tokens(listed, tiny_config) == {2, 7}
    for bad in ("{}", '{"eos_token_id": null}', '{"eos_token_id": [true, -1]}'):
        assert stop_tokens(with_files(tiny_assets, generation=bad), tiny_config) == {4}
    bare = with_files(tiny_assets, generation="{}")
    none = replace(bare, files={}, config_json=bare.config_json | {"eos_token_id": None})
    with pytest.raises(ValidationError, match=r"no file names an end token"):
        stop_tokens(none, tiny_config)
