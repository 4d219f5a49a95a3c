"""Which builds are asked for: a recipe with its limits, and the containers that must hold it."""

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.jobs.execution import Execution
from lfmq.converter.mixed_precision.widths import Widths
from lfmq.converter.plan.builtin import DEFAULT_RECIPE
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import Recipe
from lfmq.converter.plan.recipe import load_recipe as read_recipe
from lfmq.formats.build import Format
from lfmq.formats.registry import FORMATS
from lfmq.quant.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from lfmq.converter.model.text import Windows
    from lfmq.converter.statistics.statistics import Statistics

# A recipe, its built-in name or its file.
RecipeSource = Recipe | str | PathLike[str]
# One container's name, or several; none stands for all.
FormatNames = str | Iterable[str]


def load_recipe(name_or_path: str | PathLike[str]) -> Recipe:
    """Read a built-in recipe by its name, or a TOML file.

    Raises:
        RecipeError: no such recipe, not TOML, an unknown key or an illegal value.
    """
    return read_recipe(fspath(name_or_path))


@dataclass(frozen=True, slots=True)
class Target:
    """Which builds.

    Attributes:
        recipe: a recipe, its built-in name or its file.
        to: containers by name; none stands for all.
        budget: limit of each build's size, within which experts get 8 bits in place of 4.
        budget_bytes: limit of each build's size, within which every weight gets its grid.
        budget_token_bytes: limit of the bytes of weights read for each decoded token.
    """

    recipe: RecipeSource = DEFAULT_RECIPE
    to: FormatNames = ()
    budget: str | None = None
    budget_bytes: str | None = None
    budget_token_bytes: str | None = None

    @property
    def base(self) -> Recipe:
        """The recipe, with these limits in place of its own.

        Raises:
            RecipeError: it cannot be read, or two kinds of limits are given.
        """
        recipe = self.recipe if isinstance(self.recipe, Recipe) else load_recipe(self.recipe)
        every = {"budget": self.budget_bytes, "token_budget": self.budget_token_bytes}
        given = {key: value for key, value in every.items() if value is not None}
        if given and self.budget is not None:
            raise RecipeError(
                "--budget chooses among experts alone; give --budget-bytes in its place"
            )
        if given:
            return recipe.limited(**given, choose="all")
        return recipe if self.budget is None else recipe.limited(budget=self.budget)

    @property
    def formats(self) -> dict[str, Format]:
        """The containers by name.

        Raises:
            UsageError: there is no such container.
        """
        names = (self.to,) if isinstance(self.to, str) else tuple(self.to)
        for name in names:
            if name not in FORMATS:
                raise UsageError(f"--to {name}: there is {', '.join(FORMATS)}")
        return {name: FORMATS[name] for name in dict.fromkeys(names or FORMATS)}


def known_statistics(
    checkpoint: Checkpoint, statistics: "Statistics | str | PathLike[str] | None"
) -> "Statistics | None":
    """Statistics as given, or read from a file of ``calibrate`` or llama.cpp's imatrix.

    Raises:
        ValidationError: the file is neither, damaged, or of another checkpoint.
    """
    if not isinstance(statistics, str | PathLike):
        return statistics
    from lfmq.converter.statistics.calibrate import open_statistics  # imports torch

    return open_statistics(Path(statistics), checkpoint.config)


def settle(
    checkpoint: Checkpoint,
    target: Target,
    statistics: "Statistics | None",
    *,
    windows: "Windows | None" = None,
    execution: Execution = Execution(),
) -> Widths:
    """Resolve the recipe; where there is a limit, choose the widths.

    Args:
        checkpoint: what is to be converted.
        target: the recipe and the containers.
        statistics: of the checkpoint, what widths are chosen by.
        windows: text to gather statistics from where a limit needs them and none are given.
        execution: of gathering them.

    Raises:
        RecipeError: a limit is not one, is too small, or there is nothing to choose by.
        ValidationError: the statistics hold no losses.
    """
    recipe = target.base
    if recipe.budget is None and recipe.token_budget is None and statistics is None:
        return Widths(recipe, resolve_plan(checkpoint.config, recipe))
    from lfmq.converter.mixed_precision.budget import settle_widths  # imports torch

    return settle_widths(
        checkpoint, recipe, target.formats, statistics, windows=windows, execution=execution
    )
