"""Every key of ``config.json`` with every awkward value: a geometry or one clear error."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from lfmq.formats.huggingface.config import parse_config, read_config
from lfmq.quant.errors import CheckpointError

SOURCE = Path("config.json")
AWKWARD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 3, 2**31, 2**70, 1.5, float("nan"), float("inf"), "", "x", "a\nb",
    [], [1], ["x"], [[]], {}, {"a": 1},
)  # fmt: skip
ABSENT = object()


@pytest.fixture
def config(tiny_assets):
    return tiny_assets.config_json


def places(document):
    for key, value in document.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *rest) for rest in places(value))
    for key in ("head_dim", "full_attn_idxs", "rope_theta", "rope_scaling", "tie_embedding"):
        yield (key,)


def changed(document, place, value):
    document = copy.deepcopy(document)
    at = document
    for key in place[:-1]:
        at = at[key]
    if value is ABSENT:
        at.pop(place[-1], None)
    else:
        at[place[-1]] = value
    return document


def test_any_value_gives_a_geometry_or_names_the_file(config):
    refused = []
    for place in places({k: v for k, v in config.items() if k != "model_type"}):
        for value in (*AWKWARD, ABSENT):
            try:
                parse_config(changed(config, place, value), SOURCE)
            except CheckpointError as error:
                refused.append(str(error))
    assert len(refused) > 200
    for message in refused:
        assert message.startswith("config.json: ")
        assert "\n" not in message
        assert len(message) < 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": "32"}, "head_dim is '32', expected an integer"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"hidden_size": 2, "num_attention_heads": 4}, "head_dim is 0"),
        ({"head_dim": 33}, "head_dim 33 is odd"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"norm_topk_prob": "false"}, "norm_topk_prob is 'false', expected true or false"),
        ({"use_expert_bias": 1}, "use_expert_bias is 1, expected true or false"),
        ({"routed_scaling_factor": "one"}, "routed_scaling_factor is 'one'"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor is 0.0, expected a positive"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], expected an object"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta is 1000"),
        ({"eos_token_id": 320}, "eos_token_id is 320, expected a token from 0 to 319"),
        ({"bos_token_id": -2}, "bos_token_id is -2"),
        ({"pad_token_id": True}, "pad_token_id is True"),
        ({"num_experts": 2**31 - 1}, "num_experts 2147483647 in each of 4 layers"),
        ({"layer_types": None, "full_attn_idxs": [1], "num_hidden_layers": 2**30}, "layer_types"),
        ({"num_dense_layers": 5}, "num_dense_layers exceeds"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_absurd_values_are_refused(config, change, message):
    with pytest.raises(CheckpointError, match=message):
        parse_config(config | change, SOURCE)


def test_the_first_of_several_end_tokens_counts(config):
    assert parse_config(config | {"eos_token_id": [7, 2]}, SOURCE).eos_token_id == 7
    assert parse_config(config | {"eos_token_id": []}, SOURCE).eos_token_id is None
    assert parse_config(config | {"pad_token_id": -1}, SOURCE).pad_token_id is None


def test_rope_theta_is_never_a_default(config):
    for rope in (None, {}, {"rope_type": "default"}):
        with pytest.raises(CheckpointError, match="rope_theta is None"):
            parse_config(config | {"rope_parameters": rope}, SOURCE)


def test_a_head_dim_of_its_own_is_kept(config):
    assert parse_config(config | {"head_dim": 48}, SOURCE).head_dim == 48
    assert parse_config(config | {"head_dim": None}, SOURCE).head_dim == 32


def test_what_could_not_be_written_again_is_refused(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config | {"note": "\ud800"}))
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_config(tmp_path)
