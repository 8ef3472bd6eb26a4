"""``subspan export``."""

from __future__ import annotations

from subspan.commands.parsing import Arguments, Parser, parse
from subspan.training.export import export as write_weights


def main(argv: Arguments) -> None:
    """Write the merged weights of a checkpoint as a plain safetensors file."""
    parser = Parser("export", main.__doc__)
    parser.add_argument("checkpoint", type=str, help="a model.safetensors of subspan train")
    parser.add_argument("out", type=str, help="the file to write")
    parser.add_argument(
        "--net",
        type=str | None,
        default=None,
        help="where the network is now that it was trained from; null: where it was",
    )
    given = parse(parser, argv)
    print(f"{given.out}: {write_weights(given.checkpoint, given.out, net=given.net):,} bytes")
