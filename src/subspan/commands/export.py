"""``subspan export``."""

from __future__ import annotations

from subspan.commands.parsing import Arguments, make_parser, parse


def main(argv: Arguments) -> None:
    """Write the merged weights of a checkpoint as a plain safetensors file."""
    from subspan.training.export import export as write_weights

    parser = make_parser("export", main.__doc__)
    parser.add_argument("checkpoint", type=str, help="a model.safetensors of subspan train")
    parser.add_argument("out", type=str, help="the file to write")
    given = parse(parser, argv)
    print(f"{given.out}: {write_weights(given.checkpoint, given.out):,} bytes")
