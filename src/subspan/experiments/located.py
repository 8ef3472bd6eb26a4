"""A YAML file that a person writes: mappings that know their lines, and dataclasses made of them.

Every error names the file and the line.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from subspan.errors import SubspanError, unknown
from subspan.training.options_file import (
    Loader,
    compose,
    line_of,
    read_text,
    refuse_repeated_keys,
)
from subspan.training.schema import MisfitError, alternatives, from_json

T = TypeVar("T")


class Located(dict[str, Any]):
    """A mapping of a YAML file, which is named as in errors, and the line that it begins in."""

    def __init__(self, file: str, line: int) -> None:
        super().__init__()
        self.file, self.line = file, line
        self.lines: dict[str, int] = {}  # of each key

    def place(self, key: str | None = None) -> str:
        """Return the file and the line of a key, or of the mapping."""
        return f"{self.file}, line {self.line if key is None else self.lines[key]}"

    def error(self, message: object, key: str | None = None) -> SubspanError:
        """Return an error that names the place first."""
        return SubspanError(f"{self.place(key)}: {message}")

    @contextmanager
    def naming(self, key: str | None = None) -> Iterator[None]:
        """Name the place of a key, or of the mapping, in an error of the block."""
        try:
            yield
        except SubspanError as error:
            raise self.error(error, key) from None

    def only(self, keys: Collection[str]) -> Located:
        """Return the items with these keys."""
        found = Located(self.file, self.line)
        for key in self:
            if key in keys:
                found[key], found.lines[key] = self[key], self.lines[key]
        return found

    def replaced_by(self, *others: Located) -> Located:
        """Return the items of all; a key that is given again replaces what was given before."""
        found = self.only(self.keys())
        for other in others:
            found.update(other)
            found.lines.update(other.lines)
        return found

    def mapping(self, key: str) -> Located:
        """Return the mapping at a key; an empty one where there is none."""
        value = self.get(key)
        if value is None:
            return Located(self.file, self.lines.get(key, self.line))
        if not isinstance(value, Located):
            raise self.error(f"{key} must be a mapping of names to values, got {value!r}", key)
        return value

    def check_keys(self, kind: str, known: Collection[str]) -> None:
        """Refuse other keys than these, with the nearest one."""
        for key in self:
            if key not in known:
                raise self.error(unknown(kind, key, known), key)

    def fit(self, key: str, kind: Any) -> Any:
        """Return the value at a key as an annotation has it; where that is a tuple, a list."""
        try:
            return from_json(kind, _formed(self[key], kind), (key,))
        except (MisfitError, yaml.YAMLError) as error:
            raise self.error(error, key) from None

    def make(self, cls: type[T], kind: str, **more: Any) -> T:
        """Make a dataclass of the items and of ``more``, fields that no key gives.

        Null, where a field takes none, is the field's default. A key that is no field, one that
        lacks, and a value that does not fit are refused, in words that call the dataclass ``kind``.
        """
        hints = get_type_hints(cls)
        own = [f for f in fields(cls) if f.name not in more]  # type: ignore[arg-type]
        self.check_keys(f"key of {kind}", [f.name for f in own])
        given = dict(more)
        for f in own:
            takes_null = NoneType in get_args(hints[f.name])
            if f.name in self and (takes_null or self[f.name] is not None):
                given[f.name] = self.fit(f.name, hints[f.name])
            elif f.default is MISSING and f.default_factory is MISSING:
                raise self.error(f"{kind} needs {f.name}")
        try:
            return cls(**given)
        except SubspanError:
            # Values are wrong by themselves, or with one that stands before them among the fields.
            for key in list(given)[len(more) :]:
                more[key] = given[key]
                # An argument that is required may be still to come.
                with suppress(TypeError), self.naming(key):
                    cls(**more)
            raise


def read(path: Path, name: str) -> Located:
    """Read a YAML file that is one mapping; errors call it by the name."""
    if path.is_dir():
        raise SubspanError(f"{name} is a folder: give a YAML file")
    if not path.is_file():
        raise SubspanError(f"there is no file {name}: give one that exists")
    root = compose(read_text(path, name), name)
    if not isinstance(root, yaml.MappingNode):
        line = 1 if root is None else line_of(root)
        raise SubspanError(f"{name}, line {line}: the file must be a mapping of names to values")
    refuse_repeated_keys(root, name)
    try:
        found: Located = _value(root, name, yaml.constructor.SafeConstructor())
    except (yaml.MarkedYAMLError, ValueError) as error:
        if isinstance(error, SubspanError):
            raise
        line = error.problem_mark.line + 1 if isinstance(error, yaml.MarkedYAMLError) else 1
        problem = getattr(error, "problem", error)
        raise SubspanError(f"{name}, line {line}: {problem}") from None
    return found


def _value(node: yaml.Node, file: str, scalars: yaml.constructor.SafeConstructor) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, file, scalars) for item in node.value]
    if not isinstance(node, yaml.MappingNode):
        return scalars.construct_object(node)
    found = Located(file, line_of(node))
    scalars.flatten_mapping(node)
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise SubspanError(f"{file}, line {line_of(key)}: a key must be a text")
        found[key.value], found.lines[key.value] = _value(value, file, scalars), line_of(key)
    return found


def _formed(value: Any, kind: Any) -> Any:
    """Bring a value into the form of an annotation: a tuple may be one value, or "10,30"."""
    for one in alternatives(kind):
        origin, args = get_origin(one), get_args(one)
        if isinstance(value, Mapping):
            if origin in (dict, Mapping):
                return {key: _formed(inner, args[1]) for key, inner in value.items()}
        elif origin is tuple:
            if isinstance(value, str):
                value = [yaml.load(f"- {item.strip()}", Loader)[0] for item in value.split(",")]
            items = value if isinstance(value, list) else [value]
            numbers = (int, float) if args[0] is str else ()  # dims: numbers, or texts as 600+250
            return [str(i) if type(i) in numbers else _formed(i, args[0]) for i in items]
        elif one is float and type(value) is int:
            return float(value)
    return value
