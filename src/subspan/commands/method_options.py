"""Options of methods on the command line: which there are, and which the help shows."""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import Namespace

from subspan.commands.parsing import Arguments, Parser, load_file, load_text, take
from subspan.commands.words import given_values
from subspan.training import config
from subspan.training.methods import Method, method, methods


def options_in(argv: Arguments) -> dict[str, Any]:
    """Find the options that are given, by their names with underscores, before they are parsed.

    Values are texts, or, lists and what stands in a file, as YAML has them; the last of each.
    """
    options: dict[str, Any] = {}
    for flag, value in given_values(argv):
        if flag == "--config":
            options |= {str(key).replace("-", "_"): v for key, v in load_file(value).items()}
        elif flag.startswith("--"):
            name = flag[2:].removesuffix("+").replace("-", "_")
            options[name] = load_text(value) if value[:1] == "[" else value
    return options


def add_method_options(
    parser: Parser, argv: Arguments, flags: Mapping[str, str], without: Sequence[str] = ()
) -> None:
    """Add the options of all methods; only those of the methods that are used show up.

    The flags are the options that name methods, and what they name by default. The help shows no
    options of methods where none is named. Files of an earlier version name the options of all
    methods, as null. An unknown method, and an option of another method, are refused.
    """
    given = options_in(argv)
    helps = bool({"-h", "--help"} & set(argv))
    named: list[str] = []
    for flag, default in flags.items():
        value = given.get(flag, None if helps else default)
        named += [] if value in (None, "null") else config.split(value, flag)
    used = [method(name) for name in dict.fromkeys(named)]
    owners: dict[str, list[Method]] = {}
    for each in [*used, *(each for each in methods().values() if each not in used)]:
        for option in each.options:
            if option.name not in without:
                owners.setdefault(option.name, []).append(each)
    for name, some in owners.items():
        # Of several methods the first that is used decides what values an option may have.
        option = next(option for option in some[0].options if option.name == name)
        ours = [each for each in some if each in used]
        theirs = used and not ours and name not in parser.kinds
        if theirs and given.get(name) not in (None, "null"):
            used[0].check([name])
        parser.add_option(option, _explain(name, ours, len(used)) or SUPPRESS)


def _explain(name: str, owners: Sequence[Method], of: int) -> str:
    """Say what an option means, and to which methods if not to all that are shown."""
    meanings: dict[str, list[str]] = {}
    for each in owners:
        text = next(option.help for option in each.options if option.name == name)
        meanings.setdefault(text, []).append(each.name)
    return "; ".join(
        text + (f" ({', '.join(some)})" if len(some) < of else "")
        for text, some in meanings.items()
    )


def read_method_options(given: Namespace) -> dict[str, Any]:
    """Return the methods' options that were given."""
    names = {option.name for each in methods().values() for option in each.options}
    return take(given, sorted(names))


def list_methods(command: str, flag: str) -> str:
    """List all methods, a line each, for the end of a help text."""
    lines = [f"  {name:16} {each.help}" for name, each in sorted(methods().items())]
    options = f"Options of a method: subspan {command} --{flag} hash --help"
    return "\n".join(["methods:", *lines, "", options])
