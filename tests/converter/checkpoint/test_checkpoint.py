"""What a checkpoint may look like; damaged ones are in ``tests/test_bad_input.py``."""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.checkpoint.inspect import inspect_checkpoint
from lfmq.quant.errors import CheckpointError

EMBEDDING = "model.embed_tokens.weight"
BIAS = "model.layers.2.feed_forward.expert_bias"


def test_shards_hold_what_one_file_does(make_checkpoint):
    one, many = make_checkpoint("one"), make_checkpoint("many", shards=5)
    whole, split = open_checkpoint(one), open_checkpoint(many)
    assert len(split.weight_files) == 5
    for name in whole.stored:
        np.testing.assert_array_equal(whole.read(name), split.read(name))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_every_float_dtype_reads_exactly(make_checkpoint, dtype):
    kept = {}

    def change(tensors):
        for name, values in tensors.items():
            if not name.endswith("expert_bias"):
                tensors[name] = kept[name] = values.astype(dtype)

    checkpoint = open_checkpoint(make_checkpoint(change=change))
    for name, values in kept.items():
        found = checkpoint.read(name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, values.astype(np.float32))


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}},
        {"rope_parameters": None, "rope_theta": 5e6},
        {"rope_parameters": None, "rope_theta": 5000000},
    ],
    ids=["nested", "flat", "flat integer"],
)
def test_both_config_styles_of_rope(make_checkpoint, config):
    assert open_checkpoint(make_checkpoint(config=config)).config.rope_theta == 5e6


def test_tie_embedding_wins_over_tie_word_embeddings(make_checkpoint):
    def write(tied: bool, newer: bool | None) -> Path:
        folder = make_checkpoint(f"{tied}-{newer}", config={"tie_embedding": tied})
        config = json.loads((folder / "config.json").read_text())
        del config["tie_word_embeddings"]
        if newer is not None:
            config["tie_word_embeddings"] = newer
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    for newer in (None, False, True):
        open_checkpoint(write(True, newer))
        with pytest.raises(CheckpointError, match="tie_word_embeddings is false"):
            open_checkpoint(write(False, newer))


def test_attention_layers_by_index(make_checkpoint):
    raw = {"layer_types": None, "full_attn_idxs": [1, 3]}
    config = open_checkpoint(make_checkpoint(config=raw)).config
    assert config.attention_layers == (1, 3)


def test_expert_bias_stays_float32(make_checkpoint):
    bias = np.arange(6, dtype=np.float32) + np.float32(1e-5)
    checkpoint = open_checkpoint(make_checkpoint(change=lambda t: t.update({BIAS: bias})))
    assert checkpoint.stored[BIAS].dtype == "F32"
    np.testing.assert_array_equal(checkpoint.read(BIAS), bias)
    assert not inspect_checkpoint(checkpoint).warnings


def test_inspect_counts_by_role(sample_folder):
    report = inspect_checkpoint(open_checkpoint(sample_folder))
    assert (report.tensors, report.weights) == (244, 16_865_728)
    counts = {r.role: (r.tensors, r.weights, r.dtypes) for r in report.roles}
    assert counts["expert_down"] == (64, 4_194_304, "BF16")
    assert counts["expert_bias"] == (4, 64, "F32")
    assert report.nbytes == sum(r.nbytes for r in report.roles)
    assert not report.warnings


def test_inspect_tells_what_is_odd(make_checkpoint):
    def change(tensors):
        for name in tensors:
            if name.endswith("expert_bias"):
                tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

    folder = make_checkpoint(change=change, config={"norm_topk_prob": False})
    for name in ("chat_template.jinja", "generation_config.json"):
        (folder / name).unlink()
    odd = "\n".join(inspect_checkpoint(open_checkpoint(folder)).warnings)
    for text in (
        "expert_bias is stored as BF16",
        "no chat template",
        "no generation_config",
        "norm_topk_prob",
    ):
        assert text in odd
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json" in "\n".join(inspect_checkpoint(open_checkpoint(folder)).warnings)


def test_opening_reads_no_weight(make_checkpoint):
    """A checkpoint of the same size whose data is a hole opens as well."""
    folder = make_checkpoint()
    path = folder / "model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    with path.open("wb") as file:
        file.write(content[:start])
        file.truncate(len(content))
    assert os.stat(path).st_blocks * 512 < len(content) / 2
    checkpoint = open_checkpoint(folder)
    assert os.stat(path).st_blocks * 512 < len(content) / 2
    assert not checkpoint.read(EMBEDDING).any()


def test_a_file_that_shrinks_meanwhile_is_an_error(make_checkpoint):
    folder = make_checkpoint()
    checkpoint = open_checkpoint(folder)
    os.truncate(folder / "model.safetensors", 100_000)
    last = max(checkpoint.stored, key=lambda n: checkpoint.stored[n].offset)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        checkpoint.read(last)


def test_threads_read_at_the_same_time(make_checkpoint):
    checkpoint = open_checkpoint(make_checkpoint())
    expected = {name: checkpoint.read(name) for name in checkpoint.stored}
    wrong: list[str] = []

    def read_all() -> None:
        wrong.extend(n for n, w in expected.items() if not np.array_equal(checkpoint.read(n), w))

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_expert_bias_where_the_config_has_none(make_checkpoint, tiny_config):
    def change(tensors):
        for name in [n for n in tensors if n.endswith("expert_bias")]:
            del tensors[name]

    folder = make_checkpoint(change=change, config={"use_expert_bias": False})
    expected = replace(tiny_config, vocab_size=8192, use_expert_bias=False)
    assert open_checkpoint(folder).config == expected


def test_safetensors_own_writer_agrees(tmp_path, make_checkpoint):
    folder = make_checkpoint()
    checkpoint = open_checkpoint(folder)
    save_file(
        {n: checkpoint.read(n) for n in checkpoint.stored},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    again = open_checkpoint(folder)
    assert again.stored.keys() == checkpoint.stored.keys()
