"""Options that several commands have."""

from __future__ import annotations

from typing import Any, Literal

from jsonargparse import Namespace

from subspan.commands.parsing import Parser
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
        default=None,
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
        default=None,
        help="trackers that get every epoch, separated by commas, or a YAML list: tensorboard, "
        "wandb, trackio, …; those that can keep their files beside the record. (torchrun takes "
        "--log for an option of its own: under it, say --log-with)",
    )


def trackers_given(given: Namespace) -> tuple[str, ...]:
    """Return the names that ``--log`` gives."""
    return () if given.log is None else config.split(given.log, "log")


def add_running(parser: Parser, out: str | None) -> None:
    """Add how runs are spread over processes and machines, ``--log``, and :func:`add_out`."""
    parser.add_argument(
        "--jobs",
        type=int,
        default=-1,
        help="runs at a time; -1: one per core, or one where they take the GPU of this machine; "
        "of a Ray cluster, one per core, or per GPU where it has any",
    )
    parser.add_argument(
        "--backend",
        type=Literal["loky", "ray"],
        default="loky",
        help="loky: processes of this machine; ray: those of a Ray cluster (pip install "
        "'subspan[ray]'). All its machines must see --out, and the data, under the same path. The "
        "same command given on several machines that share --out divides the runs without Ray",
    )
    parser.add_argument(
        "--ray_address",
        type=str | None,
        default=None,
        help="host:port of a cluster's head; null starts Ray on this machine alone",
    )
    add_log(parser)
    add_out(parser, out)


def read_running(given: Namespace) -> dict[str, Any]:
    """Return what :func:`add_running` added, but for ``--out``."""
    names = ("jobs", "overwrite", "backend", "ray_address")
    return {name: given[name] for name in names} | {"log": trackers_given(given)}
