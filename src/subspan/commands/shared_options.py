"""Options that several commands have."""

from __future__ import annotations

from jsonargparse import Namespace

from subspan.commands import console
from subspan.commands.parsing import Parser, read_fields
from subspan.sweeps.running import Running
from subspan.training import config


def add_checkpoint(parser: Parser) -> None:
    """Add the argument ``checkpoint``."""
    parser.add_argument(
        "checkpoint", type=str, help="a model.safetensors or model.subspan of train"
    )


def add_net(parser: Parser) -> None:
    """Add ``--net``, as of commands that read a checkpoint."""
    parser.add_argument(
        "--net",
        type=str | None,
        help="where the network is now that it was trained from; null: where it was",
    )


def add_out(
    parser: Parser,
    default: str | None,
    *,
    overwrite: str = "replace what another configuration left there",
) -> None:
    """Add ``--out`` and ``--overwrite``."""
    kind = str if default else str | None
    parser.add_argument("--out", type=kind, default=default, help="the folder for what is written")
    parser.add_argument("--overwrite", action="store_true", help=overwrite)


def add_log(parser: Parser) -> None:
    """Add ``--log``."""
    parser.add_argument(
        "--log",
        "--log_with",
        type=list[str] | str | None,
        help="trackers that get every epoch, separated by commas, or a YAML list: tensorboard, "
        "wandb, trackio, …; those that can keep their files beside the record. (torchrun takes "
        "--log for an option of its own: under it, say --log-with)",
    )


def trackers_given(given: Namespace) -> tuple[str, ...]:
    """Return the names that ``--log`` gives."""
    return () if given.log is None else config.split(given.log, "log")


def add_running(parser: Parser, out: str | None) -> None:
    """Add how runs are spread over processes and machines, ``--log``, and :func:`add_out`."""
    parser.add_fields(Running, without=("overwrite", "log", "on_run", "say"))
    add_log(parser)
    add_out(parser, out)


def read_running(given: Namespace) -> Running:
    """Return what :func:`add_running` added, but for ``--out``; the terminal shows what happens."""
    running: Running = read_fields(Running, given, log=trackers_given(given), say=console.say)
    return running
