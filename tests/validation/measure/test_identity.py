"""A build of other weights is not the checkpoint's, in any container, manifest or none."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from lfmq.cli import main
from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.run.convert import convert
from lfmq.formats.registry import FORMATS
from lfmq.quant.errors import ValidationError
from lfmq.validation.measure.builds import open_builds

EXPERT = "model.layers.2.feed_forward.experts.{}.{}.weight"
Tensors = dict[str, Any]
Change = Callable[[Tensors], None]


def scaled(tensors: Tensors) -> None:
    for name in tensors:
        if name.endswith("in_proj.weight"):
            tensors[name] = tensors[name] * 1.3


def shuffled(tensors: Tensors) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name][::-1].copy()


def exchanged(tensors: Tensors) -> None:
    for part in ("w1", "w2", "w3"):
        a, b = EXPERT.format(1, part), EXPERT.format(4, part)
        tensors[a], tensors[b] = tensors[b], tensors[a]


def fine_tuned(tensors: Tensors) -> None:
    """A little training: less than what rounding to 4 bits does, but in every norm and router."""
    rng = np.random.default_rng(0)
    for name, values in tensors.items():
        tensors[name] = values * (1 + 0.01 * rng.standard_normal(values.shape)).astype("f4")


def refitted(tensors: Tensors) -> None:
    """Routers as calibration changes them."""
    rng = np.random.default_rng(0)
    for name, values in tensors.items():
        if name.endswith("feed_forward.gate.weight"):
            noise = 0.1 * values.std() * rng.standard_normal(values.shape)
            tensors[name] = values + noise.astype("f4")


@pytest.fixture
def built(make_checkpoint: Any, tmp_path: Path) -> Callable[..., dict[str, Path]]:
    """Builds of a checkpoint after a change of its tensors, by container."""

    def make(change: Change | None = None, recipe: str = "int4") -> dict[str, Path]:
        name = "same" if change is None else change.__name__
        (tmp_path / name).mkdir()
        folder = make_checkpoint(f"{name}/small", change=change)
        checkpoint, loaded = open_checkpoint(folder), load_recipe(recipe)
        plan = resolve_plan(checkpoint.config, loaded)
        made = convert(checkpoint, loaded, plan, dict(FORMATS), tmp_path / name / recipe)
        return {build.format: build.path for build in made.builds}

    return make


def reasons(builds: dict[str, Path], folder: Path) -> Iterator[str]:
    checkpoint = open_checkpoint(folder)
    for path in builds.values():
        with pytest.raises(ValidationError, match="not a build of this checkpoint") as caught:
            open_builds((path,), ("read",), checkpoint)
        assert len(str(caught.value)) < 400
        (allowed,) = open_builds((path,), ("read",), checkpoint, allow_other=True)
        assert allowed.other in str(caught.value)
        assert allowed.to_json()["other_checkpoint"] == allowed.other
        yield allowed.other


@pytest.mark.parametrize("recipe", ["int4", "int8", "int4-all"])
def test_its_own_builds_are_the_checkpoints(
    recipe: str, make_checkpoint: Any, built: Callable[..., dict[str, Path]]
) -> None:
    builds = built(recipe=recipe)
    checkpoint = open_checkpoint(make_checkpoint())
    for manifest in (True, False):
        for path in builds.values():
            if not manifest:
                next(path.parent.glob("*.manifest.json"), Path("none")).unlink(missing_ok=True)
            (build,) = open_builds((path,), ("read",), checkpoint)
            assert build.other == ""


def test_a_calibrated_build_has_other_routers(
    make_checkpoint: Any, built: Callable[..., dict[str, Path]]
) -> None:
    builds, checkpoint = built(refitted), open_checkpoint(make_checkpoint())
    next(iter(builds.values())).parent.joinpath("small-int4.manifest.json").unlink()
    for path in builds.values():
        (build,) = open_builds((path,), ("read",), checkpoint)
        assert build.other == ""


@pytest.mark.parametrize("change", [scaled, shuffled, exchanged, fine_tuned])
def test_builds_of_other_weights(
    change: Change, make_checkpoint: Any, built: Callable[..., dict[str, Path]]
) -> None:
    folder, builds = make_checkpoint(), built(change)
    for reason in reasons(builds, folder):
        assert "its manifest names other weights than model.safetensors" in reason
    next(iter(builds.values())).parent.joinpath("small-int4.manifest.json").unlink()
    words = {
        "scaled": "conv.in_proj.weight differ from the checkpoint's by",
        "shuffled": "layers.1.self_attn.q_proj.weight differ",
        "exchanged": "experts.1.w1.weight differ",
        "fine_tuned": "norm.weight has other values",
    }
    for reason in reasons(builds, folder):
        assert words[change.__name__] in reason


def test_a_name_of_another_model(
    make_checkpoint: Any, built: Callable[..., dict[str, Path]]
) -> None:
    builds = built()
    builds["gguf"].parent.joinpath("small-int4.manifest.json").unlink()
    folder = make_checkpoint("Another-Model")
    for reason in reasons(builds, folder):
        assert reason == "it says that its model is 'small', the checkpoint is 'Another-Model'"


def test_the_command_says_why_and_the_option_allows_it(
    make_checkpoint: Any, built: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    folder, build = make_checkpoint(), built(exchanged)["mlx"]
    words = ["validate", folder, build, "--tokens", 128, "--sequence", 64, "--quiet", "--json"]
    result = CliRunner().invoke(main, [*map(str, words)])
    assert result.exit_code == 1
    assert "not a build of this checkpoint: its manifest names other weights" in result.stderr
    page = tmp_path / "page.html"
    result = CliRunner().invoke(main, [*map(str, words), "--allow-other", "--html", str(page)])
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)["builds"]
    assert "its manifest names other weights" in found["other_checkpoint"]
    assert "not a build of this checkpoint" in page.read_text()


def test_a_tensor_swapped_in_a_file(
    make_checkpoint: Any, built: Callable[..., dict[str, Path]]
) -> None:
    """The manifest still says what the build was made of."""
    folder, build = make_checkpoint(), built()["compressed-tensors"]
    path = build / "model.safetensors"
    tensors = load_file(path)
    for part in ("weight_packed", "weight_scale"):
        a, b = (f"model.layers.1.self_attn.{k}_proj.{part}" for k in ("k", "v"))
        tensors[a], tensors[b] = tensors[b], tensors[a]
    save_file(tensors, path)
    (reason,) = reasons({"compressed-tensors": build}, folder)
    assert "self_attn.k_proj.weight differ" in reason
    shutil.rmtree(build)
