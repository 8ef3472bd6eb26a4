"""``subspan eval``."""

from __future__ import annotations

from typing import get_type_hints

from subspan.commands.console import print_facts
from subspan.commands.parsing import Arguments, Parser, parse
from subspan.training.config import DECODING, Training
from subspan.training.evaluate import evaluate_checkpoint


def main(argv: Arguments) -> None:
    """Evaluate a checkpoint, rebuilt from its file, on the test set."""
    parser = Parser("eval", main.__doc__)
    parser.add_argument("checkpoint", type=str, help="a model.safetensors of subspan train")
    parser.add_argument(
        "--data", type=str | None, default=None, help="the data set; null: that of its training"
    )
    for name in DECODING:
        parser.add_argument(
            f"--{name}",
            type=get_type_hints(Training)[name],
            default=None,
            help="how the data set is read, as of subspan train; null: as in its training",
        )
    given = parse(parser, argv)
    decoding = {name: given[name] for name in DECODING}
    print_facts(evaluate_checkpoint(given.checkpoint, given.data, **decoding))
