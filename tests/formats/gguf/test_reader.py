"""What llama.cpp would use of a GGUF and the reader does not know is refused; parts are one."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from lfmq.converter.run.open_build import open_build
from lfmq.formats.build import Assets
from lfmq.formats.gguf import container as gguf
from lfmq.formats.plan import ModelConfig, Plan
from lfmq.formats.registry import build_nbytes
from lfmq.quant.errors import ValidationError
from lfmq.validation.engines.child_process import run_native
from lfmq.validation.engines.protocol import EngineRequest

Change = Callable[[dict[str, tuple[Any, Any]], dict[str, Any]], None]


@pytest.fixture
def build(
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: Callable[..., Plan],
    write_random: Callable[..., Path],
) -> Path:
    config = replace(tiny_config, vocab_size=8200)
    assets = replace(tiny_assets, config_json={**tiny_assets.config_json, "vocab_size": 8200})
    plan, path = make_plan(config), tmp_path / "a.gguf"
    return write_random(path, plan, gguf.layout(plan, assets))


def rewrite(source: Path, target: Path, change: Change | None = None, **options: Any) -> Path:
    """The file again by gguf-py's writer, after a change of its keys and tensors."""
    reader = GGUFReader(source)
    keys = {
        name: (f.contents(), f.types) for name, f in reader.fields.items() if name[:5] != "GGUF."
    }
    tensors = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    if change is not None:
        change(keys, tensors)
    writer = GGUFWriter(target, keys.pop("general.architecture")[0], **options)
    for name, (value, types) in keys.items():
        kind = types[0]
        sub = types[-1] if kind is GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, kind, sub_type=sub)
    for name, (data, raw) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def key(name: str, value: Any, kind: GGUFValueType) -> Change:
    def change(keys: dict[str, Any], _: Mapping[str, Any]) -> None:
        keys[name] = (value, [kind])

    return change


def without(name: str) -> Change:
    def change(keys: dict[str, Any], tensors: dict[str, Any]) -> None:
        (keys if name in keys else tensors).pop(name)

    return change


def extra(name: str, of: str) -> Change:
    def change(_: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[of]

    return change


U32, F32, TEXT = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING


def test_a_file_that_was_written_again_is_the_same_build(build: Path, tmp_path: Path) -> None:
    _, ours = open_build(build)
    _, again = open_build(rewrite(build, tmp_path / "b.gguf"))
    assert again.config == ours.config
    name = "model.layers.2.feed_forward.experts.3.w2.weight"
    np.testing.assert_array_equal(again.read(name), ours.read(name))
    np.testing.assert_array_equal(again.read(name, 5, 9), ours.read(name)[5:9])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (extra("dense_2.weight", "blk.0.ffn_up.weight"), "'dense_2.weight'"),
        (extra("blk.4.attn_norm.weight", "blk.0.attn_norm.weight"), r"'blk\.4\.attn_norm"),
        (without("blk.2.ffn_gate_inp.weight"), r"'blk\.2\.ffn_gate_inp.weight' is missing"),
        (key("lfm2moe.rope.scaling.type", "yarn", TEXT), "rope.scaling.type is 'yarn'"),
        (key("lfm2moe.rope.scaling.factor", 4.0, F32), "rope.scaling.factor is 4.0"),
        (key("lfm2moe.rope.dimension_count", 16, U32), "rope.dimension_count is 16"),
        (key("lfm2moe.expert_weights_scale", 2.5, F32), "expert_weights_scale is 2.5"),
        (key("lfm2moe.expert_gating_func", 1, U32), "expert_gating_func is 1"),
        (without("lfm2moe.expert_gating_func"), "expert_gating_func' is missing"),
        (key("lfm2moe.attention.sliding_window", 64, U32), "sliding_window is 64"),
        (key("lfm2moe.attention.value_length", 64, U32), "value_length is 64"),
        (key("lfm2moe.logit_scale", 0.5, F32), "'lfm2moe.logit_scale' .* not known here"),
        (key("lfm2moe.block_count", 2**31, U32), "block_count is 2147483648"),
        (key("lfm2moe.block_count", 4.0, F32), "expected an integer of type UINT32"),
        (key("lfm2moe.expert_used_count", 7, U32), "expert_used_count is 7"),
        (key("lfm2moe.embedding_length", 64, U32), "expected"),
        (key("tokenizer.ggml.bos_token_id", 9000, U32), "bos_token_id is 9000"),
        (without("tokenizer.ggml.tokens"), "tokenizer.ggml.tokens is None"),
        (key("general.type", "adapter", TEXT), "general.type is 'adapter'"),
        (key("general.architecture", "llama", TEXT), "architecture 'llama'"),
    ],
)
def test_what_llama_cpp_would_use_is_known_or_refused(
    build: Path, tmp_path: Path, change: Change, message: str
) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        open_build(rewrite(build, tmp_path / "b.gguf", change))
    assert len(str(caught.value)) < 400


def test_an_output_weight_is_the_head(build: Path, tmp_path: Path) -> None:
    """llama.cpp uses it in place of the embedding: the file is no build of a tied checkpoint."""
    change = extra("output.weight", "token_embd.weight")
    _, reader = open_build(rewrite(build, tmp_path / "b.gguf", change))
    assert not reader.config.tie_word_embeddings
    assert reader.read("lm_head.weight").shape == (8200, 128)


@pytest.mark.parametrize(
    "change",
    [
        key("lfm2moe.rope.scaling.type", "none", TEXT),
        key("lfm2moe.rope.dimension_count", 32, U32),
        key("lfm2moe.attention.key_length", 32, U32),
        key("general.url", "https://example.org", TEXT),
        key("other.program", 7, U32),
        key("lfm2moe.attention.head_count_kv", [0, 2, 0, 2], GGUFValueType.ARRAY),
    ],
)
def test_what_changes_nothing_is_read(build: Path, tmp_path: Path, change: Change) -> None:
    def both(keys: dict[str, Any], tensors: dict[str, Any]) -> None:
        change(keys, tensors)
        value, types = keys["lfm2moe.attention.head_count_kv"]
        keys["lfm2moe.attention.head_count_kv"] = (value, [types[0], GGUFValueType.INT32])

    assert open_build(rewrite(build, tmp_path / "b.gguf", both))[1].config


# ---- several files


@pytest.fixture
def parts(build: Path, tmp_path: Path) -> list[Path]:
    rewrite(build, tmp_path / "s.gguf", split_max_tensors=20)
    return sorted(tmp_path.glob("s-*.gguf"))


def test_parts_are_read_whole(build: Path, parts: list[Path]) -> None:
    assert len(parts) > 2
    _, whole = open_build(build)
    _, split = open_build(parts[0])
    for name in ("model.embed_tokens.weight", "model.layers.3.feed_forward.experts.5.w1.weight"):
        np.testing.assert_array_equal(split.read(name), whole.read(name))
    assert build_nbytes(parts[0]) == sum(part.stat().st_size for part in parts)


def test_parts_run_in_llama_cpp(build: Path, parts: list[Path]) -> None:
    pytest.importorskip("xllamacpp")
    ids = np.random.default_rng(0).integers(5, 320, (1, 16))
    runs = [
        next(iter(run_native(EngineRequest(path, ids, slice(8, 15), threads=1), "gguf")))
        for path in (build, parts[0])
    ]
    np.testing.assert_array_equal(runs[0].logits, runs[1].logits)


def test_parts_that_are_not_all_there(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"part 2 of .*give the first one"):
        open_build(parts[1])
    parts[0].rename(renamed := tmp_path / "renamed.gguf")
    with pytest.raises(ValidationError, match="keep their names"):
        open_build(renamed)
    renamed.rename(parts[0])
    parts[1].rename(kept := tmp_path / "kept")
    with pytest.raises(ValidationError, match=f"{parts[1].name}: missing"):
        open_build(parts[0])
    kept.write_bytes(parts[2].read_bytes())
    kept.rename(parts[1])
    with pytest.raises(ValidationError, match=rf"{parts[1].name}: part 3"):
        open_build(parts[0])
