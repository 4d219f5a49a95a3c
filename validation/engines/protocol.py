"""What an engine is: something that runs a build, teacher-forced, and shows what it computed.

W windows, S tokens a window, P scored positions a window, V vocabulary, H hidden size, k experts
a token.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

# Normed hidden states that each MoE layer's router reads, by layer: float32 [W, S, H].
RouterInputs = Mapping[int, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What an engine is asked to run.

    Attributes:
        path: the build.
        ids: int64 [W, S], the windows; they do not see each other.
        scored: positions of a window whose logits are wanted.
        router_inputs: when given, every MoE layer (its router and its experts) reads these instead
            of its own normed hidden states, which tests the runtime's routing rule alone; no
            logits are wanted then.
        threads: of the runtime.
    """

    path: Path
    ids: NDArray[np.int64]
    scored: slice
    router_inputs: RouterInputs | None = None
    threads: int = 2


@dataclass(frozen=True, slots=True)
class WindowRun:
    """One window through a build.

    Attributes:
        logits: float32 [P, V]; None when the router's inputs were given.
        selected: int64 [S, k], the experts each MoE layer chose, by layer, in any order.
    """

    logits: NDArray[np.float32] | None
    selected: Mapping[int, NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class TokenizerRequest:
    """What a runtime's tokenizer is asked.

    Attributes:
        path: the build.
        texts: to be made tokens.
        sequences: token ids, to be made text.
        chats: to be rendered by the build's template: the arguments ``messages``, ``tools`` and
            ``add_generation_prompt``.
    """

    path: Path
    texts: tuple[str, ...]
    sequences: tuple[tuple[int, ...], ...]
    chats: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenizerRun:
    """What a runtime's tokenizer answered; None for what the runtime does not do.

    Attributes:
        ids: of each text alone; tokens that are written out in it are read as such.
        framed: of each text with what the tokenizer puts around it.
        kept: each sequence as text, special tokens written out.
        skipped: each sequence as text without its special tokens.
        rendered: each chat; None for one that the interface does not take as it is.
    """

    ids: list[list[int]]
    framed: list[list[int]] | None
    kept: list[str]
    skipped: list[str]
    rendered: list[str | None] | None = None


class TokenizerEngine(Protocol):
    """What a module with a runtime's tokenizer offers; it is used in a process of its own.

    ``NAME`` is the runtime's, ``EXTRA`` the extra of the package that installs it.
    """

    NAME: str
    EXTRA: str

    def version(self) -> str:
        """The installed runtime's name and version; ImportError without it."""

    def tokenize(self, request: TokenizerRequest) -> TokenizerRun:
        """Answer the request."""


class NativeEngine(Protocol):
    """What a module ``lfmq.validation.native_*`` offers; it is used in a process of its own.

    ``NAME`` is the runtime's, ``EXTRA`` the extra of the package that installs it.
    """

    NAME: str
    EXTRA: str

    def version(self) -> str:
        """The installed runtime's name and version; ImportError without it."""

    def run_windows(self, request: EngineRequest) -> Iterator[WindowRun]:
        """Every window of the request, in order."""
