"""What a checkpoint is and what builds will be, as tables."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lfmq.commands.console import Table, make_table

if TYPE_CHECKING:
    from lfmq.api.plan import PlanReport
    from lfmq.converter.checkpoint.inspect import Inspection
    from lfmq.converter.mixed_precision.widths import Widths
    from lfmq.converter.run.planned import PlannedBuild
    from lfmq.formats.plan import Plan


def inspection_table(report: "Inspection") -> Table:
    """Roles of a checkpoint."""
    rows = [
        (r.role, f"{r.tensors:,}", f"{r.weights:,}", f"{r.nbytes:,}", r.dtypes)
        for r in report.roles
    ]
    rows.append(("total", f"{report.tensors:,}", f"{report.weights:,}", f"{report.nbytes:,}", ""))
    return make_table(report.title, ("role", "tensors", "weights", "bytes", "dtype"), rows)


def roles_table(report: "PlanReport") -> Table:
    """The storage of every role."""
    rows = [
        (s.role.value, str(s.storage), f"{s.tensors:,}", f"{s.weights:,}") for s in report.roles
    ]
    return make_table(report.widths.plan.recipe, ("role", "stored as", "tensors", "weights"), rows)


def tensors_table(plan: "Plan") -> Table:
    """The storage of every tensor."""
    rows = [(e.name, str(list(e.shape)), str(e.storage)) for e in plan.entries]
    return make_table("tensors", ("tensor", "shape", "stored as"), rows)


def planned_table(builds: "Iterable[PlannedBuild]") -> Table:
    """Size of builds not yet written."""
    rows = [
        (b.format, f"{b.nbytes:,}", f"{b.bits_per_weight:.3f}", f"{b.bytes_per_token:,}")
        if b.refused is None
        else (b.format, "refused", "", "")
        for b in builds
    ]
    return make_table("builds", ("format", "bytes", "bits/weight", "bytes/token"), rows)


def widths_table(widths: "Widths") -> Table:
    """What each unit gets, and the KL divergence that adds."""
    rows = [
        (
            "" if unit.layer is None else str(unit.layer),
            unit.label,
            str(unit.schemes[index]),
            f"{unit.marginal(index, widths.routed):.6f}",
            f"{unit.marginal(0, widths.routed):.6f}",
        )
        for unit, index in zip(widths.units, widths.choice, strict=True)
    ]
    columns = ("layer", "weights", "gets", "KLD", "KLD at int4")
    return make_table("widths", columns, rows)
