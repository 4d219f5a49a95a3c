"""The best predicted fidelity over size and over bytes a token, with other builds as landmarks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.mixed_precision.budget import Choices, open_choices, settle_widths
from lfmq.converter.mixed_precision.predicted_kld import Cost, Prediction
from lfmq.converter.mixed_precision.size_limits import Limits
from lfmq.converter.model.tensors import expected_tensors
from lfmq.converter.plan.builtin import builtin_recipes
from lfmq.converter.plan.plan import token_bytes
from lfmq.converter.plan.presets import PEERS, peer_bytes, peer_schemes
from lfmq.converter.plan.recipe import Recipe, load_recipe, parse_recipe
from lfmq.converter.statistics.statistics import Statistics
from lfmq.formats.build import Format
from lfmq.formats.plan import FLOAT_ROLES
from lfmq.quant.errors import LfmqError

_POINTS = 16
_BASE = "[[rule]]\nbits = 4\n"


@dataclass(frozen=True, slots=True)
class Point:
    """A build that could be made, or that another tool makes.

    Attributes:
        name: of the recipe or the type; of a point of the frontier its number.
        kind: ``size`` and ``token``, which are the frontiers, ``recipe`` or ``peer``.
        nbytes: of the build.
        token_bytes: read for a token.
        kld: predicted mean KL divergence, nats; None where it cannot be told.
        recipe: that makes it; None for another tool's.
    """

    name: str
    kind: str
    nbytes: int
    token_bytes: int
    kld: float | None
    recipe: Recipe | None = None

    def to_json(self) -> dict[str, Any]:
        """An object of ``points`` in ``lfmq frontier --json``."""
        return {
            "name": self.name,
            "kind": self.kind,
            "bytes": self.nbytes,
            "bytes_per_token": self.token_bytes,
            "predicted_kld": self.kld,
        }


@dataclass(frozen=True, slots=True)
class Frontier:
    """All points of one format."""

    checkpoint: str
    format: str
    weights: int
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        """What ``lfmq frontier --json`` prints."""
        return {
            "checkpoint": self.checkpoint,
            "format": self.format,
            "weights": self.weights,
            "points": [point.to_json() for point in self.points],
        }

    def recipe(self, number: int) -> Recipe:
        """That of a point of the frontier, by its number from 1.

        Raises:
            LfmqError: there is no such point.
        """
        for point in self.points:
            if point.name == str(number) and point.recipe is not None:
                return point.recipe
        most = sum(point.kind in ("size", "token") for point in self.points)
        raise LfmqError(f"point {number}: the frontier's points are numbered 1 to {most}")


def trace_frontier(
    checkpoint: Checkpoint, statistics: Statistics, name: str, module: Format
) -> Frontier:
    """Choose within limits from the least to the most that a format's builds can take.

    Args:
        checkpoint: whose sizes count; no weight is read.
        statistics: of the checkpoint.
        name: of the format.
        module: the format.

    Raises:
        ValidationError: the statistics hold no losses.
        UnsupportedError: the format cannot hold the model.
    """
    base = parse_recipe(f'choose = "all"\n\n{_BASE}', "frontier", "frontier")
    choices = open_choices(checkpoint.config, checkpoint.assets, base, statistics, {name: module})
    found = [*_traced(choices, name, 0), *_traced(choices, name, 1)]
    numbered = [
        Point(str(number), kind, *_taken(choices, name, choice), choices.kld(choice), recipe)
        for number, (kind, choice) in enumerate(found, 1)
        for recipe in (choices.recipe(choice),)
    ]
    recipes = list(_recipes(checkpoint, statistics, name, module))
    named = {point.name for point in recipes}
    others = [peer for peer in PEERS if peer not in named]  # a recipe of that name is the same
    peers = _peers(checkpoint, statistics, others, choices.rest[name][0])
    weights = sum(e.size for e in choices.plan.entries)
    return Frontier(checkpoint.assets.name, name, weights, (*numbered, *recipes, *peers))


def _traced(choices: Choices, name: str, kind: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Choices from the fewest bytes, all or a token, to what the best of all takes."""
    takes, rest = choices.takes[name][kind], choices.rest[name][kind]
    costs = [[cost.direct + cost.routed for cost in unit.costs] for unit in choices.units]
    best = tuple(min(range(len(row)), key=row.__getitem__) for row in costs)
    least = takes.min(1).sum() + rest
    most = sum(takes[row, index] for row, index in enumerate(best)) + rest
    seen: set[tuple[int, ...]] = set()
    for step in range(_POINTS):
        limit = least * (most / least) ** (step / (_POINTS - 1)) + 1
        given = {name: float(limit)}
        choice = choices.choose(Limits({}, given) if kind else Limits(given, {}))
        if choice is not None and choice not in seen:
            seen.add(choice)
            yield ("token" if kind else "size"), choice


def _taken(choices: Choices, name: str, choice: Iterable[int]) -> tuple[int, int]:
    """Bytes of a choice, all and for a token; headers as without it."""
    chosen = list(enumerate(choice))
    nbytes, token = (
        int(sum(takes[row, index] for row, index in chosen) + rest)
        for takes, rest in zip(choices.takes[name], choices.rest[name], strict=True)
    )
    return nbytes, token


def _recipes(
    checkpoint: Checkpoint, statistics: Statistics, name: str, module: Format
) -> Iterator[Point]:
    """The built-in recipes that the format can hold."""
    for recipe in builtin_recipes():
        try:
            widths = settle_widths(checkpoint, load_recipe(recipe), {name: module}, statistics)
            module.check(widths.plan, checkpoint.assets)
        except LfmqError:
            continue
        layout = module.layout(widths.plan, checkpoint.assets)
        token = token_bytes(widths.plan, layout)
        yield Point(recipe, "recipe", layout.nbytes, token, widths.kld, widths.recipe)


def _peers(
    checkpoint: Checkpoint, statistics: Statistics, names: Iterable[str], rest: float
) -> Iterator[Point]:
    """Other tools' builds, calibrated as ours are; header and tokenizer as in ours."""
    config = checkpoint.config
    prediction = Prediction(statistics, config)
    tensors = expected_tensors(config)
    floats = 4 * sum(t.size for t in tensors if t.role in FLOAT_ROLES)
    for peer in names:
        total: Cost | None = Cost()
        schemes = peer_schemes(peer, config)
        for tensor in tensors:
            scheme = schemes[tensor.name]
            if scheme is None or tensor.role in FLOAT_ROLES:
                continue
            cost = prediction.cost(tensor, scheme)
            total = total + cost if total is not None and cost is not None else None
        nbytes, token = peer_bytes(peer, config)
        kld = total.kld if total is not None else None
        yield Point(peer, "peer", int(nbytes + max(0.0, rest - floats)), token, kld)
