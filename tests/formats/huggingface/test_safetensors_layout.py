"""Safetensors layouts: exact bytes, shards, and what other libraries read in them."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from lfmq.formats.build import BuildLayout, Bytes, FileLayout, Segment, as_bytes
from lfmq.formats.huggingface.safetensors_file import DTYPES, read_header, read_tensor
from lfmq.formats.huggingface.safetensors_layout import SHARD_NBYTES, TensorLayout, shard_files
from lfmq.formats.writing.writer import BuildWriter

INDEX = "model.safetensors.index.json"
SHAPES = [("a", "F16", (3,)), ("b", "F32", (2, 5)), ("c", "I64", (2,)), ("d", "U32", (4, 2, 3))]


def value(name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    rng = np.random.default_rng(list(name.encode()))
    return rng.integers(0, 100, shape).astype(DTYPES[dtype])


def pack(content: Bytes, weight: Any) -> Bytes:
    return content


def tensor(name: str, dtype: str, shape: tuple[int, ...], parts: int = 1) -> TensorLayout:
    """A tensor of ``parts`` equal pieces; a piece's source is called like it and its number."""
    rows = as_bytes(value(name, dtype, shape)).reshape(parts, -1)
    segments = [
        Segment(i * r.nbytes, r.nbytes, (f"{name}{i}",), partial(pack, r))
        for i, r in enumerate(rows)
    ]
    return TensorLayout(name, dtype, shape, tuple(segments))


def layout(tensors: Sequence[TensorLayout], **options: int) -> tuple[FileLayout, ...]:
    return shard_files(tensors, metadata={"format": "pt"}, total_parameters=7, **options)


def write(path: Path, files: tuple[FileLayout, ...], *, backwards: bool = False) -> Path:
    sources = [s for f in files for p in f.segments for s in p.sources]
    with BuildWriter(path, BuildLayout("test", files)) as writer:
        for source in reversed(sources) if backwards else sources:
            writer.write({source: np.zeros(0, np.float32)})
        writer.commit()
    return path


def test_golden_bytes(tmp_path: Path) -> None:
    """The safetensors library's own writer makes the same file."""
    path = write(tmp_path / "x", layout([tensor("a", "F32", (2,)), tensor("b", "F32", (3, 1))]))
    arrays = {"a": value("a", "F32", (2,)), "b": value("b", "F32", (3, 1))}
    assert (path / "model.safetensors").read_bytes() == save(arrays, {"format": "pt"})
    assert json.loads((path / INDEX).read_text()) == {
        "metadata": {"total_size": 20, "total_parameters": 7},
        "weight_map": {"a": "model.safetensors", "b": "model.safetensors"},
    }


def test_header() -> None:
    file, _ = layout([tensor(*s) for s in SHAPES])
    ((offset, start),) = file.constants
    length = int.from_bytes(start[:8], "little")
    text = start[8:]
    assert (offset, len(text), length % 8) == (0, length, 0)
    assert text.rstrip(b" ").endswith(b"}")
    header = json.loads(text)
    assert list(header) == ["__metadata__", "a", "b", "c", "d"]
    assert header["b"] == {"dtype": "F32", "shape": [2, 5], "data_offsets": [6, 46]}
    assert [p.offset - len(start) for p in file.segments] == [0, 6, 46, 62]
    assert file.size == len(start) + 62 + 96


@pytest.mark.parametrize("framework", ["np", "pt"])
def test_the_library_reads_tensors_off_their_alignment(framework: str, tmp_path: Path) -> None:
    """Offsets are not rounded up, since the format has no gaps; libraries must cope."""
    path = write(tmp_path / "x", layout([tensor(*s) for s in SHAPES]))
    with safe_open(path / "model.safetensors", framework) as file:
        assert file.metadata() == {"format": "pt"}
        for name, dtype, shape in SHAPES:
            found = file.get_tensor(name)
            found = found.numpy() if isinstance(found, torch.Tensor) else found
            np.testing.assert_array_equal(found, value(name, dtype, shape))


@given(st.integers(1, 300), st.integers(1, 5))
def test_shards(shard_nbytes: int, count: int) -> None:
    tensors = [tensor(f"t{i}", "F32", (5 * i + 1,)) for i in range(count)]
    *files, index = layout(tensors, shard_nbytes=shard_nbytes)
    names = [f.path for f in files]
    if len(files) == 1:
        assert names == ["model.safetensors"]
    else:
        n = len(files)
        assert names == [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    held = [[p.sources[0][:-1] for p in f.segments] for f in files]
    assert [name for shard in held for name in shard] == [t.name for t in tensors]
    sizes = [sum(p.nbytes for p in f.segments) for f in files]
    assert all(s <= shard_nbytes or len(h) == 1 for s, h in zip(sizes, held, strict=True))
    # nothing would have fitted into the file before
    assert all(
        s + files[i + 1].segments[0].nbytes > shard_nbytes for i, s in enumerate(sizes[:-1])
    )
    document = json.loads(index.constants[0][1])
    assert document["metadata"]["total_size"] == sum(sizes)
    expected = {name: f.path for f, shard in zip(files, held, strict=True) for name in shard}
    assert document["weight_map"] == expected


def test_a_shard_is_five_gibibytes() -> None:
    big = [TensorLayout(n, "U8", (SHARD_NBYTES // 2,), ()) for n in "abc"]
    first, second, _ = layout(big)
    assert SHARD_NBYTES == 5 * 1024**3
    assert list(json.loads(first.constants[0][1][8:]))[1:] == ["a", "b"]
    assert second.size == len(second.constants[0][1]) + SHARD_NBYTES // 2


def test_pieces_of_a_tensor_in_any_order(tmp_path: Path) -> None:
    shape = (6, 4, 8)
    files = layout([tensor("a", "F16", (3,)), tensor("stack", "U32", shape, parts=6)])
    forth = write(tmp_path / "x", files)
    back = write(tmp_path / "y", files, backwards=True)
    path = forth / "model.safetensors"
    assert path.read_bytes() == (back / "model.safetensors").read_bytes()
    found = read_tensor(read_header(path)["stack"])
    np.testing.assert_array_equal(found, value("stack", "U32", shape))


def test_the_same_tensors_give_the_same_layout() -> None:
    first, second = (layout([tensor(*s) for s in SHAPES], shard_nbytes=60) for _ in range(2))
    assert [(f.path, f.size, f.constants) for f in first] == [
        (f.path, f.size, f.constants) for f in second
    ]
