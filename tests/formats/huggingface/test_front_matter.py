"""What a card states, and cards that state nothing: none breaks a conversion."""

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from lfmq.formats.huggingface.front_matter import (
    base_models,
    card_warnings,
    front_matter,
    hub_id,
    sampling_settings,
)
from lfmq.formats.mlx import container as mlx

CARD = """---
license: other
license_name: lfm1.0
license_link: LICENSE
language: [en, no]
base_model:
- LiquidAI/LFM2.5-8B-A1B
- a/b
tags:
- liquid
- 2024-01-01
- on
pipeline_tag: text-generation
---
# A fine-tune
"""


def with_card(assets, card, **more):
    content = card if isinstance(card, bytes) else card.encode()
    return replace(assets, files=assets.files | {"README.md": content}, **more)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_values_are_the_texts_that_stand_there(tiny_assets, ends, mark):
    found = front_matter(with_card(tiny_assets, mark + CARD.replace("\n", ends).encode()))
    assert (found.license, found.license_name, found.license_link) == (
        "other",
        "lfm1.0",
        "LICENSE",
    )
    assert found.language == ("en", "no")
    assert found.base_model == ("LiquidAI/LFM2.5-8B-A1B", "a/b")
    assert found.tags == ("liquid", "2024-01-01", "on")
    assert (found.pipeline_tag, found.problem) == ("text-generation", "")


PROBLEMS = {
    "no end": "---\nlicense: mit\n",
    "not YAML": "---\nlicense: [mit\n---\n",
    "no mapping": "---\n- a\n---\n",
    "too long": "---\nx: " + "y" * 70_000 + "\n---\n",
    "too deep": "---\nx: " + "[" * 30_000 + "\n---\n",
    "a bomb": "---\na: &a [x, x]\nb: &b [*a, *a]\ntags: *c\n---\n",
    "a tag": "---\n!!python/object/apply:os.system ['true']\n---\n",
}


@pytest.mark.parametrize("card", PROBLEMS.values(), ids=list(PROBLEMS))
def test_a_malformed_card_is_a_line(tiny_assets, tiny_config, make_plan, card):
    assets = with_card(tiny_assets, card)
    (line,) = card_warnings(assets)
    assert line.startswith("README.md: its front matter ")
    assert line.endswith("license, base model and tags are left out")
    assert len(line) < 400
    assert mlx.layout(make_plan(tiny_config), assets)


@pytest.mark.parametrize(
    "card",
    ["", "# no front matter", "---\n---\n", b"\xff\xfe", "---\nlicense: ~\ntags: {a: b}\n---\n",
     "---\nlicense: [a, b]\nlanguage: \n---\n", "---\nlicense: \"a\\u0007b\"\n---\n"],
)  # fmt: skip
def test_what_states_nothing(tiny_assets, card):
    found = front_matter(with_card(tiny_assets, card))
    assert (found.license, found.tags, found.language, found.problem) == ("", (), (), "")
    assert not card_warnings(with_card(tiny_assets, card))


def test_values_reach_the_builds_card(tiny_assets, tiny_config, make_plan):
    hostile = CARD.replace("lfm1.0", '"a: \\"b\\" # c"').replace("- on", '- "]\\\\"')
    assets = with_card(tiny_assets, hostile)
    (file,) = (
        f for f in mlx.layout(make_plan(tiny_config), assets).files if f.path == "README.md"
    )
    found = ModelCard(file.constants[0][1].decode()).data.to_dict()
    assert found["license_name"] == 'a: "b" # c'
    assert found["tags"] == ["mlx", "lfm2_moe", "quantized", "liquid", "2024-01-01", "]\\"]
    assert found["base_model"] == ["LiquidAI/LFM2.5-8B-A1B", "a/b"]
    assert found["base_model_relation"] == "quantized"
    assert found["language"] == ["en", "no"]


def test_a_snapshot_of_the_hub_is_its_own_base(tiny_assets, tmp_path):
    folder = tmp_path / "models--LiquidAI--LFM2.5-8B-A1B" / "snapshots" / "feb5e04d"
    assets = with_card(tiny_assets, CARD.replace("LiquidAI/LFM2.5-8B-A1B", "c/d"), folder=folder)
    assert hub_id(assets) == "LiquidAI/LFM2.5-8B-A1B"
    assert base_models(assets) == ("LiquidAI/LFM2.5-8B-A1B",)
    assert hub_id(replace(assets, folder=Path("/a/snapshots/b"))) == ""
    assert base_models(replace(assets, folder=tmp_path)) == ("c/d", "a/b")


def test_sampling_settings(tiny_assets):
    given = b'{"temperature": 0.2, "top_k": 80, "min_p": null, "repetition_penalty": 1.05}'
    assets = replace(tiny_assets, files={"generation_config.json": given})
    assert sampling_settings(assets) == {
        "temperature": 0.2,
        "top_k": 80,
        "repetition_penalty": 1.05,
    }
    given = b'{"temperature": "hot", "top_k": 2.5, "top_p": NaN, "min_p": true}'
    assets = replace(tiny_assets, files={"generation_config.json": given})
    assert sampling_settings(assets) == {}
    assert [line.split(" is ")[0] for line in card_warnings(assets)] == [
        f"generation_config.json: {key}" for key in ("temperature", "top_k", "top_p", "min_p")
    ]
