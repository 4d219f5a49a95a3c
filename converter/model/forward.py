"""The reference forward pass, one block in memory, weights read when needed.

The arithmetic follows transformers' ``Lfm2MoeForCausalLM`` (models/lfm2_moe/modeling_lfm2_moe.py,
5.23) and ``Lfm2ForCausalLM``: logits agree within 1e-4 in float32 and the same experts are
selected. Unlike there, an expert's matrices are read, used on all its tokens and dropped. A model
of any size therefore runs in the memory of its hidden states and of the largest branch of a block.

Shapes: W windows, S tokens a window, T = W * S, H hidden size, E experts, k experts a token.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lfmq.converter.model.blocks import Block, Branch, model_blocks
from lfmq.converter.model.inner import NOTHING, Past, apply_inner, rms_norm
from lfmq.converter.model.tensors import EMBEDDING, FINAL_NORM
from lfmq.formats.plan import ModelConfig
from lfmq.quant.errors import ValidationError

ReadWeight = Callable[[str], NDArray[np.float32]]
Observe = Callable[[tuple[str, ...], torch.Tensor, torch.Tensor | None], None]

# transformers adds it to the sum of the chosen experts' weights before dividing by it
_SUM_EPSILON = 1e-6
# Tokens that go through a block together; bounds its temporary tensors.
_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True, slots=True)
class Model:
    """Where a forward pass takes its weights from and how it computes.

    Attributes:
        config: the model's facts.
        read: gives a tensor by its checkpoint name, float32.
        dtype: of weights and hidden states.
        device: where matrices are multiplied.
    """

    config: ModelConfig
    read: ReadWeight
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def weight(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor of the model in its dtype (or another) on its device."""
        values = np.ascontiguousarray(self.read(name))
        if not values.flags.writeable:
            values = values.copy()
        return torch.from_numpy(values).to(self.device, dtype or self.dtype)


@dataclass(frozen=True, slots=True)
class Routing:
    """What the router of one layer decided for T tokens.

    Attributes:
        selected: int64 [T, k], chosen experts, most likely first.
        affinity: [T, k], the weights their outputs are mixed with.
        margin: float32 [T], score of the last chosen expert minus that of the first rejected.
    """

    selected: torch.Tensor
    affinity: torch.Tensor
    margin: torch.Tensor

    def tokens_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens routed to an expert, [n] in order, and what each weighs it with, [n]."""
        token, place = torch.where(self.selected == expert)
        return token, self.affinity[token, place]


@dataclass(frozen=True, slots=True)
class Trace:
    """A model's run over windows of tokens.

    Attributes:
        hidden: [W, S, H] after the final norm; the head turns them into logits.
        routing: by MoE layer.
    """

    hidden: torch.Tensor
    routing: dict[int, Routing]


@torch.inference_mode()
def run_model(
    model: Model,
    ids: NDArray[np.int64],
    *,
    observe: Observe | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Run windows of token ids through the whole model.

    Args:
        model: weights, dtype and device.
        ids: [W, S]; windows do not see each other.
        observe: called with the names of weights that share an input, that input [n, K], and for
            experts the weight [n] the token gave them.
        progress: called with 1 and the number of layers after each layer.

    Raises:
        ValidationError: a layer's output is not finite, or an id is outside the vocabulary.
    """
    states = embed(model, ids)
    routing = {}
    layers = model_blocks(model.config)
    for layer, blocks in enumerate(layers):
        for block in blocks:
            states, decided = run_block(model, block, states, observe)
            if decided is not None:
                routing[layer] = decided
        if progress is not None:
            progress(1, len(layers))
    norm = model.weight(FINAL_NORM)
    return Trace(rms_norm(states, norm, model.config.norm_eps), routing)


@torch.inference_mode()
def embed(model: Model, ids: NDArray[np.int64]) -> torch.Tensor:
    """Hidden states [W, S, H] before the first layer.

    Raises:
        ValidationError: an id is outside the vocabulary.
    """
    check_ids(model.config, ids)
    table = model.read(EMBEDDING)
    return torch.from_numpy(table[ids]).to(model.device, model.dtype)


def check_ids(config: ModelConfig, ids: NDArray[np.int64]) -> None:
    """Refuse ids outside the vocabulary.

    Raises:
        ValidationError: there is one.
    """
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
        raise ValidationError(
            f"the text's tokens reach id {int(ids.max())}, the model's vocabulary has "
            f"{config.vocab_size}; the tokenizer belongs to another model"
        )


@torch.inference_mode()
def run_layer(
    model: Model, layer: int, states: torch.Tensor
) -> tuple[torch.Tensor, Routing | None]:
    """Hidden states [W, S, H] after a layer, and what its router decided, if it has one.

    Raises:
        ValidationError: the result is not finite.
    """
    routing = None
    for block in model_blocks(model.config)[layer]:
        states, routing = run_block(model, block, states)
    return states, routing


@torch.inference_mode()
def run_block(
    model: Model,
    block: Block,
    states: torch.Tensor,
    observe: Observe | None = None,
    past: Past = NOTHING,
) -> tuple[torch.Tensor, Routing | None]:
    """Hidden states [W, S, H] after a block, and what its router decided, if it has one.

    Raises:
        ValidationError: the result is not finite.
    """
    if block.router is None:
        done, routing = _run_branch(model, block, states, observe, past), None
    else:
        done, routing = _run_experts(model, block, states, observe)
    if not torch.isfinite(done).all():
        window = int((~torch.isfinite(done)).flatten(1).any(1).nonzero()[0])
        raise ValidationError(
            f"layer {block.layer}: the output of its {block.inner} is not finite (window "
            f"{window}); the weights are damaged or overflow this dtype"
        )
    return done, routing


@torch.inference_mode()
def block_inner(model: Model, block: Block, states: torch.Tensor) -> torch.Tensor:
    """What the one branch of a block hands to the weight that writes, [W, S, K]."""
    norm = model.weight(block.norm)
    x = rms_norm(states, norm, model.config.norm_eps)
    return _branch_inner(model, block, block.branch, None)(x, NOTHING)


def normed(model: Model, name: str, states: torch.Tensor) -> torch.Tensor:
    """Hidden states [W, S, H] after the RMS norm of that name, as tokens [T, H]."""
    return rms_norm(states, model.weight(name), model.config.norm_eps).flatten(0, 1)


def route(model: Model, block: Block, x: torch.Tensor) -> Routing:
    """The decision of a block's router for normed hidden states [T, H].

    Experts are chosen by sigmoid score plus the router's bias; their outputs are mixed with the
    scores alone, divided by their sum when ``norm_topk_prob``, times ``routed_scaling_factor``.
    """
    g, router = model.config, block.router
    assert router is not None
    scores = F.linear(x, model.weight(router.weight)).sigmoid()  # [T, E]
    biased = scores
    if router.bias is not None:
        biased = scores + model.weight(router.bias, torch.float32)
    k = g.num_experts_per_tok
    best = torch.topk(biased, min(k + 1, g.num_experts), dim=-1)
    selected = best.indices[:, :k]
    affinity = scores.gather(1, selected)
    if g.norm_topk_prob:
        affinity = affinity / (affinity.sum(-1, keepdim=True) + _SUM_EPSILON)
    margin = best.values[:, k - 1] - best.values[:, -1]
    return Routing(selected, affinity * g.routed_scaling_factor, margin.float())


def _run_branch(
    model: Model, block: Block, states: torch.Tensor, observe: Observe | None, past: Past
) -> torch.Tensor:
    """A block whose one branch all tokens take."""
    x = states if block.mixes_tokens else states.flatten(0, 1)[:, None]  # tokens as windows of one
    norm, out = model.weight(block.norm), model.weight(block.branch.writer)
    inner = _branch_inner(model, block, block.branch, observe)
    done = torch.empty_like(x)
    for part in _batches(x):
        y = inner(rms_norm(x[part], norm, model.config.norm_eps), past.part(part))
        done[part] = x[part] + F.linear(y, out)
    return done.view_as(states)


def _run_experts(
    model: Model, block: Block, states: torch.Tensor, observe: Observe | None
) -> tuple[torch.Tensor, Routing]:
    """A block that sends each token through the branches its router chooses."""
    assert block.router is not None
    x = normed(model, block.norm, states)
    if observe is not None:
        observe((block.router.weight,), x, None)
    routing = route(model, block, x)
    out = torch.zeros_like(x)
    for expert, branch in enumerate(block.branches):
        token, affinity = routing.tokens_of(expert)
        if not len(token):
            continue
        inner = _branch_inner(model, block, branch, observe, affinity)(x[token], NOTHING)
        y = F.linear(inner, model.weight(branch.writer))
        out.index_add_(0, token, y * affinity[:, None])
    return states + out.view_as(states), routing


def _branch_inner(
    model: Model,
    block: Block,
    branch: Branch,
    observe: Observe | None,
    affinity: torch.Tensor | None = None,
) -> Callable[[torch.Tensor, Past], torch.Tensor]:
    """From normed hidden states [..., H] to the inputs [..., K] of the weight that writes."""
    readers = [model.weight(name) for name in branch.readers]
    parameters = [model.weight(name) for name in block.parameters]

    def run(x: torch.Tensor, past: Past) -> torch.Tensor:
        if observe is not None:
            observe(branch.readers, x.flatten(0, -2), affinity)
        read = [F.linear(x, w) for w in readers]
        y = apply_inner(block.inner, model.config, read, parameters, past)
        if observe is not None:
            observe((branch.writer,), y.flatten(0, -2), affinity)
        return y

    return run


def _batches(states: torch.Tensor) -> Iterator[slice]:
    step = max(1, _TOKENS_AT_ONCE // states.shape[1])
    for start in range(0, states.shape[0], step):
        yield slice(start, start + step)
