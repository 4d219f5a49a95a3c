"""What a layer is, as data: two blocks, each of which adds something to the residual stream.

A block normalizes the hidden states ``x`` it finds, and of each of its branches computes
``writer(inner(reader_1(norm(x)), reader_2(norm(x)), ...))``. A block that mixes tokens and a dense
feed-forward have one branch, which all tokens take. A routed feed-forward has a router, and a
branch for each expert. The forward pass, quantization and statistics loop over blocks; how an
architecture names its tensors is in :mod:`.tensors`, what an inner function computes in
:mod:`.inner`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from lfmq.converter.model.tensors import Tensor, Use, layer_tensors
from lfmq.formats.plan import ModelConfig


class Inner(StrEnum):
    """What stands between the weights that read the stream and the one that writes to it."""

    ATTENTION = "attention"
    CONVOLUTION = "convolution"
    FEED_FORWARD = "feed-forward"


@dataclass(frozen=True, slots=True)
class Branch:
    """Weights through which tokens go, by name.

    Attributes:
        readers: multiply the normed hidden states, in the order the inner function takes them.
        writer: multiplies what the inner function makes of that; added to the hidden states.
    """

    readers: tuple[str, ...]
    writer: str

    @property
    def weights(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.readers, self.writer)


@dataclass(frozen=True, slots=True)
class Router:
    """What chooses a token's experts: the names of its weight, and of the bias of its choice."""

    weight: str
    bias: str | None


@dataclass(frozen=True, slots=True)
class Block:
    """One half of a layer.

    Attributes:
        layer: of the model.
        inner: the inner function.
        norm: name of the weight of the RMS norm.
        parameters: names of the inner function's own tensors, which stay floats.
        branches: one, or one for each expert.
        router: None where all tokens take the one branch.
    """

    layer: int
    inner: Inner
    norm: str
    parameters: tuple[str, ...]
    branches: tuple[Branch, ...]
    router: Router | None = None

    @property
    def mixes_tokens(self) -> bool:
        """Whether what it adds to a token depends on the tokens before it."""
        return self.inner is not Inner.FEED_FORWARD

    @property
    def branch(self) -> Branch:
        """The one that all tokens take."""
        (only,) = self.branches
        return only


@lru_cache(maxsize=8)
def model_blocks(config: ModelConfig) -> tuple[tuple[Block, ...], ...]:
    """The blocks of every layer, in the order they run."""
    kinds = {"conv": Inner.CONVOLUTION, "full_attention": Inner.ATTENTION}
    return tuple(
        tuple(
            _block(layer, inner, tensors)
            for inner, tensors in zip(
                (kinds[kind], Inner.FEED_FORWARD), layer_tensors(config, layer), strict=True
            )
        )
        for layer, kind in enumerate(config.layer_types)
    )


def routed_blocks(config: ModelConfig) -> dict[int, tuple[Block, Router]]:
    """The blocks that have a router, and it, by layer."""
    return {
        block.layer: (block, block.router)
        for layer in model_blocks(config)
        for block in layer
        if block.router is not None
    }


def _block(layer: int, inner: Inner, tensors: Iterable[Tensor]) -> Block:
    found: dict[Use, list[str]] = {use: [] for use in Use}
    readers: dict[int | None, list[str]] = {}
    for tensor in tensors:
        assert tensor.use is not None
        found[tensor.use].append(tensor.name)
        if tensor.use is Use.READER:
            readers.setdefault(tensor.expert, []).append(tensor.name)
    branches = zip(readers.values(), found[Use.WRITER], strict=True)
    bias = found[Use.ROUTER_BIAS]
    routers = [Router(name, bias[0] if bias else None) for name in found[Use.ROUTER]]
    (norm,) = found[Use.NORM]
    return Block(
        layer,
        inner,
        norm,
        tuple(found[Use.INNER]),
        tuple(Branch(tuple(names), writer) for names, writer in branches),
        routers[0] if routers else None,
    )
