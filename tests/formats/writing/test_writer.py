"""The writer: whole builds under their final name; what is not whole stays for the next run."""

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lfmq.formats.build import BuildLayout, FileLayout, Segment, as_bytes, text_file
from lfmq.formats.writing.writer import BuildWriter
from lfmq.quant.errors import PlanError

VALUES = {f"w{i}": np.full(4, i, np.float32) for i in range(64)}


def segments(names=tuple(VALUES), start=8):
    return tuple(Segment(start + 16 * i, 16, (n,), as_bytes) for i, n in enumerate(names))


def one_file(size=8 + 16 * 64):
    return BuildLayout("one", (FileLayout("", size, ((0, b"HEADER"),), segments()),), True)


def folder():
    inside = FileLayout("data/weights.bin", 16 * 64, (), segments(start=0))
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


KEPT = ["a.part", "a.part.journal"]


@pytest.mark.parametrize("layout", [one_file(), folder()], ids=["file", "folder"])
@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_what_is_written(tmp_path, layout, raised):
    def interrupt(writer):
        raise raised

    with pytest.raises(raised):
        write(tmp_path / "a", layout, interrupt)
    assert names(tmp_path) == KEPT
    with BuildWriter(tmp_path / "a", layout) as writer:
        assert writer.finished == set(VALUES)
        writer.commit()
    write(tmp_path / "b", layout)
    assert names(tmp_path) == ["a", "b"]
    assert content(tmp_path / "a") == content(tmp_path / "b")


def content(path):
    if path.is_file():
        return path.read_bytes()
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("layout", [one_file(), folder()], ids=["file", "folder"])
def test_an_exception_before_anything_is_written_leaves_nothing(tmp_path, layout):
    def interrupt(writer):
        assert names(tmp_path) == KEPT
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", layout, interrupt, weights={})
    assert names(tmp_path) == []


def test_a_missing_piece_is_found_out(tmp_path):
    with pytest.raises(PlanError, match="63 segments were never written"):
        write(tmp_path / "a", folder(), weights={"w0": VALUES["w0"]})
    assert names(tmp_path) == KEPT


def test_a_packer_that_returns_the_wrong_length_is_a_bug(tmp_path):
    with pytest.raises(ValueError, match="20 bytes for a segment of 16"):
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
    assert names(target) == ["old"]
    with pytest.raises(PlanError, match="already exists"):  # it is not taken for the new one
        BuildWriter(target, folder())
    write(target, folder(), force=True)
    assert names(tmp_path) == ["a"]
    assert names(target) == ["config.json", "data"]


def test_finishing_gives_no_name_yet(tmp_path):
    def finish_and_commit(writer):
        writer.finish()
        assert names(tmp_path) == KEPT
        writer.commit()

    write(tmp_path / "a", folder(), finish_and_commit)
    assert names(tmp_path) == ["a"]


def test_a_path_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PlanError, match="cannot be written \\(Not a directory\\)"):
        write(tmp_path / "file" / "out" / "a", folder())


def test_a_name_the_file_system_refuses(tmp_path):
    with pytest.raises((PlanError, OSError), match=r"(?i)name too long"):
        write(tmp_path / ("a" * 254), folder())
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
            write(place / "a", huge)
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


# ---- going on


def half(target, layout, count=40, **options):
    """What a run leaves that ends after ``count`` units."""

    def stop(writer):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write(target, layout, stop, dict(list(VALUES.items())[:count]), **options)


def go_on(target, layout, **options):
    """Go on; the writer, and the units that were packed."""
    with BuildWriter(target, layout, **options) as writer:
        packed = [n for n in VALUES if n not in writer.finished]
        for name, values in VALUES.items():
            writer.write({name: values})
        writer.commit()
    return writer, packed


@pytest.mark.parametrize("layout", [one_file(3000), folder()], ids=["file", "folder"])
@pytest.mark.parametrize("threads", [1, 4])
def test_only_what_is_missing_is_written(tmp_path, layout, threads):
    half(tmp_path / "a", layout)
    writer, packed = go_on(tmp_path / "a", layout, threads=threads)
    assert packed == list(VALUES)[40:]
    assert (writer.started_over, writer.rewritten) == ("", 0)
    write(tmp_path / "b", layout)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert names(tmp_path) == ["a", "b"]


def test_finished_units_are_neither_packed_nor_written(tmp_path):
    half(tmp_path / "a", folder())
    with BuildWriter(tmp_path / "a", folder()) as writer:
        writer.write({"w3": np.zeros(99, np.float32)})  # packing it would be an error
        with pytest.raises(ValueError, match="bytes for a segment"):
            writer.write({"w40": np.zeros(99, np.float32)})


DAMAGE = {  # and units lost to it; w0 is zeros, as is what is not there
    "a piece": (1, lambda f: overwrite(f, 16 * 5, b"?")),
    "two pieces and what is missing": (2, lambda f: overwrite(f, 16 * 38 + 8, bytes(200))),
    "all": (40, lambda f: f.write_bytes(b"x" * 5000)),
    "end": (34, lambda f: os.truncate(f, 100)),
    "length": (0, lambda f: os.truncate(f, 99_999)),
    "gone": (39, lambda f: f.unlink()),
    "a link": (39, lambda f: (f.rename(f.with_name("x")), f.symlink_to("x"))),
}


def overwrite(path, at, content):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_not_as_it_was_written_is_written_again(tmp_path, kind):
    half(tmp_path / "a", folder())
    lost, damage = DAMAGE[kind]
    damage(tmp_path / "a.part" / "data" / "weights.bin")
    (tmp_path / "a.part" / "config.json").write_text("something longer")
    (tmp_path / "a.part" / "stray").touch()
    writer, packed = go_on(tmp_path / "a", folder())
    assert writer.rewritten == lost
    assert len(packed) == 24 + writer.rewritten
    write(tmp_path / "b", folder())
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_bytes_between_pieces_are_zero_again(tmp_path):
    file = FileLayout("", 3000, ((0, b"HEAD"),), segments(start=100))
    layout = BuildLayout("one", (file,), True)
    half(tmp_path / "a", layout)
    overwrite(tmp_path / "a.part", 4, b"?" * 96)
    overwrite(tmp_path / "a.part", 2000, b"?")
    go_on(tmp_path / "a", layout)
    write(tmp_path / "b", layout)
    assert content(tmp_path / "a") == content(tmp_path / "b")


STARTS_OVER = {
    "the recipe": (folder(), {"the recipe": "b", "x": "1"}),
    "x": (folder(), {"the recipe": "a"}),
    "y": (folder(), {"the recipe": "a", "x": "1", "y": "2"}),
    "the layout of the build": (
        BuildLayout("folder", (text_file("config.json", b"{ }"), folder().files[1])),
        {"the recipe": "a", "x": "1"},
    ),
}


@pytest.mark.parametrize("what", STARTS_OVER)
def test_a_change_starts_over_and_says_what(tmp_path, what):
    layout, depends = STARTS_OVER[what]
    half(tmp_path / "a", folder(), depends={"the recipe": "a", "x": "1"})
    writer, packed = go_on(tmp_path / "a", layout, depends=depends)
    assert writer.started_over == f"{what} changed"
    assert packed == list(VALUES)
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("left", ["a link", "a folder", "nothing"])
def test_a_part_that_is_none_starts_over(tmp_path, left):
    half(tmp_path / "a", one_file())
    (tmp_path / "a.part").rename(tmp_path / "x")
    if left == "a link":
        (tmp_path / "a.part").symlink_to(tmp_path / "x")
    elif left == "a folder":
        (tmp_path / "a.part").mkdir()
    before = content(tmp_path / "x")
    writer, packed = go_on(tmp_path / "a", one_file())
    assert writer.started_over == "a.part is gone"
    assert packed == list(VALUES)
    assert content(tmp_path / "x") == before


def test_a_run_that_ended_after_the_rename_goes_on(tmp_path):
    """Other builds of the run may still lack their names: there is no need for --force."""

    def commit_and_stop(writer):
        writer.commit()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write(tmp_path / "a", folder(), commit_and_stop)
    assert names(tmp_path) == ["a", "a.part.journal"]
    _, packed = go_on(tmp_path / "a", folder())
    assert packed == []
    assert names(tmp_path) == ["a"]


def test_a_disk_that_fills_up_in_the_middle(tmp_path, monkeypatch):
    pwrite = os.pwrite

    def full(descriptor, content, offset):
        if offset > 500:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(PlanError, match=r"no space left .* the next run goes on with what is"):
        write(tmp_path / "a", folder())
    monkeypatch.undo()
    _, packed = go_on(tmp_path / "a", folder())
    assert packed == list(VALUES)[32:]


@pytest.mark.parametrize("gone", ["a.part", "."])
@pytest.mark.parametrize("again", [True, False])
def test_removed_in_the_middle(tmp_path, gone, again):
    place = tmp_path / "out"

    def remove(writer):
        shutil.rmtree(place / gone)
        if again:
            writer.write({"w0": VALUES["w0"]})
        writer.commit()

    with pytest.raises(PlanError, match=r"cannot be written \(removed while it was written\)"):
        write(place / "a", folder(), remove)


def test_what_no_run_can_use_is_removed(tmp_path):
    def discard(writer):
        writer.discard()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write(tmp_path / "a", folder(), discard)
    assert names(tmp_path) == []
