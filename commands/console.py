"""What every command prints with, and says in its help."""

import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table

checkpoint_argument = click.argument("checkpoint")


def example(command: str) -> str:
    """The end of a command's help: a line to paste."""
    return f"\b\nExample:\n    {command}"


def print_tables(*tables: Table) -> None:
    """To the terminal's width; elsewhere as wide as they are, so that no path is cut."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)
    console.print(*tables)


def print_json(document: Any) -> None:
    """One object on stdout."""
    click.echo(json.dumps(document, ensure_ascii=False))
