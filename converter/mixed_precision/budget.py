"""Which grid each weight gets: the most fidelity that a number of bytes buys.

Weights that must share a grid form units; each format names its own for experts (``WIDTHS``), and
a plan for several formats takes the finest units that all of them can hold. Every choice of a
unit takes bytes, all in all and of those read for a token, and costs KL divergence
(:mod:`.predicted_kld`); :mod:`.knapsack` finds the least cost within limits.

A ``budget`` chooses 4 or 8 bits for experts (of a dense model, for its feed-forward) and leaves
the other weights to the recipe. A recipe that says ``choose = "all"`` has every weight chosen,
among all grids that the format holds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.jobs.execution import Execution
from lfmq.converter.mixed_precision.knapsack import allocate
from lfmq.converter.mixed_precision.predicted_kld import Cost, Prediction
from lfmq.converter.mixed_precision.size_limits import Limits, limits_of
from lfmq.converter.mixed_precision.width_groups import (
    FormatBytes,
    WidthGroup,
    budget_groups,
    chosen_rules,
    expert_groups,
    format_costs,
    rest_bytes,
    shared_groups,
)
from lfmq.converter.mixed_precision.widths import Widths
from lfmq.converter.model.text import Windows
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import Recipe
from lfmq.converter.statistics.collect import collect
from lfmq.converter.statistics.statistics import SCHEMES, Statistics, has_losses
from lfmq.formats.build import Assets, Format
from lfmq.formats.plan import ModelConfig, Plan, TensorPlan
from lfmq.quant.errors import RecipeError, ValidationError
from lfmq.quant.types import Scheme

_SYMMETRIC = (Scheme(4), Scheme(8))
# How often a choice is made again with the routed divergence as the last one found it.
_ROUNDS = 6


def settle_widths(
    checkpoint: Checkpoint,
    recipe: Recipe,
    formats: Mapping[str, Format],
    statistics: Statistics | None,
    budget: str | None = None,
    *,
    windows: Windows | None = None,
    execution: Execution = Execution(),
) -> Widths:
    """Resolve a recipe; where it or ``budget`` sets a limit, choose the widths.

    Args:
        checkpoint: what is to be converted.
        recipe: the base.
        formats: that have to hold the plan, by name.
        statistics: of the checkpoint; with a limit and without them they are gathered.
        budget: takes the place of the recipe's.
        windows: the text to gather statistics from.
        execution: of gathering them.

    Raises:
        RecipeError: a limit is not one, is too small, or there is nothing to choose by.
        ValidationError: the statistics hold no losses.
    """
    config = checkpoint.config
    if budget is not None:
        recipe = recipe.limited(budget=budget)
    if recipe.budget is None and recipe.token_budget is None:
        plan = resolve_plan(config, recipe)
        return Widths(recipe, plan, kld=predicted_kld(statistics, plan) if statistics else None)
    if statistics is None and windows is None:
        raise RecipeError(
            f"recipe {recipe.name}: widths for a budget are chosen by statistics; "
            "give --statistics FILE, made by lfmq calibrate"
        )
    limits = limits_of(recipe, config, checkpoint.assets, formats)  # refuses before the work
    if statistics is None:
        assert windows is not None
        statistics, _ = collect(checkpoint, windows, execution=execution)
    return choose_widths(config, checkpoint.assets, recipe, statistics, limits, formats)


def predicted_kld(statistics: Statistics, plan: Plan) -> float | None:
    """Mean KL divergence of a plan, nats; None when it cannot be told. Floats cost nothing."""
    if not has_losses(statistics, plan.config):
        return None
    return Prediction(statistics, plan.config).kld(plan)


@dataclass(frozen=True)
class Choices:
    """Everything a choice is made from; limits apart, so that many can be tried.

    Attributes:
        base: the recipe that rules are added to.
        plan: with every unit at the fewest bits.
        units: what is chosen among.
        fixed: what is not chosen.
        takes: bytes of each unit's schemes, by format, all and read for a token.
        rest: by format, bytes that no choice changes, all and read for a token.
    """

    base: Recipe
    plan: Plan
    units: tuple[WidthGroup, ...]
    fixed: Cost
    takes: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
    rest: Mapping[str, tuple[float, float]]

    def choose(self, limits: Limits) -> tuple[int, ...] | None:
        """The scheme of each unit; None where no choice keeps the limits."""
        takes, room = [], []
        for kind, given in enumerate((limits.nbytes, limits.token)):
            for name, limit in given.items():
                takes.append(self.takes[name][kind])
                room.append(limit - self.rest[name][kind])
        if any(r <= 0 for r in room):
            return None
        best: tuple[int, ...] | None = None
        routed = self._routed(tuple(0 for _ in self.units))
        for _ in range(_ROUNDS):
            cost = np.full(takes[0].shape if takes else (len(self.units), 1), np.inf)
            for row, unit in enumerate(self.units):
                for index in range(len(unit.schemes)):
                    cost[row, index] = unit.marginal(index, routed)
            found = allocate(cost, np.stack(takes), np.array(room))
            if found is None:
                return None
            choice = tuple(int(i) for i in found)
            if best is not None and self.kld(choice) >= self.kld(best):
                break
            best, routed = choice, self._routed(choice)
        return best

    def kld(self, choice: tuple[int, ...]) -> float:
        """Predicted mean KL divergence, nats."""
        total = self.fixed
        for unit, index in zip(self.units, choice, strict=True):
            total += unit.costs[index]
        return total.kld

    def _routed(self, choice: tuple[int, ...]) -> float:
        found = self.fixed.routed
        return found + sum(u.costs[i].routed for u, i in zip(self.units, choice, strict=True))

    def recipe(self, choice: tuple[int, ...]) -> Recipe:
        """The base and rules for every unit."""
        schemes = [u.schemes[i] for u, i in zip(self.units, choice, strict=True)]
        rules = chosen_rules(self.units, schemes, self.plan.config.num_experts)
        return self.base.with_rules(rules)


def open_choices(
    config: ModelConfig,
    assets: Assets,
    base: Recipe,
    statistics: Statistics,
    formats: Mapping[str, Format],
) -> Choices:
    """What can be chosen, what it costs and what it takes.

    Args:
        config: of the model.
        assets: of the checkpoint.
        base: the recipe that rules are added to.
        statistics: of the checkpoint.
        formats: that have to hold every choice, by name.

    Raises:
        ValidationError: the statistics hold no losses.
    """
    if not has_losses(statistics, config):
        raise ValidationError(
            "the statistics hold no losses of weights, so no widths can be chosen from them "
            "(an imatrix has none); make them with lfmq calibrate"
        )
    everything = base.choose == "all"
    rules = [] if everything else ['[[rule]]\nroles = ["experts"]\nbits = 4']
    plan = resolve_plan(config, base.with_rules(rules))
    units = budget_groups(plan, formats)
    if everything:
        units = expert_groups(plan, formats) + shared_groups(plan, formats)
    named = {e.name for unit in units for e in unit.entries}
    candidates = _candidates(everything)
    bytes_at = {name: _bytes_at(plan, assets, f, candidates) for name, f in formats.items()}
    schemes = [s for s in candidates if all(s in found for found in bytes_at.values())]
    prediction = Prediction(statistics, config)
    priced = []
    for unit in units:
        costs = [_total(prediction, unit.entries, scheme) for scheme in schemes]
        priced.append(replace(unit, schemes=tuple(schemes), costs=tuple(costs)))
    fixed = Cost()
    for entry in plan.entries:
        if entry.name not in named and entry.scheme is not None:
            fixed += prediction.cost(entry, entry.scheme) or Cost()
    takes = {
        name: tuple(
            np.array(
                [[sum(getattr(found[s], kind)[e.name] for e in u.entries) for s in schemes]
                 for u in priced]
            )
            for kind in ("nbytes", "token")
        )
        for name, found in bytes_at.items()
    }  # fmt: skip
    rest = {
        name: rest_bytes(plan, module.layout(plan, assets), named)
        for name, module in formats.items()
    }
    return Choices(base, plan, tuple(priced), fixed, takes, rest)  # type: ignore[arg-type]


def _bytes_at(
    plan: Plan, assets: Assets, module: Format, candidates: Iterable[Scheme]
) -> dict[Scheme, FormatBytes]:
    """What every weight takes on each grid that the format holds."""
    found = {s: format_costs(plan, assets, module, s) for s in candidates}
    return {scheme: costs for scheme, costs in found.items() if costs is not None}


def _candidates(everything: bool) -> tuple[Scheme, ...]:
    return SCHEMES if everything else _SYMMETRIC


def _total(prediction: Prediction, entries: Iterable[TensorPlan], scheme: Scheme) -> Cost:
    total = Cost()
    for entry in entries:
        cost = prediction.cost(entry, scheme)
        assert cost is not None
        total += cost
    return total


def choose_widths(
    config: ModelConfig,
    assets: Assets,
    base: Recipe,
    statistics: Statistics,
    limits: Limits,
    formats: Mapping[str, Format],
) -> Widths:
    """The choice of least predicted divergence within the limits of every format.

    Args:
        config: of the model.
        assets: of the checkpoint.
        base: the recipe that rules are added to.
        statistics: of the checkpoint.
        limits: bytes of each format's build.
        formats: that have to hold the choice, by name.

    Raises:
        RecipeError: a limit is below what the smallest choice takes.
        ValidationError: the statistics hold no losses.
    """
    choices = open_choices(config, assets, base, statistics, formats)
    slack = dict.fromkeys(formats, 0.0)
    while True:
        tight = Limits({n: b - slack[n] for n, b in limits.nbytes.items()}, limits.token)
        choice = choices.choose(tight)
        if choice is None:
            raise _too_small(choices, assets, limits, formats)
        recipe = choices.recipe(choice)
        plan = resolve_plan(config, recipe)
        over = {}
        for name, module in formats.items():
            module.check(plan, assets)
            nbytes = module.layout(plan, assets).nbytes
            if nbytes > limits.nbytes.get(name, nbytes):
                over[name] = nbytes - limits.nbytes[name]
        if not over:
            return Widths(recipe, plan, choices.units, choice, predicted_kld(statistics, plan))
        for name, more in over.items():  # headers grow a little with every exception
            slack[name] += more


def _too_small(
    choices: Choices, assets: Assets, limits: Limits, formats: Mapping[str, Format]
) -> RecipeError:
    for kind, given in (("", limits.nbytes), (" a token", limits.token)):
        for name, limit in given.items():
            takes, rest = choices.takes[name][bool(kind)], choices.rest[name][bool(kind)]
            least = int(takes.min(1).sum() + rest)
            if least > limit:
                return RecipeError(
                    f"budget of {int(limit):,} bytes{kind}: {name} needs {least:,} bytes{kind} "
                    "with all that is chosen at its fewest bits; raise the budget or give other "
                    "weights fewer bits"
                )
    return RecipeError("no choice keeps the limits of bytes and bytes a token together; raise one")
