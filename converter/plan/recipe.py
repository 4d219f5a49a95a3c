"""Recipes: which width each tensor gets, by role, layer, name and expert, from a TOML file."""

import fnmatch
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from lfmq.converter.model.tensors import Tensor
from lfmq.converter.plan.builtin import builtin_recipes, builtin_text
from lfmq.converter.plan.toml_text import parse_toml
from lfmq.formats.plan import (
    EXPERT_ROLES,
    FLOAT_ROLES,
    SHARED_ROLES,
    Role,
)
from lfmq.formats.writing.temporary import whole_file
from lfmq.quant.errors import RecipeError
from lfmq.quant.grids import ALIASES, GRIDS
from lfmq.quant.types import (
    FloatType,
    Scheme,
    Storage,
)

MORE_BITS = "more_bits"  # in place of layers: those that llama.cpp gives a wider type
_LARGEST_INDEX = 1_000_000  # of a layer or an expert; a longer range is a slip
_ROLE_SETS = {"experts": EXPERT_ROLES, "shared": SHARED_ROLES}
_T = TypeVar("_T")
_TOP = {"budget", "choose", "description", "rule", "token_budget"}
# Lines of a recipe's text that set limits.
_LIMITS = re.compile(r"(?m)^(?:budget|token_budget|choose)\s*=.*\n")
Limit = Mapping[str, str] | str | None
_KEYS = {"roles", "layers", "names", "experts", "bits", "group", "grid", "float"}


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors to match (an empty condition matches all) and the storage they get.

    With ``more_bits`` the layers are those that :meth:`in_model` makes of it.
    """

    storage: Storage
    roles: frozenset[Role]
    layers: frozenset[int] = frozenset()
    names: tuple[str, ...] = ()
    experts: frozenset[int] = frozenset()
    more_bits: bool = False

    def matches(self, tensor: Tensor) -> bool:
        """Whether the rule speaks of this tensor."""
        return (
            tensor.role in self.roles
            and (not self.layers or tensor.layer in self.layers)
            and (not self.experts or tensor.expert in self.experts)
            and (not self.names or any(fnmatch.fnmatchcase(tensor.name, n) for n in self.names))
        )

    def in_model(self, tensors: Collection[Tensor]) -> "Rule":
        """The rule as it reads for a model of these tensors: its roles, and its layers as numbers.

        In a model without experts, ``experts`` stands for the dense feed-forward: both are what
        most of a model's weights are. ``embedding`` also stands for a head of its own, unless a
        later rule speaks of ``head``. ``more_bits`` counts the layers that have a tensor the other
        conditions match. Of n of them llama.cpp widens the first and the last eighth and every
        third between (``use_more_bits`` of ``llama-quant.cpp``; integer division).
        """
        roles = self.roles
        if roles.issuperset(EXPERT_ROLES) and not any(t.role in EXPERT_ROLES for t in tensors):
            roles = roles.difference(EXPERT_ROLES) | {Role.DENSE}
        if Role.EMBEDDING in roles:
            roles |= {Role.HEAD}
        rule = replace(self, roles=roles, more_bits=False)
        if not self.more_bits:
            return rule
        found = sorted({t.layer for t in tensors if t.layer is not None and rule.matches(t)})
        n = len(found)
        wide = (i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2 for i in range(n))
        layers = frozenset(layer for layer, more in zip(found, wide, strict=True) if more)
        return replace(rule, layers=layers)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Named rules; the last rule that matches a tensor decides.

    With a limit widths come from statistics (``lfmq.converter.mixed_precision.budget``).

    Attributes:
        name: part of builds' names.
        rules: in the order of the file.
        text: the file.
        budget: limit of a build's bytes, the same or by format.
        token_budget: limit of the bytes read for a token.
        choose: what has its width chosen: ``experts``, 4 or 8 bits; or ``all`` weights, any grid.
    """

    name: str
    rules: tuple[Rule, ...]
    text: str
    budget: Limit = None
    token_budget: Limit = None
    choose: str = "experts"

    def limited(self, **limits: str) -> "Recipe":
        """With other limits or another choice; see the attributes."""
        found = dict(self._limits(), **limits)
        lines = [f"{key} = {_toml_value(value)}" for key, value in found.items()]
        text = "\n".join([*lines, _LIMITS.sub("", self.text)])
        name = self.name if self._limits() else f"{self.name}-mixed"
        return parse_recipe(text, name, name)

    def with_rules(self, rules: list[str]) -> "Recipe":
        """Without limits, and more rules."""
        text = _LIMITS.sub("", self.text)
        name = self.name if self._limits() else f"{self.name}-mixed"
        return parse_recipe("\n\n".join([text.rstrip(), *rules]) + "\n", name, name)

    def _limits(self) -> dict[str, Limit]:
        found: dict[str, Limit] = {"budget": self.budget, "token_budget": self.token_budget}
        found = {key: value for key, value in found.items() if value is not None}
        return found | ({"choose": self.choose} if self.choose != "experts" else {})


def _toml_value(limit: Limit) -> str:
    if isinstance(limit, Mapping):
        return "{" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in limit.items()) + "}"
    return json.dumps(limit)


def load_recipe(name_or_path: str) -> Recipe:
    """A built-in recipe by name, or a TOML file.

    Raises:
        RecipeError: no such recipe, not TOML, an unknown key or an illegal value.
    """
    if name_or_path in builtin_recipes():
        return parse_recipe(builtin_text(name_or_path), name_or_path, name_or_path)
    path = Path(name_or_path)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(builtin_recipes())
        raise RecipeError(
            f"{name_or_path}: neither a built-in recipe ({known}) nor a readable TOML file"
        ) from error
    return parse_recipe(text, path.stem, str(path))


def save_recipe(path: Path, recipe: Recipe) -> None:
    """Write a recipe's text, to be given as ``--recipe``.

    Raises:
        RecipeError: it exists or cannot be written.
    """
    if path.exists():
        raise RecipeError(f"{path}: cannot be written (File exists)")
    try:
        with whole_file(path) as part:
            part.write_text(recipe.text, "utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written ({error.strerror})") from error


def parse_recipe(text: str, name: str, source: str) -> Recipe:
    """A recipe from TOML text; ``source`` is named in errors."""
    try:
        document = parse_toml(text)
    except ValueError as error:
        raise RecipeError(f"{source}: not valid TOML ({error!s:.150})") from error
    unknown = sorted(set(document) - _TOP)
    if unknown:
        known = ", ".join(sorted(_TOP))
        raise RecipeError(f"{source}: unknown key {unknown[0]!r}; known: {known}")
    choose = document.get("choose", "experts")
    if choose not in ("experts", "all"):
        raise RecipeError(f"{source}: choose is {choose!r}, expected 'experts' or 'all'")
    budget, token_budget = (_limit(document, k, source) for k in ("budget", "token_budget"))
    rules = document.get("rule")
    if not isinstance(rules, list) or not rules:
        raise RecipeError(f"{source}: no [[rule]] found")
    parsed = tuple(_rule(r, f"{source}: rule {i}") for i, r in enumerate(rules, 1))
    return Recipe(name, parsed, text, budget, token_budget, choose)


def _limit(document: Mapping[str, Any], key: str, source: str) -> Limit:
    limit: Any = document.get(key)
    values = limit.values() if isinstance(limit, dict) else () if limit is None else (limit,)
    if not all(isinstance(value, str) for value in values):
        raise RecipeError(
            f"{source}: {key} is {limit!r}, expected text such as '5.69bpw', or a table of "
            "such texts by format"
        )
    found: Limit = limit
    return found


def _rule(table: Any, where: str) -> Rule:
    if not isinstance(table, dict):
        raise RecipeError(f"{where}: expected a table")
    unknown = sorted(set(table) - _KEYS)
    if unknown:
        raise RecipeError(
            f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(_KEYS))}"
        )
    more_bits = table.get("layers") == MORE_BITS
    return Rule(
        _storage(table, where),
        _roles(table.get("roles", ["experts", "shared"]), where),
        frozenset() if more_bits else _numbers(table.get("layers"), "layers", where),
        tuple(_list(table.get("names", []), str, "names", where)),
        _numbers(table.get("experts"), "experts", where),
        more_bits,
    )


def _storage(table: dict[str, Any], where: str) -> Storage:
    if "float" in table:
        if {"bits", "group", "grid"} & set(table):
            raise RecipeError(f"{where}: float excludes bits, group and grid")
        if table["float"] not in get_args(FloatType):
            known = ", ".join(get_args(FloatType))
            raise RecipeError(f"{where}: float is {table['float']!r}, expected one of {known}")
        value: FloatType = table["float"]
        return value
    named = table.get("grid", "symmetric")
    named = ALIASES.get(named, named) if isinstance(named, str) else named
    grid = GRIDS[_one_of(GRIDS, named, "grid", where)]
    bits = _one_of(grid.groups, table.get("bits"), "bits", where)
    groups = grid.groups[bits]
    return Scheme(bits, _one_of(groups, table.get("group", groups[0]), "group", where), grid.name)


def _one_of(legal: Collection[_T], value: Any, key: str, where: str) -> _T:
    if isinstance(value, bool | float | list | dict) or value not in legal:
        raise RecipeError(f"{where}: {key} is {value!r}, expected one of {list(legal)}")
    found: _T = value
    return found


def _roles(names: Any, where: str) -> frozenset[Role]:
    roles: set[Role] = set()
    for name in _list(names, str, "roles", where):
        if name in _ROLE_SETS:
            roles.update(_ROLE_SETS[name])
        elif name in tuple(FLOAT_ROLES):
            raise RecipeError(f"{where}: role {name!r} is float in every build; leave it out")
        elif name in tuple(Role):
            roles.add(Role(name))
        else:
            known = ", ".join([*_ROLE_SETS, *EXPERT_ROLES, *SHARED_ROLES])
            raise RecipeError(f"{where}: unknown role {name!r}; known: {known}")
    return frozenset(roles)


def _list(value: Any, kind: type, key: str, where: str) -> list[Any]:
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(i, kind) and not isinstance(i, bool) for i in items):
        raise RecipeError(f"{where}: {key} is {value!r}, expected a list of {kind.__name__}")
    return items


def _numbers(value: Any, key: str, where: str) -> frozenset[int]:
    """Integers, or ranges written ``"2-5"`` with both ends included."""
    if value is None:
        return frozenset()
    numbers: set[int] = set()
    for item in value if isinstance(value, list) else [value]:
        first, _, last = str(item).partition("-")
        try:
            found = range(int(first), int(last or first) + 1)
        except ValueError:
            found = range(0)
        if not found or isinstance(item, bool) or found[-1] > _LARGEST_INDEX:
            raise RecipeError(f"{where}: {key} has {item!r}, expected a number or a range '2-5'")
        numbers.update(found)
    return frozenset(numbers)
