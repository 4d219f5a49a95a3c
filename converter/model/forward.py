"""The reference forward pass of ``lfm2_moe``, one layer in memory, weights read when needed.

The arithmetic follows transformers' ``Lfm2MoeForCausalLM`` (models/lfm2_moe/modeling_lfm2_moe.py,
5.23): logits agree within 1e-4 in float32 and the same experts are selected. Unlike there, an
expert's matrices are read, used on all its tokens and dropped, so that a model of any size runs in
the memory of its hidden states and its largest matrix.

Shapes: W windows, S tokens a window, T = W * S, H hidden size, E experts, k experts a token.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lfmq.formats.plan import ModelConfig
from lfmq.quant.errors import ValidationError

ReadWeight = Callable[[str], NDArray[np.float32]]
Observe = Callable[[tuple[str, ...], torch.Tensor, torch.Tensor | None], None]

# transformers adds it to the sum of the chosen experts' weights before dividing by it
_SUM_EPSILON = 1e-6
# Tokens that go through a dense part together; bounds its temporary tensors.
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


class Past(Protocol):
    """The tokens before those at hand, as the mixer of one layer remembers them."""

    def part(self, rows: slice) -> "Past":
        """The same for some of the windows."""

    def positions(self, length: int) -> torch.Tensor:
        """Places of the tokens at hand in their windows: int64 [S] or [W, 1, S], on the CPU."""

    def extend(self, gated: torch.Tensor, columns: int) -> torch.Tensor:
        """A convolution's inputs [W, H, S] behind the ``columns`` that came before them."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention [W, heads, S, head_dim] of each token to those before it and itself."""


class _Nothing:
    """No token came before: the windows begin here."""

    def part(self, rows: slice) -> "_Nothing":
        return self

    def positions(self, length: int) -> torch.Tensor:
        return torch.arange(length)

    def extend(self, gated: torch.Tensor, columns: int) -> torch.Tensor:
        return F.pad(gated, (columns, 0))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


_Mixer = Callable[[torch.Tensor, Past], torch.Tensor]


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
    for layer in range(model.config.num_hidden_layers):
        states, decided = run_layer(model, layer, states, observe)
        if decided is not None:
            routing[layer] = decided
        if progress is not None:
            progress(1, model.config.num_hidden_layers)
    norm = model.weight("model.embedding_norm.weight")
    return Trace(_rms_norm(states, norm, model.config.norm_eps), routing)


@torch.inference_mode()
def embed(model: Model, ids: NDArray[np.int64]) -> torch.Tensor:
    """Hidden states [W, S, H] before the first layer.

    Raises:
        ValidationError: an id is outside the vocabulary.
    """
    check_ids(model.config, ids)
    table = model.read("model.embed_tokens.weight")
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
    model: Model, layer: int, states: torch.Tensor, observe: Observe | None = None
) -> tuple[torch.Tensor, Routing | None]:
    """Hidden states [W, S, H] after a layer, and what its router decided, if it has one.

    Raises:
        ValidationError: the result is not finite.
    """
    states = mix_tokens(model, layer, states, observe)
    return feed_forward(model, layer, states, observe)


@torch.inference_mode()
def mix_tokens(
    model: Model,
    layer: int,
    states: torch.Tensor,
    observe: Observe | None = None,
    past: Past = _Nothing(),  # noqa: B008 - without state
) -> torch.Tensor:
    """The first half of a layer: attention or gated short convolution, added to ``states``."""
    out = model.weight(mixer_out(model.config, layer))
    mixed = torch.empty_like(states)
    mixer = _mixer(model, layer, observe)
    for part in _batches(states):
        mixed[part] = states[part] + F.linear(mixer(states[part], past.part(part)), out)
    kind = model.config.layer_types[layer]
    _check_finite(mixed, layer, "convolution" if kind == "conv" else "attention")
    return mixed


@torch.inference_mode()
def mixer_inner(model: Model, layer: int, states: torch.Tensor) -> torch.Tensor:
    """What a layer's mixer hands to its output projection, [W, S, K]."""
    return _mixer(model, layer, None)(states, _Nothing())


def mixer_out(config: ModelConfig, layer: int) -> str:
    """The name of the mixer's output projection."""
    kind = "conv" if config.layer_types[layer] == "conv" else "self_attn"
    return f"model.layers.{layer}.{kind}.out_proj.weight"


def _mixer(model: Model, layer: int, observe: Observe | None) -> _Mixer:
    """From hidden states to the inputs of the mixer's output projection."""
    g, prefix = model.config, f"model.layers.{layer}."
    norm = model.weight(prefix + "operator_norm.weight")
    build = _convolution if g.layer_types[layer] == "conv" else _attention
    mix = build(model, prefix, observe)
    out = mixer_out(g, layer)

    def run(states: torch.Tensor, past: Past) -> torch.Tensor:
        y = mix(_rms_norm(states, norm, g.norm_eps), past)
        if observe is not None:
            observe((out,), y.flatten(0, 1), None)
        return y

    return run


@torch.inference_mode()
def feed_forward(
    model: Model, layer: int, states: torch.Tensor, observe: Observe | None = None
) -> tuple[torch.Tensor, Routing | None]:
    """The second half of a layer: dense or routed FFN, added to ``states``."""
    prefix = f"model.layers.{layer}."
    norm = model.weight(prefix + "ffn_norm.weight")
    x = _rms_norm(states, norm, model.config.norm_eps).flatten(0, 1)
    prefix += "feed_forward."
    routing = None
    if layer < model.config.num_dense_layers:
        parts = x.split(_TOKENS_AT_ONCE)
        out = torch.cat([_swiglu(model, prefix, part, None, observe) for part in parts])
    else:
        if observe is not None:
            observe((prefix + "gate.weight",), x, None)
        routing = route(model, layer, x)
        out = _experts(model, prefix, x, routing, observe)
    states = states + out.view_as(states)
    _check_finite(states, layer, "feed-forward")
    return states, routing


def normed(model: Model, name: str, states: torch.Tensor) -> torch.Tensor:
    """Hidden states [W, S, H] after the RMS norm of that name, as tokens [T, H]."""
    return _rms_norm(states, model.weight(name), model.config.norm_eps).flatten(0, 1)


def route(model: Model, layer: int, x: torch.Tensor) -> Routing:
    """The router's decision for normed hidden states [T, H].

    Experts are chosen by sigmoid score plus ``expert_bias``; their outputs are mixed with the
    scores alone, divided by their sum when ``norm_topk_prob``, times ``routed_scaling_factor``.
    """
    g = model.config
    prefix = f"model.layers.{layer}.feed_forward."
    scores = F.linear(x, model.weight(prefix + "gate.weight")).sigmoid()  # [T, E]
    biased = scores
    if g.use_expert_bias:
        biased = scores + model.weight(prefix + "expert_bias", torch.float32)
    k = g.num_experts_per_tok
    best = torch.topk(biased, min(k + 1, g.num_experts), dim=-1)
    selected = best.indices[:, :k]
    affinity = scores.gather(1, selected)
    if g.norm_topk_prob:
        affinity = affinity / (affinity.sum(-1, keepdim=True) + _SUM_EPSILON)
    margin = best.values[:, k - 1] - best.values[:, -1]
    return Routing(selected, affinity * g.routed_scaling_factor, margin.float())


def _experts(
    model: Model, prefix: str, x: torch.Tensor, routing: Routing, observe: Observe | None
) -> torch.Tensor:
    out = torch.zeros_like(x)
    for expert in range(model.config.num_experts):
        token, affinity = routing.tokens_of(expert)
        if not len(token):
            continue
        y = _swiglu(model, f"{prefix}experts.{expert}.", x[token], affinity, observe)
        out.index_add_(0, token, y * affinity[:, None])
    return out


def _swiglu(
    model: Model,
    prefix: str,
    x: torch.Tensor,
    affinity: torch.Tensor | None,
    observe: Observe | None,
) -> torch.Tensor:
    """w2(silu(w1 x) * w3 x)."""
    gate, up, down = (f"{prefix}{part}.weight" for part in ("w1", "w3", "w2"))
    if observe is not None:
        observe((gate, up), x, affinity)
    inner = F.silu(F.linear(x, model.weight(gate))).mul_(F.linear(x, model.weight(up)))
    if observe is not None:
        observe((down,), inner, affinity)
    return F.linear(inner, model.weight(down))


def _convolution(model: Model, prefix: str, observe: Observe | None) -> _Mixer:
    """Gated short convolution: ``C * conv(B * x)``, in_proj's chunks being B, C, x."""
    g = model.config
    names = tuple(f"{prefix}conv.{part}.weight" for part in ("in_proj", "conv"))
    in_proj, kernel = (model.weight(name) for name in names)

    def mix(x: torch.Tensor, past: Past) -> torch.Tensor:
        if observe is not None:
            observe((names[0],), x.flatten(0, 1), None)
        b, c, value = F.linear(x, in_proj).chunk(3, dim=-1)
        gated = (b * value).transpose(1, 2)  # [W, H, S]
        gated = past.extend(gated, g.conv_L_cache - 1)
        return c * F.conv1d(gated, kernel, groups=g.hidden_size).transpose(1, 2)

    return mix


def _attention(model: Model, prefix: str, observe: Observe | None) -> _Mixer:
    """Grouped-query attention with RMS-normed heads and half-split rotary positions."""
    g = model.config
    prefix += "self_attn."
    names = tuple(f"{prefix}{part}_proj.weight" for part in ("q", "k", "v"))
    query, key, value = (model.weight(name) for name in names)
    q_norm = model.weight(prefix + "q_layernorm.weight")
    k_norm = model.weight(prefix + "k_layernorm.weight")

    def heads(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight).view(*x.shape[:2], -1, g.head_dim).transpose(1, 2)

    def mix(x: torch.Tensor, past: Past) -> torch.Tensor:
        if observe is not None:
            observe(names, x.flatten(0, 1), None)
        cos, sin = _rotary(model, past.positions(x.shape[1]))
        q = _rotate(_rms_norm(heads(x, query), q_norm, g.norm_eps), cos, sin)
        k = _rotate(_rms_norm(heads(x, key), k_norm, g.norm_eps), cos, sin)
        return past.attend(q, k, heads(x, value)).transpose(1, 2).flatten(2)

    return mix


def _rotary(model: Model, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [..., S, head_dim], computed in float32 as transformers does."""
    g = model.config
    exponent = torch.arange(0, g.head_dim, 2, dtype=torch.float32) / g.head_dim
    angle = positions.float()[..., None] / g.rope_theta**exponent
    angle = torch.cat((angle, angle), dim=-1).to(model.device)
    return angle.cos().to(model.dtype), angle.sin().to(model.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _batches(states: torch.Tensor) -> Iterator[slice]:
    step = max(1, _TOKENS_AT_ONCE // states.shape[1])
    for start in range(0, states.shape[0], step):
        yield slice(start, start + step)


def _check_finite(states: torch.Tensor, layer: int, part: str) -> None:
    if not torch.isfinite(states).all():
        window = int((~torch.isfinite(states)).flatten(1).any(1).nonzero()[0])
        raise ValidationError(
            f"layer {layer}: the output of its {part} is not finite (window {window}); the "
            "weights are damaged or overflow this dtype"
        )
