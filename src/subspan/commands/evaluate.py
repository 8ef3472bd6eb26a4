"""``subspan eval``."""

from __future__ import annotations

from subspan.commands.parsing import Arguments, make_parser, parse


def main(argv: Arguments) -> None:
    """Test score of a checkpoint, rebuilt from its file."""
    from subspan.commands import console
    from subspan.training.config import DECODING
    from subspan.training.evaluate import evaluate_checkpoint

    parser = make_parser("eval", main.__doc__)
    parser.add_argument("checkpoint", type=str, help="a model.safetensors of subspan train")
    parser.add_argument(
        "--data", type=str | None, default=None, help="the data set; null: that of its training"
    )
    for name in DECODING:
        parser.add_argument(
            f"--{name}",
            type=int | str | None if name == "resize" else str | None,
            default=None,
            help="of the data set; null: as in its training",
        )
    given = parse(parser, argv)
    decoding = {name: given[name] for name in DECODING}
    console.facts(evaluate_checkpoint(given.checkpoint, given.data, **decoding))
