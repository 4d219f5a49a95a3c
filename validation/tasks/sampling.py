"""The next token from logits, as runtimes choose it when they sample.

The order is that of transformers: repetition penalty (Keskar et al. 2019, sec. 4.1) on every token
of the prompt and the answer so far, temperature, top-k, top-p, min-p; then one draw. By default
llama.cpp and mlx-lm look back fewer tokens for the penalty (64 and 20), and llama.cpp applies the
temperature last.

Shapes: W sequences, V vocabulary, K candidates.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lfmq.converter.model.chat import ChatTemplate
from lfmq.formats.build import Assets
from lfmq.formats.huggingface.end_tokens import end_tokens
from lfmq.formats.huggingface.side_files import GENERATION_CONFIG, json_object
from lfmq.formats.plan import ModelConfig
from lfmq.quant.errors import ValidationError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample; the defaults change nothing.

    Attributes:
        source: where the settings come from.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    source: str = "defaults"


# https://huggingface.co/LiquidAI/LFM2.5-8B-A1B and https://huggingface.co/LiquidAI/LFM2-8B-A1B
THINKING_CARD = Sampling(
    temperature=0.2, top_k=80, repetition_penalty=1.05, source="model card of LFM2.5-8B-A1B"
)
PLAIN_CARD = Sampling(
    temperature=0.3, min_p=0.15, repetition_penalty=1.05, source="model card of LFM2-8B-A1B"
)
# Inclusive bounds; a temperature of zero would be greedy.
_BOUNDS = {
    "temperature": (1e-3, 100.0),
    "top_k": (0, 2**31),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 100.0),
}


def card_sampling(assets: Assets) -> Sampling:
    """The settings a checkpoint is to be sampled with.

    Those of its ``generation_config.json`` when it names any; a setting it leaves out is off. Else
    the model card's: LFM2.5-8B-A1B's where the chat template thinks, LFM2-8B-A1B's where not.

    Raises:
        ValidationError: a setting is not a number or out of its bounds.
    """
    config = json_object(assets, GENERATION_CONFIG)
    given = {key: config[key] for key in _BOUNDS if config.get(key) is not None}
    if not given:
        return THINKING_CARD if ChatTemplate(assets).thinks else PLAIN_CARD
    for key, value in given.items():
        _check(assets, key, value)
    return replace(Sampling(**given), source="generation_config.json")


def stop_tokens(assets: Assets, config: ModelConfig) -> frozenset[int]:
    """Tokens that end a turn: those generation stops at.

    Raises:
        ValidationError: there is none.
    """
    found = end_tokens(assets, config)
    if not found.ids:
        raise ValidationError(
            f"{assets.folder / GENERATION_CONFIG}: no file names an end token; expected a token's "
            "id or a list of them as eos_token_id; without one no answer ends"
        )
    return frozenset(found.ids)


def _check(assets: Assets, key: str, value: Any) -> None:
    low, high = _BOUNDS[key]
    kind = int if key == "top_k" else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        number = "an integer" if key == "top_k" else "a number"
        raise ValidationError(
            f"{assets.folder / 'generation_config.json'}: {key} is {value!r}, expected {number} "
            f"from {low:g} to {high:g}"
        )


def draws(seed: int, task: int, run: int, count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), one a step, that belong to one run of one task.

    Every model is given the same ones; the first do not depend on how many are taken.
    """
    return np.random.default_rng([seed, task, run]).random(count)


def sample(
    logits: torch.Tensor, seen: torch.Tensor, sampling: Sampling, uniform: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Draw a token for each sequence.

    The draw u picks the first token, from the most likely down, at which the cumulative
    probability exceeds u: equal distributions give equal tokens, close ones nearly always.

    Args:
        logits: [W, V].
        seen: bool [W, V], tokens of the prompt and the answer so far.
        sampling: the settings.
        uniform: [W], in [0, 1).
    """
    penalty = sampling.repetition_penalty
    scores = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    count = min(sampling.top_k or scores.shape[1], scores.shape[1])
    best, token = torch.topk(scores, count, dim=-1)  # [W, K], descending
    p = torch.softmax(best.double() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        p[p.cumsum(-1) - p >= sampling.top_p] = 0
    p[p < sampling.min_p * p[:, :1]] = 0
    cumulative = p.cumsum(-1)
    target = torch.from_numpy(uniform).to(p.device)[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True)
    place = torch.minimum(place, (p > 0).sum(-1, keepdim=True) - 1)
    return token.gather(1, place)[:, 0].cpu().numpy()
