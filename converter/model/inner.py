"""The inner functions of blocks: what is made of the outputs of the weights that read the stream.

The arithmetic follows transformers' ``Lfm2MoeForCausalLM`` (models/lfm2_moe/modeling_lfm2_moe.py,
5.23) and ``Lfm2ForCausalLM``.

Shapes: W windows, S tokens a window, H hidden size, L taps of a convolution.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from lfmq.converter.model.blocks import Inner
from lfmq.formats.plan import ModelConfig


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


NOTHING: Past = _Nothing()
_Tensors = Sequence[torch.Tensor]
_Function = Callable[[ModelConfig, _Tensors, _Tensors, Past], torch.Tensor]


def apply_inner(
    inner: Inner,
    config: ModelConfig,
    read: _Tensors,
    parameters: _Tensors = (),
    past: Past = NOTHING,
) -> torch.Tensor:
    """What a block's weight that writes to the stream multiplies.

    Args:
        inner: the function.
        config: the model's facts.
        read: [W, S, N] of each weight that reads the stream; may be overwritten. A feed-forward
            also takes [T, N].
        parameters: the function's own tensors.
        past: the tokens before.

    Returns:
        [W, S, K].
    """
    return _FUNCTIONS[inner](config, read, parameters, past)


def _feed_forward(_: ModelConfig, read: _Tensors, __: _Tensors, ___: Past) -> torch.Tensor:
    """silu(w1 x) * w3 x."""
    gate, up = read
    return F.silu(gate, inplace=True).mul_(up)


def _convolution(g: ModelConfig, read: _Tensors, parameters: _Tensors, past: Past) -> torch.Tensor:
    """Gated short convolution: ``C * conv(B * x)``, in_proj's chunks being B, C, x."""
    (bcx,), (kernel,) = read, parameters
    b, c, value = bcx.chunk(3, dim=-1)
    gated = (b * value).transpose(1, 2)  # [W, H, S]
    gated = past.extend(gated, g.conv_L_cache - 1)
    return c * F.conv1d(gated, kernel, groups=g.hidden_size).transpose(1, 2)


def _attention(g: ModelConfig, read: _Tensors, parameters: _Tensors, past: Past) -> torch.Tensor:
    """Grouped-query attention with RMS-normed heads and half-split rotary positions."""
    q_norm, k_norm = parameters
    query, key, value = (
        x.view(*x.shape[:2], -1, g.head_dim).transpose(1, 2) for x in read
    )  # [W, heads, S, head_dim]
    cos, sin = _rotary(g, past.positions(query.shape[2]), query)
    q = _rotate(rms_norm(query, q_norm, g.norm_eps), cos, sin)
    k = _rotate(rms_norm(key, k_norm, g.norm_eps), cos, sin)
    return past.attend(q, k, value).transpose(1, 2).flatten(2)


_FUNCTIONS: dict[Inner, _Function] = {
    Inner.ATTENTION: _attention,
    Inner.CONVOLUTION: _convolution,
    Inner.FEED_FORWARD: _feed_forward,
}


def _rotary(
    g: ModelConfig, positions: torch.Tensor, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [..., S, head_dim], computed in float32 as transformers does."""
    exponent = torch.arange(0, g.head_dim, 2, dtype=torch.float32) / g.head_dim
    angle = positions.float()[..., None] / g.rope_theta**exponent
    angle = torch.cat((angle, angle), dim=-1).to(like.device)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x`` over the root of its mean square along the last axis, times ``weight``."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
