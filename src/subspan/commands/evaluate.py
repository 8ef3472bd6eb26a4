"""``subspan eval``."""

from __future__ import annotations

from subspan.commands.console import print_facts
from subspan.commands.parsing import Arguments, Parser, parse
from subspan.commands.task_options import add_task_options, read_task_options
from subspan.training.evaluate import evaluate_checkpoint


def main(argv: Arguments) -> None:
    """Evaluate a checkpoint, rebuilt from its file, on the test set."""
    parser = Parser("eval", main.__doc__)
    parser.add_argument(
        "checkpoint", type=str, help="a model.safetensors or model.subspan of train"
    )
    parser.add_argument(
        "--data", type=str | None, default=None, help="the data set; null: that of its training"
    )
    parser.add_argument(
        "--net",
        type=str | None,
        default=None,
        help="where the network is now that it was trained from; null: where it was",
    )
    add_task_options(
        parser, None, note="how the data are read, as of subspan train; null: as in its training"
    )
    given = parse(parser, argv)
    print_facts(
        evaluate_checkpoint(given.checkpoint, given.data, net=given.net, **read_task_options(given))
    )
