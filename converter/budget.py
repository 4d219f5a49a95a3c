"""Which expert weights get 8 bits: the most fidelity that a number of bytes buys.

The weights that must share a width form groups; each format names its own (``WIDTHS``), and a
plan for several formats takes the finest groups that all of them can hold. Moving a group from 4
to 8 bits costs bytes and wins predicted KL divergence: what its weights lose at each width
(``lfmq.converter.statistics``), times what an error of its layer costs at the head. Every weight
of an expert has the same number of entries, so all groups of one granularity cost the same and
taking them by gain a byte solves the knapsack exactly.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfmq.converter.checkpoint import Checkpoint
from lfmq.converter.collect import collect
from lfmq.converter.memory import parse_bytes
from lfmq.converter.plan import resolve_plan
from lfmq.converter.recipe import Recipe, parse_recipe
from lfmq.converter.statistics import LOSS_BITS, Statistics, has_losses
from lfmq.converter.text import Windows
from lfmq.formats.build import Assets, Format
from lfmq.quant.errors import RecipeError, ValidationError
from lfmq.quant.types import EXPERT_ROLES, Entry, Geometry, Plan, Role

_PER_WEIGHT = re.compile(r"(\d+(?:\.\d+)?)\s*bpw", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit on the size of each build: bytes, or bits per weight."""

    amount: float
    per_weight: bool

    def nbytes(self, weights: int) -> int:
        """The limit for a model of that many weights, bytes."""
        return int(self.amount * weights / 8) if self.per_weight else int(self.amount)


def parse_budget(text: str) -> Budget:
    """``5.69bpw``, ``6.1GB``, ``5800MiB`` or plain bytes.

    Raises:
        RecipeError: it is none of these.
    """
    found = _PER_WEIGHT.fullmatch(text.strip())
    if found and float(found[1]):
        return Budget(float(found[1]), True)
    try:
        return Budget(parse_bytes(text), False)
    except RecipeError as error:
        raise RecipeError(
            f"budget {text!r}: expected bits per weight (5.69bpw) or bytes (6.1GB, 5800MiB)"
        ) from error


@dataclass(frozen=True, slots=True)
class Group:
    """Expert weights that share a width.

    Attributes:
        layer: of the model.
        label: of the group in the layer, as tables show it.
        entries: its weights.
        kld: predicted contribution at each width of ``LOSS_BITS``, nats.
    """

    layer: int
    label: str
    entries: tuple[Entry, ...]
    kld: tuple[float, ...]

    @property
    def gain(self) -> float:
        """What 8 bits win over 4, nats for each weight."""
        return (self.kld[0] - self.kld[1]) / sum(e.size for e in self.entries)


@dataclass(frozen=True, slots=True)
class Widths:
    """A recipe with its widths settled.

    Attributes:
        recipe: with a budget, the base's rules and those the choice adds; its text can be saved.
        plan: the recipe resolved.
        groups: what the budget chose among, by layer; empty without one.
        wide: indices of the groups at 8 bits.
        kld: predicted mean KL divergence of the build, nats; None without losses to tell from.
    """

    recipe: Recipe
    plan: Plan
    groups: tuple[Group, ...] = ()
    wide: frozenset[int] = frozenset()
    kld: float | None = None

    def to_json(self) -> dict[str, Any]:
        """What ``plan`` and ``convert`` report of it."""
        if self.kld is None:
            return {}
        return {
            "predicted_kld": self.kld,
            "widths": [
                {
                    "layer": group.layer,
                    "group": group.label,
                    "bits": LOSS_BITS[index in self.wide],
                    "kld": dict(zip(map(str, LOSS_BITS), group.kld, strict=True)),
                }
                for index, group in enumerate(self.groups)
            ],
        }


def settle_widths(
    checkpoint: Checkpoint,
    recipe: Recipe,
    formats: Mapping[str, Format],
    statistics: Statistics | None,
    budget: str | None = None,
    *,
    windows: Windows | None = None,
    threads: int = 2,
    device: str = "cpu",
) -> Widths:
    """Resolve a recipe; where it or ``budget`` sets a limit, choose the widths of experts.

    Args:
        checkpoint: what is to be converted.
        recipe: the base.
        formats: that have to hold the plan, by name.
        statistics: of the checkpoint; with a budget and without them they are gathered.
        budget: takes the place of the recipe's.
        windows: the text to gather statistics from.
        threads: for gathering.
        device: for gathering.

    Raises:
        RecipeError: the budget is not one, is too small, or there is nothing to choose by.
        ValidationError: the statistics hold no losses.
    """
    limit = budget or recipe.budget
    geometry = checkpoint.geometry
    if limit is None:
        plan = resolve_plan(geometry, recipe)
        kld = predicted_kld(statistics, plan) if statistics else None
        return Widths(recipe, plan, kld=kld)
    found = parse_budget(limit)
    if statistics is None:
        if windows is None:
            raise RecipeError(
                f"recipe {recipe.name}: widths for a budget of {limit} are chosen by statistics; "
                "give --statistics FILE, made by lfmq calibrate"
            )
        statistics, _ = collect(checkpoint, windows, threads=threads, device=device)
    return choose_widths(geometry, checkpoint.assets, recipe, statistics, found, formats)


def save_recipe(path: Path, recipe: Recipe) -> None:
    """Write a recipe's text, to be given as ``--recipe``.

    Raises:
        RecipeError: it exists or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(recipe.text)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written ({error.strerror})") from error


def predicted_kld(statistics: Statistics, plan: Plan) -> float | None:
    """Mean KL divergence of a plan, nats; None when it cannot be told.

    The shared weights count as at 8 bits, whatever their storage; an expert's floats cost nothing.
    """
    if not has_losses(statistics, plan.geometry):
        return None
    assert statistics.shared is not None
    total = statistics.shared.kld
    for entry in plan.entries:
        if entry.role in EXPERT_ROLES and entry.scheme is not None:
            if entry.scheme.bits not in LOSS_BITS:
                return None
            assert entry.layer is not None
            width = LOSS_BITS.index(entry.scheme.bits)
            total += _klds(statistics, entry.layer, [entry])[width]
    return total


def width_groups(
    plan: Plan, statistics: Statistics, formats: Mapping[str, Format]
) -> tuple[Group, ...]:
    """The finest groups that all formats can hold."""
    parts = {module.WIDTHS for module in formats.values()} - {"weight"}
    if "layer" in parts or {"expert", "stack"} <= parts:
        parts = {"layer"}
    groups: dict[tuple[int, str], list[Entry]] = {}
    for entry in plan.entries:
        if entry.role in EXPERT_ROLES:
            assert entry.layer is not None
            labels = [f"expert {entry.expert}"] if parts <= {"expert"} else []
            labels += [entry.role.value] if parts <= {"stack"} else []
            label = ", ".join(labels) or "experts"
            groups.setdefault((entry.layer, label), []).append(entry)
    return tuple(
        Group(layer, label, tuple(entries), _klds(statistics, layer, entries))
        for (layer, label), entries in groups.items()
    )


def _klds(statistics: Statistics, layer: int, entries: Iterable[Entry]) -> tuple[float, ...]:
    found = statistics.layers[layer]
    each = found.kld / (found.error * statistics.tokens) if found.error else 0.0
    losses = [statistics.losses[e.name] for e in entries]
    return tuple(each * sum(loss[i] for loss in losses) for i in range(len(LOSS_BITS)))


def choose_widths(
    geometry: Geometry,
    assets: Assets,
    base: Recipe,
    statistics: Statistics,
    budget: Budget,
    formats: Mapping[str, Format],
) -> Widths:
    """Give 8 bits to the groups that win most, as far as the budget of every format goes.

    Raises:
        RecipeError: the budget is below the size at 4 bits.
        ValidationError: the statistics hold no losses.
    """
    if not has_losses(statistics, geometry):
        raise ValidationError(
            "the statistics hold no losses of experts, so no widths can be chosen from them "
            "(an imatrix has none); make them with lfmq calibrate"
        )
    narrow = _with_rules(base, ['[[rule]]\nroles = ["experts"]\nbits = 4'])
    plan = resolve_plan(geometry, narrow)
    groups = width_groups(plan, statistics, formats)
    limit = budget.nbytes(sum(e.size for e in plan.entries))
    order = sorted(range(len(groups)), key=lambda i: (-groups[i].gain, i))
    sizes = _sizes(geometry, assets, narrow, formats)
    name, least = max(sizes.items(), key=lambda item: item[1])
    if least > limit:
        raise RecipeError(
            f"budget of {limit:,} bytes: {name} needs {least:,} bytes with all experts at 4 bits; "
            "raise the budget or give the shared weights fewer bits"
        )
    room = (limit - least) * 8 // (LOSS_BITS[1] - LOSS_BITS[0])  # weights that can be widened
    count = min(len(order), room // max(1, sum(e.size for e in groups[0].entries)))
    recipe = _chosen(base, groups, order[:count])
    while max(_sizes(geometry, assets, recipe, formats).values()) > limit:
        count -= 1  # headers grow a little with every exception
        recipe = _chosen(base, groups, order[:count])
    wide = frozenset(order[:count])
    plan = resolve_plan(geometry, recipe)
    return Widths(recipe, plan, groups, wide, predicted_kld(statistics, plan))


def _sizes(
    geometry: Geometry, assets: Assets, recipe: Recipe, formats: Mapping[str, Format]
) -> dict[str, int]:
    plan = resolve_plan(geometry, recipe)
    for module in formats.values():
        module.check(plan, assets)
    return {name: f.layout(plan, assets).nbytes for name, f in formats.items()}


def _chosen(base: Recipe, groups: tuple[Group, ...], wide: Iterable[int]) -> Recipe:
    """The base, all experts at 4 bits, and 8 for the groups."""
    rules = ['[[rule]]\nroles = ["experts"]\nbits = 4']
    experts: dict[tuple[int, Role], list[int]] = {}
    for index in sorted(wide):
        for e in groups[index].entries:
            assert e.layer is not None
            assert e.expert is not None
            experts.setdefault((e.layer, e.role), []).append(e.expert)
    roles: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for (layer, role), found in experts.items():
        roles.setdefault((layer, tuple(sorted(found))), []).append(role.value)
    everyone = max((e.expert or 0 for g in groups for e in g.entries), default=0) + 1
    for (layer, chosen), names in sorted(roles.items()):
        rule = f"[[rule]]\nroles = {_toml(names)}\nlayers = [{layer}]\n"
        rule += "" if len(chosen) == everyone else f"experts = {list(chosen)}\n"
        rules.append(rule + "bits = 8")
    return _with_rules(base, rules)


def _toml(words: list[str]) -> str:
    return "[" + ", ".join(f'"{w}"' for w in words) + "]"


def _with_rules(base: Recipe, rules: list[str]) -> Recipe:
    """The base without its own budget, and more rules."""
    text = re.sub(r"(?m)^budget\s*=.*\n", "", base.text)
    name = base.name if base.budget else f"{base.name}-mixed"
    return parse_recipe("\n\n".join([text.rstrip(), *rules]) + "\n", name, name)
