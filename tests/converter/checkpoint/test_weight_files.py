"""Which files count, where several could; what transformers loads is in test_checkpoint_kinds."""

import json

import pytest

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.quant.errors import CheckpointError
from lfmq.tests import checkpoint_kinds as kinds


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert len(message) < 400
    return message


def test_shards_without_an_index_that_are_no_complete_set(make_checkpoint):
    folder = make_checkpoint()
    kinds.split(folder, kinds.load(folder), 3, index=False)
    (folder / "model-00002-of-00003.safetensors").rename(
        folder / "model-00002-of-00004.safetensors"
    )
    assert "the shards are of several sets (model-00001-of-00003" in refusal(folder)
    (folder / "model-00002-of-00004.safetensors").unlink()
    message = refusal(folder)
    assert "model-00002-of-00003.safetensors: not found, and neither is" in message
    assert "2 of 3 shards are there" in message


def test_a_set_that_claims_more_shards_than_there_can_be(make_checkpoint):
    folder = make_checkpoint()
    (folder / "model.safetensors").rename(folder / "model-00000-of-99999.safetensors")
    assert "1 of 99999 shards are there" in refusal(folder)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "consolidated.safetensors"])
def test_a_name_that_transformers_does_not_look_for(make_checkpoint, name):
    folder = make_checkpoint()
    (folder / "model.safetensors").rename(folder / name)
    assert f"{name} is there, under a name that transformers does not load" in refusal(folder)


def test_a_variant_beside_the_weights_is_not_read(make_checkpoint):
    folder = make_checkpoint()
    tensors = kinds.load(folder)
    kinds.store(folder, tensors | {kinds.NORM: tensors[kinds.NORM] * 2}, "model.fp16.safetensors")
    assert [p.name for p in open_checkpoint(folder).weight_files] == ["model.safetensors"]


def test_files_of_a_distributed_checkpoint(make_checkpoint):
    folder = make_checkpoint()
    name = "shard-00000-model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / name)
    assert f"{name}: part of a distributed checkpoint" in refusal(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a.bin", 3, "."])
def test_a_config_that_names_weights_elsewhere(make_checkpoint, name):
    folder = make_checkpoint(config={"transformers_weights": name})
    assert "transformers_weights is" in refusal(folder)


def test_a_config_that_names_an_index(make_checkpoint):
    folder = make_checkpoint(config={"transformers_weights": "other.safetensors.index.json"})
    assert "other.safetensors.index.json: named by config.json" in refusal(folder)
    kinds.split(folder, kinds.load(folder), 2)
    (folder / kinds.INDEX).rename(folder / "other.safetensors.index.json")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.index == folder / "other.safetensors.index.json"
    assert "other.safetensors.index.json is read" in checkpoint.notes[0]


def test_a_link_to_nothing(make_checkpoint):
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../blobs/0123")
    assert "model.safetensors: a link to a file that is not there" in refusal(folder)


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""])
def test_an_index_with_a_byte_order_mark(make_checkpoint, mark):
    folder = make_checkpoint(shards=2)
    text = json.dumps(json.loads((folder / kinds.INDEX).read_text())).encode("utf-8")
    (folder / kinds.INDEX).write_bytes(mark + text)
    assert len(open_checkpoint(folder).weight_files) == 2
