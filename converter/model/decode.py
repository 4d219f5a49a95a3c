"""The reference forward pass a token at a time: many sequences at once, each at its own length.

The arithmetic is that of ``lfmq.converter.model.forward``; here attention layers keep the keys and
values of the tokens so far, and convolutions their last inputs. A step takes S new columns of
W sequences, of which a sequence may fill only the first ones: what stands behind them is computed,
never looked at, and overwritten by the tokens that follow. No sequence sees how long another is.

Shapes: W sequences, S columns of a step, C columns there is room for, H hidden size, V vocabulary,
L taps of a convolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lfmq.converter.model.blocks import Block, Inner, model_blocks
from lfmq.converter.model.forward import Model, check_ids, normed, run_block
from lfmq.converter.model.tensors import EMBEDDING, FINAL_NORM, head_of
from lfmq.formats.plan import ModelConfig

# Room for that many more tokens when a cache is made; a full one grows by half.
_FIRST_ROOM = 64


@dataclass(frozen=True, slots=True)
class KeptModel(Model):
    """A model that keeps the weights it has read, the first ones up to ``budget`` bytes.

    Each step of a decoder reads every weight again in the same order: dropping the weight used
    longest ago would drop exactly the next one needed.
    """

    budget: int = 2**31
    _kept: dict[tuple[str, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def weight(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor of the model in its dtype (or another) on its device."""
        key = (name, dtype or self.dtype)
        if key in self._kept:
            return self._kept[key]
        tensor = Model.weight(self, name, dtype)
        if sum(t.nbytes for t in self._kept.values()) + tensor.nbytes <= self.budget:
            self._kept[key] = tensor
        return tensor


class Decoder:
    """Sequences that grow, and what their layers remember of them."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._lengths = torch.zeros(0, dtype=torch.int64)  # [W], tokens so far
        self._blocks = [block for layer in model_blocks(model.config) for block in layer]
        self._memory: dict[Block, torch.Tensor] = {}  # of blocks that mix tokens: _empty_memory

    @torch.inference_mode()
    def start(self, prompts: Sequence[NDArray[np.int64]]) -> torch.Tensor:
        """Begin anew with prompts of at least one token each.

        Returns:
            Logits [W, V] of the token after each prompt.

        Raises:
            ValidationError: an id is outside the vocabulary, or a layer's output is not finite.
        """
        counts = torch.tensor([len(p) for p in prompts])
        ids = np.zeros((len(prompts), int(counts.max())), np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        check_ids(self._model.config, ids)
        self._lengths = torch.zeros_like(counts)
        room = (len(prompts), ids.shape[1] + _FIRST_ROOM)
        mixers = (block for block in self._blocks if block.mixes_tokens)
        self._memory = {block: _empty_memory(self._model, block, *room) for block in mixers}
        return self._advance(ids, counts)

    @torch.inference_mode()
    def step(self, tokens: NDArray[np.int64]) -> torch.Tensor:
        """Append a token [W] to each sequence; logits [W, V] of the one after it.

        Raises:
            ValidationError: a layer's output is not finite.
        """
        self._make_room(1)
        return self._advance(tokens[:, None], torch.ones(len(tokens), dtype=torch.int64))

    @torch.inference_mode()
    def keep(self, rows: NDArray[np.bool_]) -> None:
        """Go on with some of the sequences [W] and forget the others."""
        if not rows.all():
            chosen = torch.from_numpy(rows)
            self._lengths = self._lengths[chosen]
            self._memory = {b: m[chosen.to(m.device)] for b, m in self._memory.items()}

    def _advance(self, ids: NDArray[np.int64], counts: torch.Tensor) -> torch.Tensor:
        """Run ids [W, S], of which each sequence fills the first ``counts`` [W]."""
        model, columns = self._model, ids.shape[1]
        table = model.weight(EMBEDDING)
        filled = (torch.arange(columns) < counts[:, None]).to(model.device)  # [W, S]
        states = table[torch.from_numpy(ids).to(model.device)]
        for block in self._blocks:
            if block.mixes_tokens:
                past = _Remembered(self._memory[block], self._lengths, counts)
                states, _ = run_block(model, block, states, past=past)
            else:
                tokens, _ = run_block(model, block, states[filled][None])
                states[filled] = tokens[0]
        self._lengths = self._lengths + counts
        last = states[torch.arange(len(ids)), (counts - 1).to(model.device)]
        name = head_of(model.config)
        head = table if name == EMBEDDING else model.weight(name)
        return F.linear(normed(model, FINAL_NORM, last[None]), head).float()

    def _make_room(self, columns: int) -> None:
        needed = int(self._lengths.max()) + columns
        for block, memory in self._memory.items():
            room = memory.shape[3] if block.inner is Inner.ATTENTION else needed
            if needed > room:
                self._memory[block] = F.pad(memory, (0, 0, 0, max(needed - room, room // 2)))


def _empty_memory(model: Model, block: Block, sequences: int, columns: int) -> torch.Tensor:
    """Of a convolution its last inputs [W, H, L - 1], of attention keys and values.

    The latter are [W, 2, kv heads, C, head_dim].
    """
    g = model.config
    shape: tuple[int, ...] = (g.hidden_size, g.conv_L_cache - 1)
    if block.inner is Inner.ATTENTION:
        shape = (2, g.num_key_value_heads, columns, g.head_dim)
    return torch.zeros((sequences, *shape), dtype=model.dtype, device=model.device)


@dataclass(frozen=True, slots=True)
class _Remembered:
    """What one layer remembers; its mixer reads and extends it.

    Attributes:
        memory: see :func:`_empty_memory`; written in place.
        lengths: int64 [W], tokens before the step.
        counts: int64 [W], columns of the step that are tokens.
    """

    memory: torch.Tensor
    lengths: torch.Tensor
    counts: torch.Tensor

    def part(self, rows: slice) -> "_Remembered":
        return _Remembered(self.memory[rows], self.lengths[rows], self.counts[rows])

    def positions(self, length: int) -> torch.Tensor:
        return self.lengths[:, None, None] + torch.arange(length)

    def extend(self, gated: torch.Tensor, columns: int) -> torch.Tensor:
        whole = torch.cat((self.memory, gated), dim=2)
        last = (self.counts[:, None, None] + torch.arange(columns)).to(whole.device)
        self.memory.copy_(whole.gather(2, last.expand(-1, whole.shape[1], -1)))
        return whole

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        place = self.positions(q.shape[2])[:, 0].to(q.device)  # [W, S]
        row = torch.arange(len(q), device=q.device)[:, None]
        for memory, new in zip(self.memory.unbind(1), (k, v), strict=True):
            memory[row, :, place] = new.transpose(1, 2)
        keys, values = self.memory[..., : int(self.lengths.max()) + q.shape[2], :].unbind(1)
        seen = torch.arange(keys.shape[2], device=q.device) <= place[..., None]  # [W, S, C]
        # the heads of a group side by side, as queries of the one key and value head they share
        grouped = q.unflatten(1, (k.shape[1], -1))
        mask = seen[:, None].repeat(1, 1, grouped.shape[2], 1)
        y = F.scaled_dot_product_attention(grouped.flatten(2, 3), keys, values, attn_mask=mask)
        return y.reshape(q.shape)


def sequence_nbytes(config: ModelConfig, tokens: int) -> int:
    """Bytes a float32 decoder holds for a sequence of that many tokens, its logits among them."""
    g = config
    attention = 2 * g.num_key_value_heads * g.head_dim * tokens * len(g.attention_layers)
    convolution = g.hidden_size * (g.conv_L_cache - 1) * len(g.conv_layers)
    return 4 * (attention + convolution + g.vocab_size)
