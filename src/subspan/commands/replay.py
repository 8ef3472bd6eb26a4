"""``subspan replay``."""

from __future__ import annotations

from subspan.commands.console import say
from subspan.commands.parsing import Arguments, Parser, parse
from subspan.training.replay import replay as rebuild_weights


def main(argv: Arguments) -> None:
    """Rebuild the weights of any step from the journal of a training in random bases.

    ``subspan train --method rbd --journal true`` writes one beside its record.
    """
    parser = Parser("replay", main.__doc__)
    parser.add_argument("journal", type=str, help="the file")
    parser.add_argument("--step", type=int | None, help="how many steps to make; null: all")
    parser.add_argument("--out", type=str, default="weights.safetensors", help="the file to write")
    parser.add_argument(
        "--base",
        type=str | None,
        help="a safetensors file of the initial weights, for a journal of your own training",
    )
    given = parse(parser, argv)
    steps, size = rebuild_weights(given.journal, given.out, step=given.step, base=given.base)
    say(f"{given.out}: the weights after {steps:,} steps, {size:,} bytes")
