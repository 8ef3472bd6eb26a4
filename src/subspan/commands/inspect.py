"""``subspan inspect``."""

from __future__ import annotations

from subspan.checkpoint import inspect as read_header
from subspan.commands.console import print_facts
from subspan.commands.parsing import Arguments, Parser, parse


def main(argv: Arguments) -> None:
    """Show what a checkpoint says of itself."""
    parser = Parser("inspect", main.__doc__)
    parser.add_argument("checkpoint", type=str, help="a file that subspan saved")
    print_facts(read_header(parse(parser, argv).checkpoint))
