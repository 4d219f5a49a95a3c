"""What every container has in common: a byte layout known from the plan, filled by segments.

A format turns a plan into a :class:`BuildLayout`: files with their headers and, for each segment
of a file, where it goes, which tensors it is made of and the pure function that packs them. One
writer (``lfmq.formats.writing.writer``) fills in any layout, in any order; no format writes a
build.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lfmq.formats.plan import ModelConfig, Plan

Bytes = NDArray[np.uint8]
# A key's value in a file's metadata.
MetadataValue = str | int | float | bool | tuple[str, ...] | tuple[int, ...] | tuple[float, ...]
# Expert weights that must share a width: a layer's projection, an expert, a layer; or none must.
WidthScope = Literal["stack", "expert", "layer", "weight"]


@dataclass(frozen=True, slots=True)
class Assets:
    """What travels beside the weights, as found in the checkpoint folder.

    Attributes:
        name: the checkpoint's name, which builds are named after.
        config_json: the parsed ``config.json``.
        files: tokenizer and template files by name, byte for byte (``tokenizer.json``, ...).
        folder: the checkpoint folder, for libraries that read tokenizers from one.
        metadata: key-values that the user adds to a GGUF.
    """

    name: str
    config_json: dict[str, Any]
    files: dict[str, bytes]
    folder: Path
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of bytes in a file.

    Attributes:
        offset: where it starts in the file, bytes.
        nbytes: its length, bytes.
        sources: checkpoint names of the tensors it holds; all belong to one unit of the plan.
        pack: takes the weights in the order of ``sources``, returns contiguous bytes.
        by_rows: the bytes of a run of rows follow those of the rows before it, so that a large
            weight can be packed a few rows at a time.
    """

    offset: int
    nbytes: int
    sources: tuple[str, ...]
    pack: Callable[..., Bytes]
    by_rows: bool = False


@dataclass(frozen=True, slots=True)
class FileLayout:
    """One file of a build.

    Attributes:
        path: relative to the build's folder; empty when the build is a single file.
        size: length of the finished file, bytes.
        constants: bytes that do not depend on a weight, by offset (the header among them).
        segments: what the weights fill in. Bytes neither covers stay zero.
    """

    path: str
    size: int
    constants: tuple[tuple[int, bytes], ...] = ()
    segments: tuple[Segment, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class BuildLayout:
    """All files of one build; ``single_file`` builds have one file and no folder."""

    format: str
    files: tuple[FileLayout, ...]
    single_file: bool = False

    @property
    def nbytes(self) -> int:
        """Size of all files together, bytes."""
        return sum(file.size for file in self.files)


def text_file(path: str, content: bytes) -> FileLayout:
    """A small file whose bytes are known from the plan."""
    return FileLayout(path, len(content), ((0, content),))


def as_json(document: Any) -> bytes:
    """A JSON file's bytes, as the Hugging Face libraries indent it."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


class Format(Protocol):
    """What a module of ``lfmq.formats`` offers for its container.

    ``NAME`` is the word of ``--to``; a build is called after its stem and ``SUFFIX``.
    """

    NAME: str
    SUFFIX: str
    WIDTHS: WidthScope

    def check(self, plan: Plan, assets: Assets) -> None:
        """Raise UnsupportedError when the container cannot hold the plan."""

    def layout(self, plan: Plan, assets: Assets) -> BuildLayout:
        """Every file, header and offset of the build."""

    def open_reader(self, path: Path) -> "Reader":
        """Open a finished build for reading."""


class Reader(Protocol):
    """A finished build, opened to read its weights back under their checkpoint names."""

    @property
    def config(self) -> ModelConfig:
        """The model's facts as the build's own metadata states them."""

    def check(self, model: Plan) -> None:
        """Refuse a build that holds less, more or something else than its config implies.

        Args:
            model: the tensors of :attr:`config`; its storages are not looked at.

        Raises:
            ValidationError: the first tensor, key or node that is missing, unknown or another.
        """

    def is_float(self, name: str) -> bool:
        """Whether a tensor is stored as floats, not as integers with scales."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """The dequantized tensor or a run of its rows, float32, in the checkpoint's shape."""


def as_bytes(array: NDArray[Any]) -> Bytes:
    """The array's memory as a flat row of bytes."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
