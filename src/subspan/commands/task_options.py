"""Options of tasks on the command line: which there are, and which the help shows."""

from __future__ import annotations

from argparse import SUPPRESS
from typing import Any

from jsonargparse import Namespace

from subspan.commands.method_options import options_in
from subspan.commands.parsing import Arguments, Parser, read_fields, take
from subspan.commands.recipe import add_recipe
from subspan.training.config import Training
from subspan.training.tasks import kind, kinds, option_names


def add_training(parser: Parser, argv: Arguments) -> None:
    """Add recipes, and the options of a training and of tasks; the help shows the named one's."""
    add_recipe(parser)
    parser.add_fields(Training, without=("task_options",))
    name = options_in(argv).get("task")
    add_task_options(parser, None if name in (None, "null") else str(name))


def add_task_options(parser: Parser, task: str | None, *, note: str = "") -> None:
    """Add the options of all tasks; the help shows those of one.

    A note is what the help says of each, in place of its own words, where a trained network is
    read: options of training alone are left out then.
    """
    used, others = kind(task), set(parser.kinds)
    for each in [used, *(other for other in kinds().values() if other is not used)]:
        for option in each.options:
            shared = option.name in parser.kinds and option.name not in others  # between tasks
            if not shared and (option.lasting or not note):
                parser.add_option(option, note or (option.help if each is used else SUPPRESS))


def read_task_options(given: Namespace) -> dict[str, Any]:
    """Return the tasks' options that were given, in the order in which tasks name them."""
    return take(given, option_names())


def read_training(given: Namespace) -> Training:
    """Return the training that was asked for; refuse an option of another task."""
    training: Training = read_fields(Training, given, task_options=read_task_options(given))
    kind(training.task).check(training.task_options)
    return training


def list_tasks(command: str) -> str:
    """List all tasks, a line each, for the end of a help text."""
    lines = [f"  {name:16} {each.help}" for name, each in sorted(kinds().items())]
    return "\n".join(
        ["tasks:", *lines, "", f"Options of a task: subspan {command} --task text --help"]
    )
