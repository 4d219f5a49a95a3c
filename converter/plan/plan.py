"""From a recipe and a config to the plan: each tensor's storage, and what a build will weigh."""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from lfmq.converter.model.tensors import Tensor, expected_tensors, token_share
from lfmq.converter.plan.recipe import Recipe, Rule
from lfmq.formats.build import BuildLayout
from lfmq.formats.plan import (
    FLOAT_ROLES,
    ModelConfig,
    Plan,
    Role,
    TensorPlan,
)
from lfmq.quant.errors import PlanError, RecipeError
from lfmq.quant.types import Scheme, Storage


def resolve_plan(config: ModelConfig, recipe: Recipe) -> Plan:
    """Give every tensor its storage.

    A rule for roles that the model does not have is left out.

    Raises:
        RecipeError: a rule for roles of the model matches nothing, or a tensor is matched by no
            rule.
        PlanError: a row does not divide into the groups asked for.
    """
    tensors = expected_tensors(config)
    quantizable = _quantizable(tensors)
    rules = [rule.in_model(quantizable) for rule in recipe.rules]
    roles = {t.role for t in quantizable}
    for number, rule in enumerate(rules, 1):
        if rule.roles & roles and not any(rule.matches(t) for t in quantizable):
            raise RecipeError(f"recipe {recipe.name}: rule {number} matches no tensor")
    entries = (_entry(t, _storage(t, rules, recipe.name)) for t in tensors)
    return Plan(config, tuple(entries), recipe.name)


def storages(config: ModelConfig, recipe: Recipe) -> dict[str, Storage]:
    """What a recipe says of every tensor by name, whether its rows can hold it or not.

    Raises:
        RecipeError: a tensor is matched by no rule.
    """
    tensors = expected_tensors(config)
    rules = [rule.in_model(_quantizable(tensors)) for rule in recipe.rules]
    return {t.name: _storage(t, rules, recipe.name) for t in tensors}


def _quantizable(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t for t in tensors if t.role not in FLOAT_ROLES]


def _storage(tensor: Tensor, rules: list[Rule], recipe: str) -> Storage:
    if tensor.role in FLOAT_ROLES:
        return "float32"
    for rule in reversed(rules):
        if rule.matches(tensor):
            return rule.storage
    raise RecipeError(f"recipe {recipe}: no rule speaks of {tensor.name} ({tensor.role})")


def _entry(t: Tensor, storage: Storage) -> TensorPlan:
    if isinstance(storage, Scheme) and t.shape[-1] % storage.span:
        remedy = "use a smaller group or a float type"
        if storage.span != storage.group:  # only a K-quant
            remedy = 'set grid = "symmetric" with bits = 8 (Q8_0) for it'
        raise PlanError(
            f"{t.name}: rows of {t.shape[-1]} weights do not divide into groups of "
            f"{storage.span}; {remedy}"
        )
    return TensorPlan(t.name, t.shape, t.role, t.layer, t.expert, storage)


@dataclass(frozen=True, slots=True)
class RoleSummary:
    """One line of the plan's table: a role and storage, how many tensors and weights have it."""

    role: Role
    storage: Storage
    tensors: int
    weights: int


def summarize(plan: Plan) -> tuple[RoleSummary, ...]:
    """The plan by role and storage, in the order of :class:`Role`."""
    groups: dict[tuple[Role, Storage], list[TensorPlan]] = {}
    for entry in plan.entries:
        groups.setdefault((entry.role, entry.storage), []).append(entry)
    order = list(Role)
    keys = sorted(groups, key=lambda k: (order.index(k[0]), str(k[1])))
    return tuple(
        RoleSummary(role, storage, len(found), sum(e.size for e in found))
        for role, storage in keys
        for found in (groups[role, storage],)
    )


def bits_per_weight(plan: Plan, nbytes: int) -> float:
    """File bytes in bits over the model's weights."""
    return 8 * nbytes / sum(e.size for e in plan.entries)


def token_bytes(plan: Plan, layout: BuildLayout) -> int:
    """Bytes of weights read for one decoded token, which bound the speed of decoding.

    Of an expert's bytes the share counts that runs for a token, all others once (the embedding as
    the tied head; beside a head of its own one row of it, which is next to nothing).
    """
    shares = {e.name: token_share(e, plan.config) for e in plan.entries}
    found: dict[Fraction, int] = {}
    for file in layout.files:
        for segment in file.segments:
            share = shares[segment.sources[0]]
            found[share] = found.get(share, 0) + segment.nbytes
    return int(sum(share * nbytes for share, nbytes in found.items()))


@dataclass(frozen=True, slots=True)
class State:
    """What a sequence keeps beside the weights, in float16.

    Attributes:
        context: tokens so far.
        attention: keys and values of the attention layers, bytes; read for every token.
        convolution: the last inputs of the convolutions, bytes.
    """

    context: int
    attention: int
    convolution: int

    def to_json(self) -> dict[str, int]:
        """The object ``state`` of ``lfmq plan --json``."""
        return {
            "context": self.context,
            "key_value_bytes": self.attention,
            "convolution_bytes": self.convolution,
        }

    def __str__(self) -> str:
        """A line for people."""
        return (
            f"state after {self.context:,} tokens, float16: keys and values "
            f"{self.attention:,} bytes, convolutions {self.convolution:,} bytes"
        )


def state_bytes(config: ModelConfig, context: int) -> State:
    """The state of one sequence after ``context`` tokens; all of it is read for the next one."""
    g = config
    each = 2 * 2 * g.num_key_value_heads * g.head_dim  # keys and values of two bytes
    columns = 2 * g.hidden_size * (g.conv_L_cache - 1)
    return State(context, len(g.attention_layers) * context * each, len(g.conv_layers) * columns)
