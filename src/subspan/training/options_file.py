"""YAML that a person writes: what its scalars are, and in a sentence what is wrong with it.

Scalars are those of YAML 1.2, so that ``no`` is a text and ``1e-4`` a number; of ``010`` and
``12:30`` nobody makes 8 and 750.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar

import yaml

from subspan.errors import SubspanError, unknown

_REMEDY = "write options into it, one a line, as in lr: 0.1"


class Loader(yaml.SafeLoader):
    """Scalars as in YAML 1.2, and merge keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}


for _tag, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", "[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", "<<", "<"),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"({_pattern})$"), _first)


def check_file(name: str, known: Collection[str], command: str) -> None:
    """Refuse a YAML file that is no mapping of options, each given once; name the line.

    The name may be YAML itself, which has a colon. The known options are those of the command, and
    may be written with dashes for underscores.
    """
    if not name:
        raise SubspanError("--config is empty: give a YAML file")
    path = Path(name)
    if path.is_dir():
        raise SubspanError(f"--config {name} is a folder: give a YAML file")
    inline = not path.is_file()
    if inline and ":" not in name:
        raise SubspanError(f"--config: File does not exist: {name!r}; give a YAML file")
    text = name if inline else read_text(path, f"--config {name}")
    node = compose(text, f"--config {name}")
    if node is None:
        raise SubspanError(f"--config {name} is empty: {_REMEDY}, or leave it out")
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a text"
        raise SubspanError(f"--config {name} must have names and values, got {kind}: {_REMEDY}")
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value.replace("-", "_") not in known:
            what = key.value if isinstance(key, yaml.ScalarNode) else f"in line {line_of(key)}"
            raise unknown(f"key in the file of --config for {command}", what, known)
    if all(isinstance(value, yaml.ScalarNode) and not value.value for _, value in node.value):
        raise SubspanError(f"--config {name} has no value for any of its keys: {_REMEDY}")
    refuse_repeated_keys(node, f"--config {name}", dashes=True)


def check_value(option: str, text: str) -> None:
    """Refuse a value of an option that is YAML with a key that is given twice."""
    try:
        node = yaml.compose(text, Loader)
    except yaml.YAMLError:
        return  # no YAML: whoever needs it as such will say so
    if node is not None:
        refuse_repeated_keys(node, option)


def read_text(path: Path, name: str) -> str:
    """Read a file, called ``name`` in errors; refuse what is not UTF-8, with the line."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].count(b"\n")
        raise SubspanError(f"{name} is not UTF-8 in line {line}: save it as UTF-8") from None


def compose(text: str, name: str) -> yaml.Node | None:
    """Parse YAML, called ``name`` in errors, to a tree with lines; None if it is empty."""
    try:
        return yaml.compose(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark, str(error.problem)
        if problem.startswith("but "):
            problem = f"{error.context} {problem}"
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        remedy = "use spaces for tabs" if r"'\t'" in problem else "mend it there"
        raise SubspanError(f"{name} is no YAML ({where}{problem}): {remedy}") from None
    except yaml.YAMLError as error:
        raise SubspanError(f"{name} is no YAML ({' '.join(str(error).split())}): mend it") from None


def line_of(node: yaml.Node) -> int:
    """Return the line that a node begins in, from 1."""
    return int(node.start_mark.line) + 1


def refuse_repeated_keys(
    node: yaml.Node, name: str, *, dashes: bool = False, inside: tuple[yaml.Node, ...] = ()
) -> None:
    """Refuse a key that is given twice in one mapping, wherever it is: the last would win."""
    if any(node is other for other in inside):
        raise SubspanError(f"{name} has in line {line_of(node)} what contains itself: write it out")
    inside = (*inside, node)
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            refuse_repeated_keys(item, name, inside=inside)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                word = key.value.replace("-", "_") if dashes else key.value
                if word in lines:
                    both = sorted({lines[word], line_of(key)})
                    where = f"line{'s' if len(both) > 1 else ''} {' and '.join(map(str, both))}"
                    raise SubspanError(
                        f"{name} has the key {key.value!r} twice, in {where}: leave one out"
                    )
                lines[word] = line_of(key)
            refuse_repeated_keys(value, name, inside=inside)
