"""A dry run: what every tensor is stored as, and how large every build will be."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfmq.api.checkpoint import Source, opened
from lfmq.api.target import FormatNames, RecipeSource, Target, known_statistics, settle
from lfmq.converter.mixed_precision.widths import Widths
from lfmq.converter.plan.builtin import DEFAULT_RECIPE
from lfmq.converter.plan.plan import RoleSummary, State, state_bytes, summarize
from lfmq.converter.plan.recipe import save_recipe
from lfmq.converter.run.planned import PlannedBuild, plan_builds

if TYPE_CHECKING:
    from lfmq.converter.statistics.statistics import Statistics


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What a conversion would write.

    Attributes:
        widths: the recipe, and the storage of every tensor.
        builds: the size of each build, or why its container refuses the plan.
        state: bytes of the KV and convolution cache.
    """

    widths: Widths
    builds: tuple[PlannedBuild, ...]
    state: State

    @property
    def roles(self) -> tuple[RoleSummary, ...]:
        """The storage of every role, with its number of tensors and weights."""
        return summarize(self.widths.plan)

    def to_json(self) -> dict[str, Any]:
        """What ``lfmq plan --json`` prints."""
        return {
            "recipe": self.widths.plan.recipe,
            "builds": [build.to_json() for build in self.builds],
            "state": self.state.to_json(),
            **self.widths.to_json(),
            "tensors": [
                {"name": e.name, "shape": e.shape, "storage": str(e.storage)}
                for e in self.widths.plan.entries
            ],
        }


def plan(
    checkpoint: Source,
    *,
    recipe: RecipeSource = DEFAULT_RECIPE,
    to: FormatNames = (),
    budget: str | None = None,
    budget_bytes: str | None = None,
    budget_token_bytes: str | None = None,
    statistics: "Statistics | str | PathLike[str] | None" = None,
    save: str | PathLike[str] | None = None,
    context: int = 4096,
) -> PlanReport:
    """Work out the storage of every tensor and the size of every build; no weight is read.

    Args:
        checkpoint: a checkpoint, or what :func:`lfmq.open_checkpoint` takes.
        recipe: a recipe, its built-in name or its TOML file.
        to: containers by name (``gguf``, ``mlx``, ``onnx``, ``compressed-tensors``); default: all.
        budget: maximum size of each build, for instance ``6.1GB`` or ``5.69bpw``; experts are
            raised from 4 to 8 bits until it is used up. Needs statistics.
        budget_bytes: maximum size of each build; every weight gets the grid that serves it best.
        budget_token_bytes: maximum bytes of weights read for each decoded token.
        statistics: of the checkpoint, or the file of ``calibrate`` or of llama.cpp's imatrix.
        save: write the recipe with the chosen widths there.
        context: context length in tokens for which the cache size is reported.

    Raises:
        CheckpointError: the checkpoint cannot be opened.
        RecipeError: the recipe is not one, a limit cannot be kept, or ``save`` cannot be written.
        UsageError: there is no such container.
        ValidationError: the statistics are not of this checkpoint.
    """
    source = opened(checkpoint)
    target = Target(recipe, to, budget, budget_bytes, budget_token_bytes)
    widths = settle(source, target, known_statistics(source, statistics))
    state = state_bytes(source.config, context)
    builds = plan_builds(source, widths.plan, target.formats)
    if save is not None:
        save_recipe(Path(save), widths.recipe)
    return PlanReport(widths, builds, state)
