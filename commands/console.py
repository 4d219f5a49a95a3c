"""What every command prints with, and says in its help."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import click

Row = tuple[str, ...]
# Columns of words; others hold numbers.
_TEXT = ("path", "engine", "runtime", "verdict", "tokens", "chats", "first difference")

checkpoint_argument = click.argument("checkpoint")


@dataclass(frozen=True, slots=True)
class Table:
    """A result to print."""

    title: str
    columns: Row
    rows: tuple[Row, ...]


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
        console = Console(width=1000)
    console.print(*map(_drawn, tables))


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
