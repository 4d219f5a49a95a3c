"""What the page cache is told to let go of."""

import os

import pytest

from lfmq.formats.writing.page_cache import RUN, PageTrail, outgrows_memory

Advice = list[tuple[int, int]]


@pytest.fixture
def advice(monkeypatch: pytest.MonkeyPatch) -> Advice:
    """File and offset of each run that was let go of."""
    found: Advice = []

    def take(descriptor: int, start: int, length: int, kind: int) -> None:
        assert (length, kind) == (RUN, os.POSIX_FADV_DONTNEED)
        found.append((descriptor, start))

    monkeypatch.setattr(os, "posix_fadvise", take)
    return found


def test_whole_runs_go_when_enough_follow(advice: Advice) -> None:
    trail = PageTrail(2 * RUN, active=True)
    trail.passed(3, 0, RUN - 1)
    trail.passed(3, RUN - 1, 2 * RUN)
    assert advice == []
    trail.passed(3, 2 * RUN, 4 * RUN + 5)
    assert advice == [(3, 0), (3, RUN)]
    trail.passed(4, 0, RUN)
    assert advice == [(3, 0), (3, RUN), (3, 2 * RUN)]


def test_what_was_written_goes_to_the_disk_first(advice: Advice) -> None:
    trail = PageTrail(RUN, active=True, written=True)
    trail.passed(3, 0, 2 * RUN)
    assert advice == [(3, 0), (3, RUN), (3, 0)]


def test_nothing_is_let_go_of_without_need(advice: Advice) -> None:
    PageTrail(0, active=False).passed(3, 0, 9 * RUN)
    assert advice == []


def test_what_outgrows_memory() -> None:
    assert not outgrows_memory(2**20)
    assert outgrows_memory(2**60) == hasattr(os, "posix_fadvise")
