"""``subspan gallery``."""

from __future__ import annotations

from pathlib import Path

from subspan.commands.console import say
from subspan.commands.parsing import Arguments, Parser, parse
from subspan.experiments.gallery import write


def main(argv: Arguments) -> None:
    """Write one page of all experiments in a folder: published and measured, and the pictures.

    The folder holds a folder for each of them, as runs does after some subspan reproduce. A page
    FILE.html has the pictures inside, FILE.md links to them.
    """
    parser = Parser("gallery", main.__doc__)
    parser.add_argument("folder", type=str, help="with the experiments' folders")
    parser.add_argument("file", type=str, help="the page to write: ….html or ….md")
    given = parse(parser, argv)
    say(str(write(Path(given.folder), Path(given.file))))
