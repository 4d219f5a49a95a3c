"""What every command prints with, and says in its help."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import click

Row = tuple[str, ...]
# Columns of words; others hold numbers.
_TEXT = ("path", "engine", "runtime", "verdict", "tokens", "chats", "first difference")

# Columns of a terminal that is none.
_UNBOUNDED = 1000

checkpoint_argument = click.argument("checkpoint")


@dataclass(frozen=True, slots=True)
class Table:
    """A result to print.

    Attributes:
        title: printed above it.
        columns: their heads.
        rows: as many cells as there are columns.
        turns: rows may become columns where the terminal is too narrow for it.
    """

    title: str
    columns: Row
    rows: tuple[Row, ...]
    turns: bool = False

    def turned(self) -> "Table":
        """The same table with its rows as columns."""
        first, *others = zip(self.columns, *self.rows, strict=True)
        return Table(self.title, first, tuple(others))


def make_table(title: str, columns: Row, rows: Iterable[Row]) -> Table:
    """A table of any rows."""
    return Table(title, columns, tuple(rows))


def example(command: str) -> str:
    """The end of a command's help: a line to paste."""
    return f"\b\nExample:\n    {command}"


def print_tables(*tables: Table, width: int | None = None) -> None:
    """Print tables as wide as the terminal; elsewhere as wide as they are, so that no path is cut.

    Args:
        tables: in this order.
        width: columns, in place of the terminal's.
    """
    from rich.console import Console  # not for --help and --json

    console = Console(width=width)
    if width is None and not console.is_terminal:
        console = Console(width=_UNBOUNDED)
    for table in tables:
        drawn = _drawn(table)
        wide = console.measure(drawn, options=console.options.update(width=_UNBOUNDED)).maximum
        console.print(_drawn(table.turned()) if table.turns and wide > console.width else drawn)


def _drawn(table: Table) -> Any:
    from rich.markup import escape
    from rich.table import Table as Drawn

    drawn = Drawn(title=table.title, title_justify="left")
    for i, column in enumerate(table.columns):
        text = i == 0 or column in _TEXT
        drawn.add_column(column, justify="left" if text else "right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(escape, row))
    return drawn


def print_json(document: Any) -> None:
    """One object on stdout."""
    click.echo(json.dumps(document, ensure_ascii=False))
