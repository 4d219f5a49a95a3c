"""The writer: whole builds under their final name, or nothing; an older build is never lost."""

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lfmq.formats.build import BuildLayout, FileLayout, Piece, as_bytes, text_file
from lfmq.formats.writer import BuildWriter
from lfmq.quant.errors import PlanError

VALUES = {f"w{i}": np.full(4, i, np.float32) for i in range(64)}


def pieces(names=tuple(VALUES), start=8):
    return tuple(Piece(start + 16 * i, 16, (n,), as_bytes) for i, n in enumerate(names))


def one_file(size=8 + 16 * 64):
    return BuildLayout("one", (FileLayout("", size, ((0, b"HEADER"),), pieces()),), True)


def folder():
    inside = FileLayout("data/weights.bin", 16 * 64, (), pieces(start=0))
    return BuildLayout("folder", (text_file("config.json", b"{}"), inside))


def write(target, layout, last=lambda writer: writer.commit(), weights=VALUES, **options):
    with BuildWriter(target, layout, **options) as writer:
        for name, values in weights.items():
            writer.write({name: values})
        last(writer)


def names(path):
    return sorted(p.name for p in path.iterdir())


def test_a_single_file(tmp_path):
    write(tmp_path / "a.bin", one_file(8 + 16 * 64 + 100))
    expected = b"HEADER\0\0" + b"".join(v.tobytes() for v in VALUES.values()) + bytes(100)
    assert (tmp_path / "a.bin").read_bytes() == expected
    assert names(tmp_path) == ["a.bin"]


def test_a_folder(tmp_path):
    write(tmp_path / "a", folder())
    assert (tmp_path / "a" / "config.json").read_bytes() == b"{}"
    content = b"".join(v.tobytes() for v in VALUES.values())
    assert (tmp_path / "a" / "data" / "weights.bin").read_bytes() == content
    assert names(tmp_path) == ["a"]


def test_threads_and_order_do_not_matter(tmp_path):
    with BuildWriter(tmp_path / "a.bin", one_file()) as writer:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: writer.write({n: VALUES[n]}), reversed(VALUES)))
        writer.commit()
    write(tmp_path / "b.bin", one_file())
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


@pytest.mark.parametrize("layout", [one_file(), folder()], ids=["file", "folder"])
@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(tmp_path, layout, raised):
    def interrupt(writer):
        assert names(tmp_path) == ["a.part"]
        raise raised

    with pytest.raises(raised):
        write(tmp_path / "a", layout, interrupt)
    assert names(tmp_path) == []


def test_a_missing_piece_is_found_out(tmp_path):
    with pytest.raises(PlanError, match="63 pieces were never written"):
        write(tmp_path / "a", folder(), weights={"w0": VALUES["w0"]})
    assert names(tmp_path) == []


def test_a_packer_that_returns_the_wrong_length_is_a_bug(tmp_path):
    with pytest.raises(ValueError, match="20 bytes for a piece of 16"):
        write(tmp_path / "a", folder(), weights={"w0": np.zeros(5, np.float32)})
    assert names(tmp_path) == []


def test_an_existing_build_is_refused_and_stays(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(PlanError, match="already exists; give --force"):
        write(tmp_path / "a", one_file())
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("old", ["file", "folder", "link to a folder", "dangling link"])
@pytest.mark.parametrize("layout", [one_file(), folder()], ids=["file", "folder"])
def test_force_replaces_whatever_is_there(tmp_path, old, layout):
    target, elsewhere = tmp_path / "out" / "a", tmp_path / "elsewhere"
    target.parent.mkdir()
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    if old == "file":
        target.write_text("old")
    elif old == "folder":
        shutil.copytree(elsewhere, target)
    else:
        target.symlink_to(elsewhere if old == "link to a folder" else tmp_path / "nowhere")
    write(target, layout, force=True)
    assert names(target.parent) == ["a"]
    assert not target.is_symlink()
    assert target.is_file() == layout.single_file
    assert names(elsewhere) == ["kept"]


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    (tmp_path / "a.part" / "data").mkdir(parents=True)
    (tmp_path / "a.part" / "data" / "weights.bin").write_bytes(b"x" * 5000)
    (tmp_path / "a.old").mkdir()
    write(tmp_path / "a", folder())
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["config.json", "data"]


def test_a_rename_that_fails_brings_the_old_build_back(tmp_path):
    target = tmp_path / "a"
    target.mkdir()
    (target / "old").touch()

    def lose_and_commit(writer):
        writer.finish()
        shutil.rmtree(writer.part)
        writer.commit()

    with pytest.raises(PlanError, match="cannot be written"):
        write(target, folder(), lose_and_commit, force=True)
    assert names(tmp_path) == ["a"]
    assert names(target) == ["old"]


def test_finishing_gives_no_name_yet(tmp_path):
    def finish_and_commit(writer):
        writer.finish()
        assert names(tmp_path) == ["a.part"]
        writer.commit()

    write(tmp_path / "a", folder(), finish_and_commit)
    assert names(tmp_path) == ["a"]


def test_a_path_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PlanError, match="cannot be written \\(Not a directory\\)"):
        BuildWriter(tmp_path / "file" / "out" / "a", folder())


def test_a_name_the_file_system_refuses(tmp_path):
    with pytest.raises((PlanError, OSError), match=r"(?i)name too long"):
        BuildWriter(tmp_path / ("a" * 254), folder())
    assert names(tmp_path) == []


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a file system in memory")
def test_a_build_larger_than_the_disk_is_refused_at_once():
    """Reserving the space fails before anything is written: the limit is known beforehand."""
    place = Path("/dev/shm") / f"lfmq-test-{os.getpid()}"
    size = os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize + 2**20
    try:
        message = f"no space left on the device; the build needs {size + 16 * 64 + 2:,} bytes"
        huge = BuildLayout("huge", (*folder().files, FileLayout("huge", size)))
        with pytest.raises(PlanError, match=message):
            BuildWriter(place / "a", huge)
        assert names(place) == []
    finally:
        shutil.rmtree(place, ignore_errors=True)


def test_a_file_system_that_cannot_reserve_space(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    write(tmp_path / "a.bin", one_file(5000))
    monkeypatch.delattr(os, "posix_fallocate")
    write(tmp_path / "b.bin", one_file(5000))
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert (tmp_path / "b.bin").stat().st_size == 5000
