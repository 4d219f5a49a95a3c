"""Hashes taken behind pieces that are finished in any order."""

import hashlib
import os
import random
from pathlib import Path

import numpy as np
import pytest

from lfmq.formats.build import FileLayout, Segment
from lfmq.formats.writing.hashes import TrailingHashes

SIZES = (700, 0, 1, 5_000, 2**21 + 3, 12)


def layout(path: str) -> FileLayout:
    at, segments = 100, []
    for number, size in enumerate(SIZES):
        segments.append(Segment(at, size, (f"tensor {number}",), lambda w: w))
        at += size
    return FileLayout(path, at, ((0, bytes(100)),), tuple(segments))


def write(path: Path, layouts: list[FileLayout]) -> dict[str, int]:
    rng = np.random.default_rng(0)
    for file in layouts:
        (path / file.path).write_bytes(rng.bytes(file.size))
    return {file.path: os.open(path / file.path, os.O_RDWR) for file in layouts}


@pytest.mark.parametrize("drop_page_cache", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_pieces_does_not_matter(
    tmp_path: Path, seed: int, drop_page_cache: bool
) -> None:
    layouts = [layout("a"), layout("b"), FileLayout("empty", 0)]
    descriptors = write(tmp_path, layouts)
    hashes = TrailingHashes(layouts, descriptors, drop_page_cache=drop_page_cache)
    segments = [(file.path, segment.offset) for file in layouts for segment in file.segments]
    random.Random(seed).shuffle(segments)
    for segment in segments:
        hashes.finished([segment])
    found = hashes.result()
    hashes.stop()
    expected = {f.path: hashlib.sha256((tmp_path / f.path).read_bytes()) for f in layouts}
    assert found == {path: digest.hexdigest() for path, digest in expected.items()}


def test_a_file_cut_short_is_an_error(tmp_path: Path) -> None:
    file = layout("a")
    descriptors = write(tmp_path, [file])
    os.truncate(tmp_path / "a", 5_000)
    hashes = TrailingHashes([file], descriptors)
    hashes.finished(("a", segment.offset) for segment in file.segments)
    with pytest.raises(OSError, match="removed or cut"):
        hashes.result()
    hashes.stop()


def test_it_stops_whatever_is_missing(tmp_path: Path) -> None:
    hashes = TrailingHashes([layout("a")], write(tmp_path, [layout("a")]))
    hashes.stop()
