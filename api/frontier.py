"""The least predicted KL divergence for each size."""

from os import PathLike
from pathlib import Path

from lfmq.api.checkpoint import Source, opened
from lfmq.converter.mixed_precision.frontier import Frontier, trace_frontier
from lfmq.converter.plan.recipe import save_recipe
from lfmq.converter.statistics.calibrate import open_statistics
from lfmq.formats.registry import FORMATS
from lfmq.validation.pages.files import check_writable, write_report
from lfmq.validation.pages.frontier_page import render_frontier


def frontier(
    checkpoint: Source,
    statistics: str | PathLike[str],
    to: str,
    *,
    html: str | PathLike[str] | None = None,
    point: int | None = None,
    save: str | PathLike[str] | None = None,
) -> Frontier:
    """Choose the widths of least predicted divergence for sizes from the least to the most.

    Args:
        checkpoint: a checkpoint, or what :func:`lfmq.open_checkpoint` takes.
        statistics: the file of ``calibrate``.
        to: the container of the builds.
        html: also write the frontier as one page there.
        point: the number of a point, whose recipe is written to ``save``.
        save: a TOML file.

    Raises:
        LfmqError: the checkpoint or the statistics cannot be used, there is no such point, or a
            file cannot be written.
    """
    page = None if html is None else Path(html)
    check_writable(page)
    source = opened(checkpoint)
    known = open_statistics(Path(statistics), source.config)
    found = trace_frontier(source, known, to, FORMATS[to])
    if point is not None and save is not None:
        save_recipe(Path(save), found.recipe(point))
    if page is not None:
        write_report(page, render_frontier(found))
    return found
