"""The parser of a command: options from dataclasses and methods, YAML files, refusals.

An option is a field of a dataclass, an option of a method, or one of the few that only a command
has. Its help is what the dataclass's docstring says of the field.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import os
import types
from argparse import SUPPRESS, Action, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, Namespace, set_loader

from subspan.commands import output
from subspan.commands.words import given_values
from subspan.errors import SubspanError, unknown
from subspan.training import config
from subspan.training.config import Option
from subspan.training.options_file import Loader, check_file, check_value
from subspan.training.schema import alternatives

Arguments = Sequence[str]
# A list as people type it, 10,30,100, or as YAML has it, or one value.
LISTED = list[str | int | float] | str | int | float | None

_YAML = "yaml-1.2"  # how jsonargparse is to read files; by itself it makes 8 of 010
set_loader(_YAML, functools.partial(yaml.load, Loader=Loader), (yaml.YAMLError,))


class Parser(ArgumentParser):
    """A parser that knows its options by their names with dashes, and what their values may be."""

    def __init__(self, command: str, description: str | None, epilog: str = "") -> None:
        self.actions: list[Action] = []
        self.kinds: dict[str, Any] = {}  # type hints by the name of an argument
        super().__init__(
            prog=f"subspan {command}",
            description=description,
            epilog=epilog,
            formatter_class=RawDescriptionHelpFormatter,
            exit_on_error=False,
            allow_abbrev=False,
            parser_mode=_YAML,
        )
        self.add_argument("--config", action="config", help="a YAML file of these options")
        self.add_argument(
            "--import",
            dest="imports",
            default=SUPPRESS,
            metavar="MODULE",
            help="first import a module of yours, which adds projections, methods, kinds of atoms, "
            "parts of the benchmark or experiments; may be given several times",
        )

    def add_argument(self, *names: str, **settings: Any) -> Action:
        """Add an argument; its name has dashes for underscores."""
        default, text = settings.get("default"), settings.get("help")
        if text not in (None, SUPPRESS):
            known = default not in (None, SUPPRESS)
            said = f"{text} (default: {default})" if known else str(text)
            settings["help"] = said.replace("%", "%%")  # it is a format to argparse
        for name in map(dashed, names):
            if name in self.flags():
                raise SubspanError(
                    f"{self.prog} has {name} already: call the option of yours otherwise, of a "
                    "method or a task that you import"
                )
        action: Action = super().add_argument(*map(dashed, names), **settings)
        self.actions.append(action)
        self.kinds[action.dest] = settings.get("type")
        return action

    def add_fields(self, cls: type, *, without: Iterable[str] = (), **defaults: Any) -> None:
        """Add the fields of a dataclass as options, each with what the docstring says of it.

        A default of None, in place of that of the dataclass, stands for what the command chooses.
        """
        hints = get_type_hints(cls)
        said = {p.arg_name: p.description for p in docstring_parser.parse(cls.__doc__ or "").params}
        for field in fields(cls):
            if field.name in without:
                continue
            default = defaults.get(field.name, None if field.default is MISSING else field.default)
            kind = typed(hints[field.name])
            if isinstance(default, tuple):
                default = ",".join(map(str, default)) or None
            kind = kind if default is not None else kind | None
            text = " ".join((said[field.name] or "").split())
            self.add_argument(f"--{field.name}", type=kind, default=default, help=text.rstrip("."))

    def add_option(self, option: Option, text: str | None = None) -> None:
        """Add an option of a method or of a task, with other words for its help perhaps."""
        kind, text = option.type | None, option.help if text is None else text
        self.add_argument(f"--{option.name}", type=kind, default=None, help=text)

    def print_help(self, file: Any = None) -> None:
        """Print the help, though nobody may read it to its end."""
        if file is not None:
            super().print_help(file)
        else:
            output.write(self.format_help().rstrip())

    def flags(self) -> dict[str, Action]:
        """Return the options by their names with dashes."""
        return {
            name: action
            for action in self.actions
            for name in action.option_strings
            if name.startswith("--") and not name.endswith("+")
        }


def dashed(word: str) -> str:
    """Write an option's name with dashes, but for jsonargparse's own, which it looks for."""
    name, equals, value = word.partition("=")
    known = not name.startswith("--") or name.startswith("--print_")
    return word if known else f"{name.replace('_', '-')}{equals}{value}"


def typed(hint: Any) -> Any:
    """Return the type that values of a field have where they are given: lists may be texts."""
    if get_origin(hint) is tuple:
        return LISTED
    if get_origin(hint) is Mapping:
        return dict[str, Any]
    if hint is int:
        return int | float  # 1e6 is whole; read_fields refuses what is not
    if len(kinds := alternatives(hint)) > 1:
        # A mapping first: it could be taken for a text.
        some = sorted(map(typed, kinds), key=lambda kind: get_origin(kind) is not dict)
        return functools.reduce(operator.or_, some)
    return hint


def read_fields(cls: type, given: Namespace, **others: Any) -> Any:
    """Make a dataclass of the arguments that have the names of its fields, and of others."""
    hints = get_type_hints(cls)
    values = {
        field.name: read(field.name, hints[field.name], given[field.name])
        for field in fields(cls)
        if field.name not in others and field.name in given
    }
    return cls(**others, **values)


def read(name: str, hint: Any, value: Any) -> Any:
    """Convert a value to what a field has: a list to a tuple, 1e6 to an integer."""
    kinds = alternatives(hint)
    inner = {get_origin(kind): get_args(kind) for kind in kinds}
    if isinstance(value, Mapping) and Mapping in inner:
        of = inner[Mapping][1]
        return {key: read(f"{name} of {key}", of, one) for key, one in value.items()}
    if tuple in inner and not isinstance(value, Mapping):
        of = inner[tuple][0]
        if value is None:
            return ()
        if of is str:
            return config.split(value, name)
        return tuple(_whole(name, n) if of is int else n for n in config.floats(value, name))
    return _whole(name, value) if int in kinds and isinstance(value, float) else value


def _whole(name: str, value: float) -> int:
    if not float(value).is_integer():
        raise SubspanError(f"{name} must be an integer, got {value}")
    return int(value)


def take(given: Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return the arguments of these names that were given."""
    return {name: given[name] for name in names if given.get(name) is not None}


# ---- parsing -------------------------------------------------------------------------------------


def parse(parser: Parser, argv: Arguments, *, defaults: bool = True) -> Namespace:
    """Parse what was typed after the command's name; refuse what does not exist, or a wrong value.

    Without defaults, what was not given is left out.
    """
    words = [dashed(word) for word in argv]
    known = set(parser.kinds) - {"config", "imports", "help", "print_config"}
    for name, value in given_values(words):
        if name == "--config":
            check_file(value, known, parser.prog)
        else:
            check_value(name, value)
    _check_names(parser, words)
    try:
        given = parser.parse_args(words, defaults=defaults)
    except ArgumentError as error:
        sentence = _find_wrong_value(parser, words) or " ".join(str(error).split())
        raise SubspanError(f"{sentence}; see {parser.prog} --help") from error
    if wrong := _find_what_is_taken_unseen(parser, given):
        raise SubspanError(wrong)
    for name, text in {name: text for name, _, text in _values(parser, words)}.items():
        value = given.get(name)  # jsonargparse makes 90 of the text 1:30
        if type(value) in (int, float) and _number(text) != value:
            raise SubspanError(f"{name} must be written as a plain number, got {text}")
    for name, value in given.items():
        if value == "":  # of a variable of the shell that is not set
            raise SubspanError(f"{name} is empty: give a value, or leave it out")
    if (out := given.get("out")) is not None:  # shells leave the ~ of --out=~/runs, as a file does
        given["out"] = os.path.expanduser(out)
    return given


def _check_names(parser: Parser, words: Sequence[str]) -> None:
    """Refuse an option that the command does not have, and a word too many."""
    flags = parser.flags()
    places = [action.nargs for action in parser.actions if not action.option_strings]
    room = math.inf if "+" in places else len(places)
    value_of = None  # the option whose value comes next
    for word in words:
        name = word.partition("=")[0].removesuffix("+")
        if name.startswith("--") and name != "--print_config":
            if name not in flags:
                raise unknown(f"argument of {parser.prog}", name, flags)
            value_of = None if "=" in word or flags[name].nargs == 0 else name
        elif value_of is not None or word == "-h" or name == "--print_config":
            value_of = None
        else:
            room -= 1
            if room < 0:
                raise unknown(f"argument of {parser.prog}", word, flags)


def _values(parser: Parser, words: Sequence[str]) -> list[tuple[str, list[str], str]]:
    """Return the options that are given: name, words that give it to ``--value``, and its text."""
    given: list[tuple[str, list[str], str]] = []
    flags = parser.flags()
    for name, value in given_values(words):
        action = flags.get(name)
        if action is None or action.nargs == 0:
            continue
        if name == "--config":
            given += [
                (key.replace("-", "_"), ["--config", yaml.safe_dump({"value": one})], str(one))
                for key, one in load_file(value).items()
            ]
        else:
            given.append((action.dest, [f"--value={value}"], value))
    return given


def _find_wrong_value(parser: Parser, words: Sequence[str]) -> str | None:
    """Find the first option that has not a value of its type, and say what it must be.

    jsonargparse says so in many lines of Python's types, so each value is tried alone.
    """
    for name, argv, text in _values(parser, words):
        alone = ArgumentParser(exit_on_error=False, parser_mode=_YAML)
        alone.add_argument("--config", action="config")
        alone.add_argument("--value", type=parser.kinds.get(name) or str)
        try:
            alone.parse_args(argv)
        except ArgumentError:
            return _say_wrong(name, parser.kinds.get(name), text)
    return None


def _find_what_is_taken_unseen(parser: Parser, given: Namespace) -> str | None:
    """Find what a file says and jsonargparse does not look at: values of flags, and null."""
    for action in parser.actions:
        name, value = action.dest, given.get(action.dest)
        kind = bool if action.nargs == 0 else parser.kinds[name]
        takes_null = kind is None or action.default is None or types.NoneType in get_args(kind)
        wrong = type(value) is not bool if kind is bool else value is None and not takes_null
        if wrong and name in given:
            return _say_wrong(name, kind, "null" if value is None else str(value))
    return None


def _say_wrong(name: str, kind: Any, text: str) -> str:
    return f"{name} must be {' or '.join(dict.fromkeys(_describe(kind)))}, got {text}"


def _number(text: str) -> float | None:
    """Return the number that people mean by a text, if it is one."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return None


def load_file(name: str) -> Mapping[str, Any]:
    """Load what ``--config`` names; nothing if that is not possible: check_file says why."""
    try:
        text = Path(name).read_text(encoding="utf-8") if Path(name).is_file() else name
    except (OSError, UnicodeDecodeError):
        return {}
    content = load_text(text)
    return content if isinstance(content, Mapping) else {}


def load_text(text: str) -> Any:
    """Return what a text is in YAML, or the text itself if it is none."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError:
        return text


def _describe(kind: Any) -> list[str]:
    """Name the values that a type has."""
    if len(some := alternatives(kind)) > 1:
        if int in some and float in some and str not in some:
            some = tuple(one for one in some if one is not float)
        return [word for one in some for word in _describe(one)]
    if get_origin(kind) is Literal:
        return [f"one of {list(get_args(kind))}"]
    names: dict[Any, str] = {
        float: "a number",
        int: "an integer",
        types.NoneType: "null",
        str: "a text",
        bool: "true or false",
        list: "a list",
        dict: "a mapping",
    }
    return [names.get(get_origin(kind) or kind, str(kind))]
