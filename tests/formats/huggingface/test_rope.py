"""Plain rotary embeddings are read as transformers standardizes them, scaled ones refused."""

from pathlib import Path

import pytest

from lfmq.formats.huggingface.config import parse_config
from lfmq.quant.errors import CheckpointError

SOURCE = Path("config.json")
YARN = {"factor": 4.0, "original_max_position_embeddings": 2048}
PLAIN = {"rope_type": "default", "rope_theta": 5e6}
BARE: dict[str, object] = {"rope_parameters": None}


@pytest.fixture
def config(tiny_assets):
    return tiny_assets.config_json


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"rope_scaling": YARN | {"type": kind}, "rope_theta": 1e6}
            for kind in ("yarn", "linear")
        ),
        {"rope_scaling": YARN | {"type": "yarn"}, "rope_parameters": None, "rope_theta": 1e6},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"type": "su", "rope_type": "longrope"}},
        {"rope_parameters": PLAIN | YARN | {"rope_type": "yarn"}},
        {"rope_parameters": {"rope_theta": 1e6, "type": "llama3", "factor": 8.0}},
        {"rope_parameters": PLAIN | {"rope_type": None}},
        {"rope_parameters": PLAIN | {"rope_type": ["default"]}},
        {"rope_parameters": {"full_attention": PLAIN}},
        {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}},
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": PLAIN | {"factor": 2.0}},
        {"rope_parameters": PLAIN | {"mrope_section": [16, 24, 24]}},
    ],
    ids=str,
)
def test_what_would_rotate_otherwise_is_refused(config, change):
    with pytest.raises(CheckpointError, match=r"rope|partial_rotary_factor") as caught:
        parse_config(config | change, SOURCE)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": PLAIN},
        {"rope_parameters": {"type": "default", "rope_theta": 5e6}},
        {"rope_parameters": {"rope_theta": 5e6}},
        BARE | {"rope_theta": 5e6},
        BARE | {"rope_theta": 5e6, "rope_scaling": None},
        BARE | {"rope_theta": 5e6, "rope_scaling": {"type": "default"}},
        {"rope_scaling": PLAIN},
        {"rope_parameters": PLAIN | {"factor": 1.0, "partial_rotary_factor": 1.0}},
        {"rope_parameters": PLAIN, "rope_theta": 1e4, "partial_rotary_factor": 1},
        {"rope_parameters": PLAIN | {"original_max_position_embeddings": 4096}},
    ],
    ids=str,
)
def test_plain_rope_is_read_as_transformers_reads_it(config, change):
    import transformers

    raw = {k: v for k, v in (config | change).items() if k != "model_type"}
    theirs = transformers.Lfm2MoeConfig(**raw).rope_parameters
    assert theirs["rope_type"] == "default"
    assert parse_config(config | change, SOURCE).rope_theta == theirs["rope_theta"] == 5e6


def test_scaling_takes_the_place_of_parameters(config):
    """transformers would fall back to 1,000,000 here, which no file states."""
    with pytest.raises(CheckpointError, match="rope_theta is None"):
        parse_config(config | {"rope_scaling": {"type": "default"}}, SOURCE)
