"""``subspan report``."""

from __future__ import annotations

from pathlib import Path

from subspan.commands.console import say
from subspan.commands.parsing import Arguments, Parser, parse
from subspan.report import write


def main(argv: Arguments) -> None:
    """Draw the pictures and the page of a folder that train or sweep wrote."""
    parser = Parser("report", main.__doc__)
    parser.add_argument("folder", type=str, help="with a sweep.json or a record.json")
    for path in write(Path(parse(parser, argv).folder)):
        say(str(path))
