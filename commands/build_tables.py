"""What conversion, calibration and the frontier found, as tables."""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lfmq.commands.console import Table, make_table

if TYPE_CHECKING:
    from lfmq.converter.mixed_precision.frontier import Frontier
    from lfmq.converter.quantize.settings import ExpertCoverage, RouterStep
    from lfmq.converter.run.convert import Build


def builds_table(builds: "Iterable[Build]") -> Table:
    """Builds just written."""
    rows = [(b.format, f"{b.nbytes:,}", f"{b.bits_per_weight:.3f}", str(b.path)) for b in builds]
    return make_table("builds", ("format", "bytes", "bits/weight", "path"), rows)


def coverage_table(
    coverage: "Iterable[ExpertCoverage]", steps: "Iterable[RouterStep]" = ()
) -> Table:
    """What calibration saw of each layer's experts; the JSON has every expert."""
    rows = []
    routers = {step.layer: step for step in steps}
    coverage = tuple(coverage)
    for layer in dict.fromkeys(e.layer for e in coverage):
        experts = [e for e in coverage if e.layer == layer]
        tokens = [e.tokens for e in experts]
        rules = Counter(e.rule for e in experts)
        nearest = sum(e.error_nearest for e in experts) / len(experts)
        error = sum(e.error for e in experts) / len(experts)
        step = routers.get(layer)
        rows.append(
            (
                str(layer),
                f"{min(tokens):,}",
                f"{max(tokens):,}",
                f"{experts[0].quota:,}",
                ", ".join(f"{n} {rule}" for rule, n in sorted(rules.items())),
                f"{nearest:.6f}",
                f"{error:.6f}",
                "refitted" if step is not None and step.kept else "as it was",
            )
        )
    columns = ("layer", "fewest tokens", "most", "quota", "moments", "nearest", "error", "router")
    return make_table("experts", columns, rows)


def frontier_table(frontier: "Frontier") -> Table:
    """All points, those of the frontier by number."""
    rows = [
        (
            point.name,
            {"size": "by size", "token": "by bytes/token"}.get(point.kind, point.kind),
            f"{point.nbytes:,}",
            f"{8 * point.nbytes / frontier.weights:.3f}",
            f"{point.token_bytes:,}",
            "unknown" if point.kld is None else f"{point.kld:.6f}",
        )
        for point in frontier.points
    ]
    columns = ("point", "kind", "bytes", "bits/weight", "bytes/token", "predicted KLD")
    return make_table(f"{frontier.checkpoint} as {frontier.format}", columns, rows)
