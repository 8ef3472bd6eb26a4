"""``subspan pareto``."""

from __future__ import annotations

from pathlib import Path

from subspan import report
from subspan.commands.console import say
from subspan.commands.parsing import LISTED, Arguments, Parser, parse
from subspan.training.config import split


def main(argv: Arguments) -> None:
    """Draw test accuracy against stored numbers and against bytes, with the best of others.

    Every complete sweep and run on a set of images counts, by any method, that lies anywhere in
    the folders. Writes pareto.png, pareto.svg, and pareto.md, the table of all points with the
    folder of each record.
    """
    parser = Parser("pareto", main.__doc__)
    parser.add_argument("folders", nargs="+", type=str, help="with records of sweeps and runs")
    parser.add_argument(
        "--data",
        type=LISTED,
        default="mnist,cifar10",
        help="the sets of images, a row of the picture for each",
    )
    parser.add_argument("--out", type=str, default="runs/pareto", help="the folder to write into")
    given = parse(parser, argv)
    data = split(given.data, "data")
    for path in report.write_pareto([Path(name) for name in given.folders], data, Path(given.out)):
        say(str(path))
