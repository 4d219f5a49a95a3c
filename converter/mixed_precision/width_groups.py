"""Weights that share a grid, what each grid takes in a format, and a choice as rules."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lfmq.converter.mixed_precision.predicted_kld import Cost
from lfmq.converter.model.tensors import token_share
from lfmq.converter.plan.plan import token_bytes
from lfmq.formats.build import Assets, BuildLayout, Format
from lfmq.formats.plan import (
    EXPERT_ROLES,
    Plan,
    Role,
    TensorPlan,
)
from lfmq.quant.errors import UnsupportedError
from lfmq.quant.grids import GRIDS
from lfmq.quant.types import Scheme

# Weights of a layer that engines of compressed-tensors fuse and want alike.
_FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "w1": "w1, w3", "w3": "w1, w3"}


@dataclass(frozen=True, slots=True)
class WidthGroup:
    """Weights that share a grid.

    Attributes:
        layer: of the model; None for the embedding and a head of its own.
        label: of the unit in the layer, as tables show it.
        entries: its weights.
        schemes: what it can be stored as.
        costs: of each.
    """

    layer: int | None
    label: str
    entries: tuple[TensorPlan, ...]
    schemes: tuple[Scheme, ...] = ()
    costs: tuple[Cost, ...] = ()

    def marginal(self, index: int, routed: float) -> float:
        """What a scheme adds to the divergence of a plan whose squared routed one is given."""
        cost = self.costs[index]
        return cost.direct + (cost.routed / (2 * routed**0.5) if routed else 0.0)


@dataclass(frozen=True, slots=True)
class FormatBytes:
    """Bytes of a weight by its name, all in all and read for a token."""

    nbytes: Mapping[str, float]
    token: Mapping[str, float]


def expert_groups(plan: Plan, formats: Mapping[str, Format]) -> list[WidthGroup]:
    """The finest units of expert weights that all formats can hold."""
    parts = {module.WIDTHS for module in formats.values()} - {"weight"}
    if "layer" in parts or {"expert", "stack"} <= parts:
        parts = {"layer"}
    groups: dict[tuple[int, str], list[TensorPlan]] = {}
    for entry in plan.entries:
        if entry.role in EXPERT_ROLES:
            assert entry.layer is not None
            labels = [f"expert {entry.expert}"] if parts <= {"expert"} else []
            labels += [entry.role.value] if parts <= {"stack"} else []
            label = ", ".join(labels) or "experts"
            groups.setdefault((entry.layer, label), []).append(entry)
    return [WidthGroup(layer, label, tuple(found)) for (layer, label), found in groups.items()]


def shared_groups(plan: Plan, formats: Mapping[str, Format]) -> list[WidthGroup]:
    """Shared weights that the plan stores as integers, fused ones together where engines fuse."""
    fused = any(module.WIDTHS == "layer" for module in formats.values())
    groups: dict[tuple[int | None, str], list[TensorPlan]] = {}
    for entry in plan.entries:
        if entry.expert is None and entry.scheme is not None:
            label = entry.name.split(".")[-2]
            label = _FUSED.get(label, label) if fused else label
            groups.setdefault((entry.layer, label), []).append(entry)
    return [WidthGroup(layer, label, tuple(found)) for (layer, label), found in groups.items()]


def budget_groups(plan: Plan, formats: Mapping[str, Format]) -> list[WidthGroup]:
    """What a recipe calls ``experts``: their units, or those of a model's dense feed-forward."""
    if plan.config.moe_layers:
        return expert_groups(plan, formats)
    return [u for u in shared_groups(plan, formats) if u.entries[0].role is Role.DENSE]


def format_costs(plan: Plan, assets: Assets, module: Format, scheme: Scheme) -> FormatBytes | None:
    """What the integers of a plan take when all are of one scheme; None where it is refused.

    Args:
        plan: which weights are integers.
        assets: of the checkpoint.
        module: the format.
        scheme: of all integers.
    """
    if any(e.scheme and e.shape[-1] % scheme.span for e in plan.entries):
        return None
    entries = tuple(replace(e, storage=scheme) if e.scheme else e for e in plan.entries)
    uniform = replace(plan, entries=entries)
    try:
        module.check(uniform, assets)
    except UnsupportedError:
        return None
    return segment_bytes(uniform, module.layout(uniform, assets))


def segment_bytes(plan: Plan, layout: BuildLayout) -> FormatBytes:
    """Bytes of every weight of a build; a segment of several weights counts by their sizes."""
    sizes = {e.name: e.size for e in plan.entries}
    shares = {e.name: float(token_share(e, plan.config)) for e in plan.entries}
    found: dict[str, float] = dict.fromkeys(sizes, 0.0)
    for file in layout.files:
        for segment in file.segments:
            whole = sum(sizes[name] for name in segment.sources)
            for name in segment.sources:
                found[name] += segment.nbytes * sizes[name] / whole
    token = {name: n * shares[name] for name, n in found.items()}
    return FormatBytes(found, token)


def rest_bytes(plan: Plan, layout: BuildLayout, names: set[str]) -> tuple[float, float]:
    """Bytes of a build, all and for a token, without those of some weights."""
    costs = segment_bytes(plan, layout)
    return (
        layout.nbytes - sum(costs.nbytes[n] for n in names),
        token_bytes(plan, layout) - sum(costs.token[n] for n in names),
    )


def chosen_rules(units: Iterable[WidthGroup], choice: Iterable[Scheme], experts: int) -> list[str]:
    """TOML rules that give each unit its scheme."""
    shared: dict[tuple[Scheme, str], list[int]] = {}
    routed: dict[tuple[int, Role, Scheme], list[int]] = {}
    rules = []
    for unit, scheme in zip(units, choice, strict=True):
        for entry in unit.entries:
            if entry.expert is not None:
                assert entry.layer is not None
                routed.setdefault((entry.layer, entry.role, scheme), []).append(entry.expert)
            elif entry.layer is None:
                rules.append(_rule(f"roles = {_toml([entry.role.value])}", scheme))
            else:
                pattern = "*." + entry.name.split(".", 3)[3]
                shared.setdefault((scheme, pattern), []).append(entry.layer)
    named: dict[tuple[Scheme, tuple[int, ...]], list[str]] = {}
    for (scheme, pattern), found in shared.items():
        named.setdefault((scheme, tuple(found)), []).append(pattern)
    for (scheme, layers), names in named.items():
        rules.append(_rule(f"names = {_toml(names)}\nlayers = {list(layers)}", scheme))
    return rules + _expert_rules(routed, experts)


def _expert_rules(routed: Mapping[tuple[int, Role, Scheme], list[int]], experts: int) -> list[str]:
    roles: dict[tuple[int, Scheme, tuple[int, ...]], list[str]] = {}
    for (layer, role, scheme), members in routed.items():
        roles.setdefault((layer, scheme, tuple(sorted(members))), []).append(role.value)
    layers: dict[tuple[Scheme, tuple[int, ...], tuple[str, ...]], list[int]] = {}
    for (layer, scheme, chosen), words in roles.items():
        layers.setdefault((scheme, chosen, tuple(words)), []).append(layer)
    rules = []
    for (scheme, chosen, named), found in layers.items():
        rule = f"roles = {_toml(named)}\nlayers = {sorted(found)}"
        rule += "" if len(chosen) == experts else f"\nexperts = {list(chosen)}"
        rules.append(_rule(rule, scheme))
    return rules


def _rule(conditions: str, scheme: Scheme) -> str:
    rule = f"[[rule]]\n{conditions}\nbits = {scheme.bits}"
    if scheme.group != GRIDS[scheme.grid].groups[scheme.bits][0]:
        rule += f"\ngroup = {scheme.group}"
    return rule if scheme.grid == "symmetric" else f'{rule}\ngrid = "{scheme.grid}"'


def _toml(words: Iterable[str]) -> str:
    return "[" + ", ".join(f'"{w}"' for w in words) + "]"
