"""A head that is not the embedding, from the checkpoint to the runtimes of every container.

The sample's head is here its embedding with the rows of two tokens exchanged at a time: a runtime
that took the embedding in its place would predict other tokens everywhere.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.checkpoint.inspect import inspect_checkpoint
from lfmq.converter.mixed_precision.predicted_kld import Prediction
from lfmq.converter.model.decode import Decoder, KeptModel
from lfmq.converter.model.forward import Model, run_model
from lfmq.converter.model.tensors import HEAD, head_of
from lfmq.converter.model.text import load_windows
from lfmq.converter.plan.plan import resolve_plan, token_bytes
from lfmq.converter.plan.recipe import load_recipe, parse_recipe
from lfmq.converter.quantize.layerwise import calibrated_groups
from lfmq.converter.quantize.settings import Calibration
from lfmq.converter.run.convert import convert
from lfmq.converter.statistics.collect import collect
from lfmq.converter.statistics.statistics import has_losses, identity_of
from lfmq.formats.registry import FORMATS, check_plan
from lfmq.quant.errors import UnsupportedError
from lfmq.quant.types import Scheme
from lfmq.tests import checkpoint_kinds as kinds
from lfmq.validation.engines.child_process import run_native
from lfmq.validation.engines.protocol import EngineRequest

HOLDERS = ("gguf", "onnx", "compressed-tensors")
Ids = NDArray[np.int64]


def own_head(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    tensors = kinds.load(folder)
    rows = torch.arange(len(tensors[kinds.EMBEDDING])) ^ 1
    kinds.store(folder, tensors | {HEAD: tensors[kinds.EMBEDDING][rows]})
    kinds.edit(folder / "config.json", tie_word_embeddings=False, tie_embedding=False)
    return folder


@pytest.fixture(scope="module", params=["sample_folder", "sample_dense_folder"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = request.getfixturevalue(request.param)
    return own_head(source, tmp_path_factory.mktemp("own") / source.name)


@pytest.fixture(scope="module")
def builds(folder: Path) -> dict[str, Path]:
    checkpoint, recipe = open_checkpoint(folder), load_recipe("int8")
    plan = resolve_plan(checkpoint.config, recipe)
    formats = {name: FORMATS[name] for name in HOLDERS}
    done = convert(checkpoint, recipe, plan, formats, folder.parent / "builds").builds
    return {b.format: b.path for b in done}


@pytest.fixture(scope="module")
def ids() -> Ids:
    return np.random.default_rng(5).integers(5, 8000, (2, 48))


def logits(model: Model, ids: Ids) -> NDArray[np.float32]:
    head = model.weight(head_of(model.config))
    found: NDArray[np.float32] = (run_model(model, ids).hidden @ head.T).numpy()
    return found


def kld(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (ours, theirs))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_reference_computes_what_transformers_does(folder: Path, ids: Ids) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.tie_word_embeddings is False
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)).logits.numpy()
    found = logits(Model(checkpoint.config, checkpoint.read), ids)
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    first = Decoder(KeptModel(checkpoint.config, checkpoint.read)).start(list(ids))
    np.testing.assert_allclose(first.numpy(), wanted[:, -1], atol=1e-3)


SLOW = pytest.param("compressed-tensors", marks=pytest.mark.slow)


@pytest.mark.parametrize("format", [*HOLDERS[:2], SLOW])
def test_readers_and_runtimes_use_it(
    folder: Path, builds: dict[str, Path], ids: Ids, format: str
) -> None:
    checkpoint = open_checkpoint(folder)
    reader = FORMATS[format].open_reader(builds[format])
    assert reader.config.tie_word_embeddings is False
    head = reader.read(HEAD)
    assert np.abs(head - checkpoint.read(HEAD)).max() < 0.01
    np.testing.assert_array_equal(head, FORMATS["gguf"].open_reader(builds["gguf"]).read(HEAD))
    read = logits(Model(reader.config, reader.read), ids)
    assert kld(logits(Model(checkpoint.config, checkpoint.read), ids), read) < 0.01
    request = EngineRequest(builds[format], ids, slice(0, None), threads=1)
    runs = list(run_native(request, format))
    native = np.stack([run.logits for run in runs if run.logits is not None])
    assert kld(read, native) < 0.01


def test_mlx_refuses_it(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    plan = resolve_plan(checkpoint.config, load_recipe("int8"))
    with pytest.raises(UnsupportedError) as caught:
        check_plan(FORMATS["mlx"], plan, checkpoint.assets)
    assert str(caught.value).startswith("lm_head.weight: differs from the embedding, mlx-lm's")
    assert str(caught.value).endswith("gguf, onnx and compressed-tensors can hold it")


def test_it_is_told_of(folder: Path, builds: dict[str, Path]) -> None:
    report = inspect_checkpoint(open_checkpoint(folder))
    assert {r.role for r in report.roles} >= {"embedding", "head"}
    assert any("head of its own: mlx cannot hold it" in line for line in report.warnings)
    card = (builds["compressed-tensors"] / "README.md").read_text()
    assert "vLLM ties head and embedding of LFM2 whatever the config says" in card


def test_recipes_give_it_what_the_embedding_gets(folder: Path) -> None:
    config = open_checkpoint(folder).config
    own = '[[rule]]\nbits = 4\n[[rule]]\nroles = ["embedding"]\nbits = 8\n'
    for text, bits in ((own, 8), (own + '[[rule]]\nroles = ["head"]\nbits = 4\n', 4)):
        plan = resolve_plan(config, parse_recipe(text, "own", "own"))
        stored = {e.role.value: e.storage for e in plan.entries}
        assert stored["embedding"] == Scheme(8)
        assert stored["head"] == Scheme(bits)
        # a token reads the whole head and one row of the embedding
        layout = FORMATS["onnx"].layout(plan, open_checkpoint(folder).assets)
        segments = [s for file in layout.files for s in file.segments]
        looked_up = sum(s.nbytes for s in segments if s.sources[0] == kinds.EMBEDDING)
        assert token_bytes(plan, layout) <= sum(s.nbytes for s in segments) - looked_up


def test_calibration_and_statistics_know_it(make_checkpoint: Any, tmp_path: Path) -> None:
    folder = make_checkpoint(change=lambda t: t.update({HEAD: t[kinds.EMBEDDING][::-1].copy()}))
    checkpoint = open_checkpoint(folder)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    windows = load_windows([text], checkpoint.assets, checkpoint.config, tokens=128, sequence=64)
    statistics, _ = collect(checkpoint, windows)
    assert has_losses(statistics, checkpoint.config)
    prediction = Prediction(statistics, checkpoint.config)
    plan = resolve_plan(checkpoint.config, load_recipe("int4-all"))
    outside = [e for e in plan.entries if e.layer is None and e.scheme is not None]
    costs = {e.role.value: prediction.cost(e, Scheme(4)) for e in outside}
    parts = statistics.parts
    for role in ("embedding", "head"):
        cost = costs[role]
        assert cost is not None
        assert 0 < cost.direct <= 1.01 * parts[role].kld
    units = calibrated_groups(checkpoint, plan, Calibration(windows), lambda weights: None)
    assert {entry.name for unit in units for entry in unit} == set(checkpoint.stored)
    tied = dataclasses.replace(checkpoint.config, tie_word_embeddings=True)
    assert identity_of(tied) != identity_of(checkpoint.config)
