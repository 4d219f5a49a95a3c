"""What a build's own weights give in the reference forward: what its runtime is to agree with."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.jobs.execution import Execution
from lfmq.converter.model.blocks import model_blocks
from lfmq.converter.model.forward import Model, embed, normed, run_block
from lfmq.converter.model.text import load_windows
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.run.convert import convert
from lfmq.formats.registry import FORMATS
from lfmq.tests.validation.reports import make_report, report  # noqa: F401 - fixtures
from lfmq.validation.engines.protocol import EngineRequest, WindowRun
from lfmq.validation.measure.predictions import scored_positions


@dataclass(frozen=True)
class Agreement:
    """How far an engine's run is from the expected one."""

    exact_set: float
    kld: float
    largest: NDArray[np.float32]  # logit difference of each scored position


@dataclass(frozen=True)
class Expected:
    """A build's weights in the reference forward; the experts' sets are sorted."""

    request: EngineRequest
    local: EngineRequest  # with the routers' inputs given
    logits: NDArray[np.float32]  # [W, P, V]
    selected: Mapping[int, NDArray[np.int64]]  # [W, S, k]

    def compare(self, runs: Iterable[WindowRun]) -> Agreement:
        """Routing of all positions; predictions of the scored ones, if the engine gives them."""
        runs = list(runs)
        exact = [
            (np.sort(run.selected[layer], -1) == chosen[w]).all(-1).mean()
            for layer, chosen in self.selected.items()
            for w, run in enumerate(runs)
        ]
        found = [run.logits for run in runs if run.logits is not None]
        if not found:
            return Agreement(float(np.mean(exact)), np.nan, np.empty(0, np.float32))
        logits = np.stack(found)
        p, q = (torch.from_numpy(x).log_softmax(-1) for x in (self.logits, logits))
        kld = float((p.exp() * (p - q)).sum(-1).mean())
        return Agreement(float(np.mean(exact)), kld, np.abs(logits - self.logits).max(-1))


Expect = Callable[..., Expected]


@pytest.fixture(scope="session")
def sample_ids(sample_folder: Path) -> Callable[[int, int], NDArray[np.int64]]:
    """Windows [W, S] of the sample's evaluation text."""

    def load(windows: int, sequence: int) -> Any:
        checkpoint = open_checkpoint(sample_folder)
        text = sample_folder.parent / "evaluation.jsonl"
        tokens = windows * sequence
        return load_windows(
            [text], checkpoint.assets, checkpoint.config, tokens=tokens, sequence=sequence
        ).ids

    return load


@pytest.fixture(scope="session")
def expect() -> Expect:
    """Run a build's weights through the reference forward."""

    def run(path: Path, format: str, ids: NDArray[np.int64]) -> Expected:
        reader = FORMATS[format].open_reader(path)
        model = Model(reader.config, reader.read)
        part = scored_positions(ids.shape[1])
        states = embed(model, ids)
        inputs, selected = {}, {}
        for layer, (mixer, feed_forward) in enumerate(model_blocks(reader.config)):
            states, _ = run_block(model, mixer, states)
            x = normed(model, feed_forward.norm, states)
            states, routing = run_block(model, feed_forward, states)
            if routing is not None:
                inputs[layer] = x.view_as(states).numpy()
                selected[layer] = np.sort(routing.selected.view(*ids.shape, -1).numpy(), -1)
        hidden = normed(model, "model.embedding_norm.weight", states).view_as(states)[:, part]
        logits = (hidden @ model.weight("model.embed_tokens.weight").T).numpy()
        request = EngineRequest(path, ids, part, threads=1)
        return Expected(request, EngineRequest(path, ids, part, inputs, 1), logits, selected)

    return run


@pytest.fixture(scope="session")
def convert_sample(
    sample_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """A build of the sample, rounded to nearest; the recipe is a name or TOML."""

    @cache
    def make(recipe: str, format: str) -> Path:
        folder = tmp_path_factory.mktemp("build")
        if "=" in recipe:
            (folder / "recipe.toml").write_text(recipe)
            recipe = str(folder / "recipe.toml")
        checkpoint, loaded = open_checkpoint(sample_folder), load_recipe(recipe)
        plan = resolve_plan(checkpoint.config, loaded)
        chosen, execution = {format: FORMATS[format]}, Execution(threads=1)
        (build,) = convert(checkpoint, loaded, plan, chosen, folder, execution=execution).builds
        return build.path

    return make
