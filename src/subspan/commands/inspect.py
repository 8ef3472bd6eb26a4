"""``subspan inspect``."""

from __future__ import annotations

from subspan.commands.parsing import Arguments, make_parser, parse


def main(argv: Arguments) -> None:
    """What a checkpoint says of itself."""
    from subspan.checkpoint import inspect as header
    from subspan.commands import console

    parser = make_parser("inspect", main.__doc__)
    parser.add_argument("checkpoint", type=str, help="a file that subspan saved")
    console.facts(header(parse(parser, argv).checkpoint))
