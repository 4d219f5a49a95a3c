"""Two builds against each other."""

from dataclasses import replace
from os import PathLike
from pathlib import Path

from lfmq.api.checkpoint import Source, opened
from lfmq.api.text import SEQUENCE, TOKENS, Paths, Text, paths_of
from lfmq.converter.jobs.batches import torch_threads
from lfmq.converter.jobs.execution import Execution
from lfmq.validation.measure.builds import Engine
from lfmq.validation.measure.compare import PairedReport
from lfmq.validation.measure.compare import compare as compare_builds
from lfmq.validation.parity.run import measure_parity


def compare(
    checkpoint: Source,
    a: str | PathLike[str],
    b: str | PathLike[str],
    *,
    text: Paths = (),
    tokens: int = TOKENS,
    sequence: int = SEQUENCE,
    engine: Engine = "read",
    allow_other: bool = False,
    execution: Execution = Execution(),
) -> PairedReport:
    """Run two builds of one checkpoint on the same tokens and compare them figure by figure.

    Args:
        checkpoint: a checkpoint, or what :func:`lfmq.open_checkpoint` takes.
        a: a finished build of any container.
        b: another one.
        text: plain text or JSONL, one path or several; default: the sample's evaluation set.
        tokens: how many tokens of the text.
        sequence: tokens in a window; the second half of each window is scored.
        engine: ``read`` runs the files' weights in the reference forward, ``native`` the files in
            their own runtime.
        allow_other: compare builds of other checkpoints too; the report names them.
        execution: threads, device, and whom to tell of progress.

    Returns:
        Each figure of both builds, and its difference with a 95 % interval.

    Raises:
        CheckpointError: the checkpoint cannot be opened.
        ValidationError: a build or the text cannot be read, is of another model, or a runtime
            fails.
    """
    source, chosen = opened(checkpoint), Text(paths_of(text), tokens, sequence)
    with torch_threads(execution.threads):
        windows = chosen.evaluation_windows(source, execution)
        found = compare_builds(
            source,
            Path(a),
            Path(b),
            windows,
            engine=engine,
            allow_other=allow_other,
            execution=execution,
        )
    parity = measure_parity(
        source.assets,
        {build.path: build.format for build in (found.a, found.b)},
        native=engine == "native",
        threads=execution.threads,
    )
    return replace(found, parity=parity)
