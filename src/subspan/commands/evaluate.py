"""``subspan eval``."""

from __future__ import annotations

from subspan.commands.console import print_facts
from subspan.commands.parsing import Arguments, Parser, parse
from subspan.commands.shared_options import add_checkpoint, add_net
from subspan.commands.task_options import add_task_options, read_task_options
from subspan.training.evaluate import evaluate_checkpoint


def main(argv: Arguments) -> None:
    """Evaluate a checkpoint, rebuilt from its file, on the test set."""
    parser = Parser("eval", main.__doc__)
    add_checkpoint(parser)
    parser.add_argument("--data", type=str | None, help="the data set; null: that of its training")
    add_net(parser)
    add_task_options(
        parser, None, note="how the data are read, as of subspan train; null: as in its training"
    )
    given = parse(parser, argv)
    print_facts(
        evaluate_checkpoint(given.checkpoint, given.data, net=given.net, **read_task_options(given))
    )
