"""Checkpoints of every kind hold the weights that transformers loads from them, bit for bit."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lfmq.converter.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmq.converter.checkpoint.fingerprints import input_files
from lfmq.converter.model.tensors import HEAD, expected_tensors
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.run.convert import convert
from lfmq.formats.registry import FORMATS
from lfmq.tests import checkpoint_kinds as kinds

STATE = dict[str, torch.Tensor]


@pytest.fixture
def dense(tmp_path: Path, sample_dense_folder: Path) -> Path:
    return Path(shutil.copytree(sample_dense_folder, tmp_path / "dense"))


def loaded(folder: Path) -> STATE:
    """What transformers makes of a folder, in float32, by the names of checkpoints."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: STATE = {}
    for name, tensor in model.state_dict().items():
        experts, _, kind = name.rpartition(".experts.")
        if not experts:
            found[name] = tensor
            continue
        for i, both in enumerate(tensor):
            parts = both.chunk(2) if kind == "gate_up_proj" else (both,)
            names = ("w1", "w3") if kind == "gate_up_proj" else ("w2",)
            found |= {
                f"{experts}.experts.{i}.{n}.weight": p for n, p in zip(names, parts, strict=True)
            }
    return found


def assert_equal(checkpoint: Checkpoint, state: STATE) -> None:
    names = {t.name for t in expected_tensors(checkpoint.config)}
    assert names == set(checkpoint.stored)
    assert set(state) - names <= {HEAD}
    for name in names:
        np.testing.assert_array_equal(checkpoint.read(name), state[name].numpy(), name)
        first = checkpoint.read_rows(name, 1, 3)
        np.testing.assert_array_equal(first.astype(np.float32), state[name][1:3].numpy(), name)
    if HEAD not in names:
        embedding = state["model.embed_tokens.weight"]
        assert torch.equal(state[HEAD], embedding)


@pytest.mark.parametrize("kind", kinds.LOADED, ids=lambda kind: kind.__name__)
def test_weights_are_those_that_transformers_loads(make_checkpoint, kind):
    folder = make_checkpoint()
    kind(folder)
    checkpoint = open_checkpoint(folder)
    assert_equal(checkpoint, loaded(folder))
    read = {t.path for t in checkpoint.stored.values()}
    assert read <= set(input_files(checkpoint))


@pytest.mark.parametrize(
    "kind",
    [
        kinds.single_beside_shards, kinds.without_model_prefix, kinds.head_in_float32,
        kinds.head_of_its_own, kinds.index_names_absent_head, kinds.buffers,
    ],
    ids=lambda kind: kind.__name__,
)  # fmt: skip
def test_weights_of_a_dense_model(dense, kind):
    kind(dense)
    assert_equal(open_checkpoint(dense), loaded(dense))


@pytest.mark.parametrize("kind", kinds.WRAPPED, ids=lambda kind: kind.__name__)
def test_names_of_wrappers_are_read_over(make_checkpoint, kind):
    folder = make_checkpoint()
    before = open_checkpoint(folder)
    weights = {name: torch.from_numpy(before.read(name)) for name in before.stored}
    kind(folder)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.notes
    assert checkpoint.config.tie_word_embeddings
    assert_equal(checkpoint, weights | {HEAD: weights["model.embed_tokens.weight"]})


def test_what_was_done_is_said(make_checkpoint):
    said = {
        kinds.one_file: "",
        kinds.single_beside_shards: "model.safetensors is read, as transformers does; 3 shards",
        kinds.stacked_experts: "experts are stored as 4 stacks",
        kinds.without_model_prefix: "the tensors' names lack model.",
        kinds.head_in_float32: "lm_head.weight is a copy of the embedding",
        kinds.head_of_its_own: "lm_head.weight differs from the embedding",
        kinds.head_of_its_own_though_tied: "though config.json ties them",
        kinds.head_alone: "lm_head.weight is also the embedding",
        kinds.tensor_in_two_shards: "whose values transformers takes",
        kinds.buffers: "rotary_emb.inv_freq and 3 more: not among the model's weights",
        kinds.weights_that_the_config_names: "other.safetensors is read",
        kinds.shards_without_index: "the 4 shards in the folder are read",
        kinds.compiled_layers: "_fsdp_wrapped_module., _orig_mod.",
    }
    for kind, words in said.items():
        folder = make_checkpoint(kind.__name__)
        kind(folder)
        notes = "; ".join(open_checkpoint(folder).notes)
        assert words in notes, (kind.__name__, notes)
        assert bool(words) == bool(notes)


def test_builds_of_every_kind_are_the_same_bytes(make_checkpoint, tmp_path):
    """A tensor that is a part of another one in the file is read by rows like any other."""
    found = set()
    same = (
        kinds.one_file, kinds.stacked_experts_in_shards, kinds.head_in_float32, kinds.WRAPPED[1],
    )  # fmt: skip
    for number, kind in enumerate(same):
        folder = make_checkpoint(str(number))
        kind(folder)
        checkpoint = open_checkpoint(folder, "same")
        recipe = load_recipe("int4")
        plan = resolve_plan(checkpoint.config, recipe)
        done = convert(
            checkpoint, recipe, plan, {"mlx": FORMATS["mlx"]}, tmp_path / f"out{number}"
        )
        found.add(
            hashlib.sha256((done.builds[0].path / "model.safetensors").read_bytes()).hexdigest()
        )
    assert len(found) == 1
