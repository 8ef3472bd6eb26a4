"""Printing for all commands: lines, tables, progress bars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segments
from rich.table import Column, Table

from subspan.commands import output

_WIDTH = 10_000  # of a table at most: no terminal must hold it


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on in silence: nobody reads any more, and the work is there for its files."""
        self.quiet = True
        output.end(BrokenPipeError())


console = _Console(highlight=False, markup=False, emoji=False)


def say(text: str, style: str | None = None) -> None:
    """Print lines as they are, however long: what reads them may be no terminal."""
    console.print(text, style=style, soft_wrap=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; a row may end before the last column.

    It is as wide as its cells, whatever the terminal is: numbers that are cut say nothing.
    """
    table = Table(
        *(Column(name, no_wrap=True) for name in columns),
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for row in rows:
        table.add_row(*row)
    whole = console.render(table, console.options.update(max_width=_WIDTH))
    console.print(Segments(whole), soft_wrap=True)


def print_facts(content: Mapping[str, Any]) -> None:
    """Print names and values, nested ones indented."""
    say(_lines(content, ""))


def _lines(content: Mapping[str, Any], indent: str) -> str:
    lines = []
    for name, value in content.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}:", _lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {f'{value:,}' if type(value) is int else value}")
    return "\n".join(lines)


def progress(unit: str) -> Progress:
    """Make a bar that counts units and vanishes at the end; there is none without a terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
