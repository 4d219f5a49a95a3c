"""What a build may weigh, from a recipe's words to bytes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lfmq.converter.jobs.memory import parse_bytes
from lfmq.converter.mixed_precision.width_groups import rest_bytes
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.presets import PEERS, peer_bytes
from lfmq.converter.plan.recipe import Limit, Recipe
from lfmq.formats.build import Assets, Format
from lfmq.formats.plan import ModelConfig
from lfmq.quant.errors import RecipeError

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
class Limits:
    """What each format's build may take, bytes by format; a format that is absent has no limit."""

    nbytes: Mapping[str, float]
    token: Mapping[str, float]


def limits_of(
    recipe: Recipe, config: ModelConfig, assets: Assets, formats: Mapping[str, Format]
) -> Limits:
    """A recipe's limits in bytes.

    The name of another quantizer's build (``lfmq.converter.plan.presets``) stands for the bytes of
    its weights; header and tokenizer files come on top.

    Args:
        recipe: with limits.
        config: of the model.
        assets: of the checkpoint.
        formats: by name.

    Raises:
        RecipeError: a limit is none.
    """
    plan = resolve_plan(config, recipe)
    weights = sum(e.size for e in plan.entries)

    def read(limit: Limit, *, token: bool) -> dict[str, float]:
        found = {}
        for name, module in formats.items():
            text = limit.get(name) if isinstance(limit, Mapping) else limit
            if text is None and limit is not None:
                raise RecipeError(
                    f"recipe {recipe.name}: it sets no limit for {name}; name a format with --to"
                )
            if text is None:
                continue
            if text in PEERS:
                found[name] = float(peer_bytes(text, config)[token])
                if not token:
                    layout = module.layout(plan, assets)
                    named = {e.name for e in plan.entries}
                    found[name] += rest_bytes(plan, layout, named)[0]
            else:
                found[name] = parse_budget(text).nbytes(weights)
        return found

    return Limits(read(recipe.budget, token=False), read(recipe.token_budget, token=True))
