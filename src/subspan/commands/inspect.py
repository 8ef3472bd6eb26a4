"""``subspan inspect``."""

from __future__ import annotations

from subspan.checkpoint import inspect as read_header
from subspan.commands.console import print_facts
from subspan.commands.parsing import Arguments, Parser, parse
from subspan.hub import locate


def main(argv: Arguments) -> None:
    """Show what a checkpoint says of itself."""
    parser = Parser("inspect", main.__doc__)
    parser.add_argument(
        "checkpoint", type=str, help="a file that subspan saved, or USER/NAME on the Hub"
    )
    print_facts(read_header(locate(parse(parser, argv).checkpoint)))
