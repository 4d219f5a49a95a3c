"""A recipe with its widths settled; importing it needs neither torch nor a compiler."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lfmq.converter.plan.recipe import Recipe
from lfmq.formats.plan import Plan

if TYPE_CHECKING:
    from lfmq.converter.mixed_precision.width_groups import WidthGroup

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class Widths:
    """A recipe with its widths settled.

    Attributes:
        recipe: with limits, the base's rules and those the choice adds; its text can be saved.
        plan: the recipe resolved.
        units: what was chosen among, by layer; empty without limits.
        choice: for each unit the index of its scheme.
        kld: predicted mean KL divergence of the build, nats; None without losses to tell from.
    """

    recipe: Recipe
    plan: Plan
    units: "tuple[WidthGroup, ...]" = ()
    choice: tuple[int, ...] = ()
    kld: float | None = None

    @property
    def routed(self) -> float:
        """The squared routed divergence of what was chosen."""
        return sum(u.costs[i].routed for u, i in zip(self.units, self.choice, strict=True))

    def to_json(self) -> dict[str, Any]:
        """What ``plan`` and ``convert`` report of it."""
        if self.kld is None:
            return {}
        return {
            "predicted_kld": self.kld,
            "widths": [
                {
                    "layer": unit.layer,
                    "group": unit.label,
                    "storage": str(unit.schemes[index]),
                    "kld": {
                        str(scheme): unit.marginal(i, self.routed)
                        for i, scheme in enumerate(unit.schemes)
                    },
                }
                for unit, index in zip(self.units, self.choice, strict=True)
            ],
        }
