"""Which text is used: the user's, or the sets that come with the package."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.checkpoint.locate import sample_file
from lfmq.converter.jobs.execution import Execution
from lfmq.converter.model.chat import ChatError
from lfmq.converter.model.text import Windows, load_windows
from lfmq.converter.statistics.balance import Balanced
from lfmq.converter.statistics.balance import balance as choose_balanced
from lfmq.quant.errors import UsageError

# A path, or several.
Paths = str | PathLike[str] | Iterable[str | PathLike[str]]

TOKENS, SEQUENCE = 32768, 512
_CALIBRATION, _EVALUATION = "calibration.jsonl", "evaluation.jsonl"


def paths_of(given: Paths) -> tuple[Path, ...]:
    """One path or several, as a tuple."""
    return (Path(given),) if isinstance(given, str | PathLike) else tuple(map(Path, given))


@dataclass(frozen=True, slots=True)
class Text:
    """Text and how much of it.

    Attributes:
        paths: plain text or JSONL files; empty for the set that comes with the package.
        tokens: how many tokens of it.
        sequence: tokens in a window.
        balance: to calibrate with, choose the windows among this many tokens, so that every expert
            gets the tokens it needs; None takes the first windows.
    """

    paths: tuple[Path, ...] = ()
    tokens: int = TOKENS
    sequence: int = SEQUENCE
    balance: int | None = None

    def _windows(self, checkpoint: Checkpoint, default: str, execution: Execution) -> Windows:
        """Of the text that was given, or of the built-in one, of which chats may be left out."""
        load = partial(
            load_windows,
            self.paths or (sample_file(default),),
            checkpoint.assets,
            checkpoint.config,
            tokens=self.tokens,
            sequence=self.sequence,
        )
        try:
            return load()
        except ChatError as error:
            if self.paths:
                raise
            execution.tell(f"the built-in text is used without its chats: {error}")
            return load(chats=False)

    def evaluation_windows(
        self, checkpoint: Checkpoint, execution: Execution = Execution()
    ) -> Windows:
        """Windows to measure with; where chats of the built-in text are left out a line says so.

        Raises:
            ValidationError: a file cannot be read, a bad line, too little text.
        """
        return self._windows(checkpoint, _EVALUATION, execution)

    def calibration_windows(
        self, checkpoint: Checkpoint, execution: Execution
    ) -> tuple[Windows, Balanced | None]:
        """Windows to calibrate with, and how they were chosen where ``balance`` says so.

        Raises:
            UsageError: ``balance`` is fewer than ``tokens``.
            ValidationError: a file cannot be read, a bad line, too little text.
        """
        if self.balance is None:
            return self._windows(checkpoint, _CALIBRATION, execution), None
        if self.balance < self.tokens:
            raise UsageError(f"--balance {self.balance} is fewer than --tokens {self.tokens}")
        pool = replace(self, tokens=self.balance)._windows(checkpoint, _CALIBRATION, execution)
        found = choose_balanced(checkpoint, pool, self.tokens, execution=execution)
        execution.tell(str(found))
        return found.windows, found
