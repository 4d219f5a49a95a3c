"""The journal: every line but a torn or damaged one counts, and nothing is read into it."""

import json
import os

import pytest

from lfmq.formats.build import BuildLayout, FileLayout, Segment, as_bytes
from lfmq.formats.writing.journal import Journal, Past, digest

DEPENDS = {"the recipe": "a"}
PIECES = ("0" * 16, "1" * 16)


@pytest.fixture
def journal(tmp_path):
    found = Journal(tmp_path / "a.part.journal")
    yield found
    found.close()


def begun(journal, *units):
    journal.create(DEPENDS)
    for unit in units:
        journal.add(unit, PIECES)
    journal.close()


def test_lines_are_read_back(journal):
    begun(journal, ("x",), ("y", "z"))
    past = journal.read(DEPENDS)
    assert past.units == {("x",): PIECES, ("y", "z"): PIECES}
    assert (past.changed, past.whole, past.nbytes) == ("", None, journal.path.stat().st_size)
    journal.go_on(past)
    journal.end(77)
    assert journal.read(DEPENDS).whole == 77


def test_there_may_be_none(journal):
    assert journal.read(DEPENDS) is None
    journal.path.write_bytes(b'{"journal": 1, "depends": {')
    assert journal.read(DEPENDS) is None


@pytest.mark.parametrize("cut", range(1, 69, 6))
def test_a_torn_line_is_cut_off(journal, cut):
    begun(journal, ("x",), ("y",))
    content = journal.path.read_bytes()
    os.truncate(journal.path, len(content) - cut)
    past = journal.read(DEPENDS)
    assert set(past.units) == {("x",)}
    journal.go_on(past)
    journal.add(("y",), PIECES)
    assert journal.path.read_bytes() == content


LINES = [
    b"", b"\0" * 50, b"[]", b"3", b"{}", b"[" * 100_000, b"\xff\xfe", b'{"unit": "x"}',
    b'{"unit": []}', b'{"unit": [3]}', b'{"unit": [["x"]]}', b'{"unit": ["x"]}',
    b'{"unit": ["x"], "pieces": "y"}', b'{"unit": ["x"], "pieces": [1]}',
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_damaged_line_does_not_count(journal, line):
    begun(journal, ("x",), ("y",))
    header, first, second = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(header + first + line + b"\n" + second)
    assert journal.read(DEPENDS).units == {("x",): PIECES, ("y",): PIECES}


@pytest.mark.parametrize("header", [*LINES, json.dumps({"journal": 1, "depends": {}}).encode()])
def test_a_damaged_header_starts_over(journal, header):
    journal.path.write_bytes(header + b"\n")
    assert journal.read(DEPENDS) == Past("its journal cannot be read")


def test_a_journal_that_was_removed_takes_no_more(journal):
    journal.create(DEPENDS)
    journal.path.unlink()
    with pytest.raises(FileNotFoundError, match="removed while it was written"):
        journal.add(("x",), PIECES)


def layout(offset=8, constant=b"HEADER", size=100, sources=("x",), path=""):
    segment = Segment(offset, 16, sources, as_bytes)
    return BuildLayout("one", (FileLayout(path, size, ((0, constant),), (segment,)),), True)


def test_a_layout_is_known_by_all_it_fixes():
    others = [
        layout(offset=9),
        layout(constant=b"header"),
        layout(size=101),
        layout(sources=("y",)),
        layout(sources=("x", "y")),
        layout(path="a"),
        BuildLayout("two", layout().files, True),
        BuildLayout("one", layout().files, False),
    ]
    assert digest(layout()) == digest(layout())
    assert len({digest(found) for found in [layout(), *others]}) == 9
