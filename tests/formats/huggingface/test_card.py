"""The model card: front matter the Hub accepts, figures that are those of the files."""

import re
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from huggingface_hub import ModelCard

from lfmq.formats.build import Assets
from lfmq.formats.compressed_tensors import container as compressed_tensors
from lfmq.formats.mlx import container as mlx
from lfmq.formats.onnx import container as onnx
from lfmq.formats.plan import ModelConfig, Plan
from lfmq.formats.versions import PROVEN
from lfmq.quant.types import Scheme

MakePlan = Callable[..., Plan]

both = pytest.mark.parametrize("module", [mlx, onnx], ids=["mlx", "onnx"])


def card_text(module: ModuleType, plan: Plan, assets: Assets) -> str:
    (file,) = (f for f in module.layout(plan, assets).files if f.path == "README.md")
    return str(file.constants[0][1].decode())


def front_matter(text: str) -> dict[str, Any]:
    """As the Hub's own client parses it."""
    return dict(ModelCard(text).data.to_dict())


def rows(text: str) -> dict[tuple[str, str], list[str]]:
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    return {(c[0], c[1]): c[2:] for c in cells if len(c) == 5}


@both
def test_front_matter(
    module: ModuleType, tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan
) -> None:
    card = (
        b"---\r\nlicense: other\r\nlicense_name: lfm1.0\r\nlicense_link: LICENSE\r\n---\r\n# A\r\n"
    )
    assets = replace(
        tiny_assets,
        config_json=tiny_assets.config_json | {"_name_or_path": "org/a-model"},
        files=tiny_assets.files | {"README.md": card},
    )
    found = front_matter(card_text(module, make_plan(tiny_config), assets))
    assert found == {
        "library_name": module.NAME,
        "pipeline_tag": "text-generation",
        "tags": [module.NAME, "lfm2_moe", "quantized"],
        "base_model": "org/a-model",
        "base_model_relation": "quantized",
        "license": "other",
        "license_name": "lfm1.0",
        "license_link": "LICENSE",
    }


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("/home/someone/model", b"no front matter\nlicense: mit\n"),
        ("", b'---\nlicense: "a\\"\ntags: [x]\n---\n'),
        ("../model", b"---\nlicense: [mit, other]\n---\n"),
        ("a/b/c", b"---\ntitle: x\n---\nlicense: mit\n"),
        (7, b"\xff\xfe---\n"),
    ],
)
def test_what_is_not_known_is_left_out(
    name: object,
    card: bytes,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
) -> None:
    assets = replace(
        tiny_assets,
        config_json=tiny_assets.config_json | {"_name_or_path": name},
        files=tiny_assets.files | {"README.md": card},
    )
    text = card_text(mlx, make_plan(tiny_config), assets)
    assert set(front_matter(text)) == {"library_name", "pipeline_tag", "tags"}


def test_table_of_mlx(tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan) -> None:
    plan = make_plan(tiny_config, experts=Scheme(4, 64), shared="bfloat16")
    found = rows(card_text(mlx, plan, tiny_assets))
    # 4 bits, and a float16 scale and bias for each 64; norms are stored in half of what is planned
    assert found["expert_down", "int4 g64"] == ["12", "98,304", "4.50"]
    assert found["embedding", "bfloat16"] == ["1", "40,960", "16.00"]
    assert found["norm", "float16"][-1] == "16.00"
    assert found["router", "float32"][-1] == "32.00"


def test_table_of_onnx(tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan) -> None:
    found = rows(card_text(onnx, make_plan(tiny_config), tiny_assets))
    # a float32 scale for each 32 codes; w1 and w3 lie in one tensor
    assert found["expert_gate", "int4 g32"] == ["12", "98,304", "5.00"]
    assert found["expert_up", "int4 g32"] == ["12", "98,304", "5.00"]
    assert found["embedding", "int8 g32"] == ["1", "40,960", "9.00"]
    assert found["norm", "float32"][-1] == "32.00"


@both
def test_bits_add_up_to_the_weight_files(
    module: ModuleType, tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan
) -> None:
    plan = make_plan(tiny_config)
    table = rows(card_text(module, plan, tiny_assets))
    numbers = [c for c in table.values() if c[0].isdigit()]
    assert sum(int(c[0]) for c in numbers) == len(plan.entries)
    assert sum(int(c[1].replace(",", "")) for c in numbers) == sum(e.size for e in plan.entries)
    stated = sum(int(c[1].replace(",", "")) * float(c[2]) / 8 for c in numbers)
    held = sum(p.nbytes for f in module.layout(plan, tiny_assets).files for p in f.segments)
    assert stated == pytest.approx(held, rel=1e-3)  # two decimals of the bits


@both
def test_text(
    module: ModuleType, tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan
) -> None:
    plan = make_plan(tiny_config)
    text = card_text(module, plan, tiny_assets)
    assert text == card_text(module, plan, tiny_assets)
    assert text.startswith("---\n")
    assert text.endswith("experts.\n")
    assert f"# tiny, test, for {module.NAME}" in text
    assert "lfmq verify" in text
    assert "lfmq validate" in text
    assert {"mlx": "mlx_lm.generate", "onnx": "onnxruntime_genai"}[module.NAME] in text


@both
def test_the_versions_are_those_the_tests_run(
    module: ModuleType, tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan
) -> None:
    text = card_text(module, make_plan(tiny_config), tiny_assets)
    assert f"proven with {' and '.join(PROVEN[module.NAME])}." in text


def bad_lines(module: ModuleType, plan: Plan, assets: Assets) -> list[str]:
    text = card_text(module, plan, assets)
    return re.findall(r"^- (.*)\n  \(\[source\]\(https://", text, re.M)


def test_known_bad_versions_are_those_of_the_build(
    tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan
) -> None:
    (line,) = bad_lines(mlx, make_plan(tiny_config), tiny_assets)
    assert line.startswith("mlx-lm up to 0.31.3: routes by softmax")
    (line,) = bad_lines(onnx, make_plan(tiny_config), tiny_assets)
    assert line.startswith("onnxruntime below 1.25")
    wide = make_plan(tiny_config, experts=Scheme(8))
    assert "ORT_QMOE_CPU_QNBIT_GEMM=fp32" in bad_lines(onnx, wide, tiny_assets)[1]
    floats = make_plan(tiny_config, experts="float32")
    assert bad_lines(onnx, floats, tiny_assets) == []
    (line,) = bad_lines(compressed_tensors, make_plan(tiny_config), tiny_assets)
    assert line.startswith("vllm up to 0.26.0")
    plain = make_plan(tiny_config, shared="float32")
    assert bad_lines(compressed_tensors, plain, tiny_assets) == []


def test_tokenizer_files_are_named_for_the_model_they_concern(
    tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan
) -> None:
    named = replace(tiny_assets, name="LFM2.5-8B-A1B")
    assert "feb5e04" in bad_lines(mlx, make_plan(tiny_config), named)[-1]
    tuned = replace(tiny_assets, files={"README.md": b"base_model: LiquidAI/LFM2.5-8B-A1B"})
    assert "feb5e04" in bad_lines(mlx, make_plan(tiny_config), tuned)[-1]


def test_the_checkpoints_own_card_is_not_copied(
    tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan
) -> None:
    files = tiny_assets.files | {"README.md": b"# Other", "LICENSE": b"text"}
    assets = replace(tiny_assets, files=files)
    for module in (mlx, onnx):
        built = {f.path: f for f in module.layout(make_plan(tiny_config), assets).files}
        assert b"Other" not in built["README.md"].constants[0][1]
        assert built["LICENSE"].constants[0][1] == b"text"
