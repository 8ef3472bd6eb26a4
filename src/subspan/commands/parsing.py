"""The parsers of all commands share this: options of methods, YAML files, refusals."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from subspan.errors import SubspanError, unknown

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from subspan.sweeps.result import SweepRecord

Arguments = Sequence[str]


def make_parser(command: str, description: str | None, epilog: str = "") -> ArgumentParser:
    """Make the parser of a command, with the options that every command has."""
    from argparse import SUPPRESS, RawDescriptionHelpFormatter

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
        """The usual help, with the epilog's lines as they are."""

    parser = ArgumentParser(
        prog=f"subspan {command}",
        description=description,
        epilog=epilog,
        formatter_class=Formatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file of these options")
    parser.add_argument(
        "--import",
        dest="imports",
        default=SUPPRESS,
        type=str | None,
        metavar="MODULE",
        help="import a module of yours first, which adds projections, methods, kinds of atoms, "
        "types of layers or experiments; may be given several times",
    )
    return parser


def parse(parser: ArgumentParser, argv: Arguments) -> Namespace:
    """Parse; every option is known by its name with dashes, too."""
    from argparse import ArgumentError

    from subspan.training.options_file import check_file, check_value

    for action in parser._actions:
        if "--print_config" in action.option_strings:  # jsonargparse looks for this very word
            continue
        dashed = [name.replace("_", "-") for name in action.option_strings if "_" in name]
        action.option_strings = [*dashed, *action.option_strings]
        parser._option_string_actions.update(dict.fromkeys(dashed, action))
    known = set(parser.get_defaults().keys()) - {"config", "imports"}
    for option, word in zip(["", *argv], argv, strict=False):
        name, _, value = word.partition("=") if word.startswith("--") else (option, "", word)
        if name == "--config" and value:
            check_file(value, known, parser.prog)
        else:
            check_value(name, value)
    try:
        return parser.parse_args(argv)
    except ArgumentError as error:
        raise _refusal(str(error), parser) from error


def _refusal(message: str, parser: ArgumentParser) -> SubspanError:
    """The parser's message, of many lines and types of Python, as a sentence."""
    if found := re.fullmatch(r"unrecognized arguments: ([^\s=]+).*", message):
        flags = [name for name in parser._option_string_actions if re.fullmatch(r"--[a-z-]+", name)]
        return unknown(f"argument of {parser.prog}", found[1], flags)
    key = re.match(r'Parser key "(\w+)":\s*', message)
    value = re.search(r".*(?:Given|Got) value: (.*)\Z", message, re.DOTALL)
    if key and value:
        names = {"float": "a number", "int": "an integer", "NoneType": "null", "str": "a text"}
        types = re.findall(r"Expected an? (?:<class '|typing\.)?(\w+(?:\[.*\])?)", message)
        kinds = " or ".join(names.get(kind, kind.replace("Literal", "one of ")) for kind in types)
        message = f"{key[1]} must be {kinds}, got {value[1]}"
    elif key:
        message = f"--{key[1]}: {message[key.end() :]}"
    return SubspanError(f"{' '.join(message.split())}; see {parser.prog} --help")


def list_methods() -> str:
    """List all methods, a line each, for the end of a help text."""
    from subspan.training.methods import methods

    lines = [f"  {name:16} {how.help}" for name, how in sorted(methods().items())]
    return "\n".join(["methods:", *lines])


def add_options(parser: ArgumentParser, without: Sequence[str] = ()) -> None:
    """The options of all methods; each run is told only those that were given."""
    from subspan.training.methods import methods

    owners: dict[str, dict[str, list[str]]] = {}  # by name and by what it means to them
    options = {}
    for how in methods().values():
        for option in how.options:
            if option.name not in without:
                owners.setdefault(option.name, {}).setdefault(option.help, []).append(how.name)
                options[option.name] = option
    group = parser.add_argument_group("options of methods")
    for name, option in options.items():
        meanings = [
            text + (f" ({', '.join(some)})" if len(some) < 4 else "")
            for text, some in sorted(owners[name].items(), key=lambda item: -len(item[1]))
        ]
        group.add_argument(
            f"--{name}", type=option.type | None, default=None, help="; ".join(meanings)
        )


def options_given(given: Namespace) -> dict[str, Any]:
    """The methods' options that were given."""
    from subspan.training.methods import methods

    names = {option.name for how in methods().values() for option in how.options}
    return {n: given[n] for n in sorted(names) if given.get(n) is not None}


def instance(cls: type, given: Namespace) -> Any:
    """Make a dataclass of the arguments that have the names of its fields."""
    from dataclasses import fields

    return cls(**{field.name: given[field.name] for field in fields(cls)})


def show_sweep(result: SweepRecord, files: Sequence[Path]) -> None:
    """Show a sweep; one without a good run has failed."""
    from subspan.commands import console

    console.swept(result, files)
    if not result.points:
        raise SubspanError(f"all runs failed, {len(result.failed)} of them: see above")


def add_out(
    parser: ArgumentParser,
    default: str | None,
    *,
    overwrite: str = "replace what another configuration left there",
) -> None:
    """Add ``--out`` and ``--overwrite``."""
    kind = str if default else str | None
    parser.add_argument("--out", type=kind, default=default, help="the folder for what is written")
    parser.add_argument("--overwrite", action="store_true", help=overwrite)


def add_log(parser: ArgumentParser) -> None:
    """Add ``--log``."""
    parser.add_argument(
        "--log",
        "--log_with",
        type=list[str] | str | None,
        default=None,
        help="trackers that are told every epoch, separated by commas, or a YAML list: "
        "tensorboard, wandb, trackio, …; those that can keep their files beside the record. "
        "(torchrun takes --log for an option of its own: under it, say --log-with)",
    )


def trackers_given(given: Namespace) -> tuple[str, ...]:
    """Return the names that ``--log`` gives."""
    from subspan.training.config import split

    return () if given.log is None else split(given.log, "log")


def add_jobs(parser: ArgumentParser) -> None:
    """Add how runs are spread over processes and machines."""
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
