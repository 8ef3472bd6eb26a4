"""Dataclasses as JSON, and values that are checked against the annotations of dataclasses.

The dataclass that writes a file is the one that reads it. An annotation is a number, a text, a
truth value, None, a list, a tuple of equal items, a dict with texts as keys, a dataclass, ``Any``,
or one of them "or None". Keys that a dataclass does not know are left out when it is read.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from subspan.errors import SubspanError, unknown

T = TypeVar("T")
Path = tuple[str | int, ...]

# Of fields: left out of the JSON while it is empty; for all keys that have no field.
OPTIONAL, OTHERS = {"optional": True}, {"others": True}

_WORDS: dict[Any, str] = {
    bool: "true or false",
    dict: "a mapping",
    float: "a number",
    int: "an integer",
    list: "a list",
    str: "a text",
    tuple: "a list",
    Callable: "a function",
    Mapping: "a mapping",
    NoneType: "null",
}
_SPACE = re.compile(r"[\s,:]*")


class MisfitError(ValueError):
    """JSON that does not fit a dataclass: what is wrong with the value that a path leads to."""

    def __init__(self, message: str, path: Path = ()) -> None:
        name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
        super().__init__(f"{name.lstrip('.')} {message}".strip())
        self.message, self.path = message, path


def to_json(value: Any) -> Any:
    """Turn dataclasses and tuples into dicts and lists; fields keep their order."""
    if isinstance(value, Mapping):
        return {key: to_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(inner) for inner in value]
    if not is_dataclass(value):
        return value
    content: dict[str, Any] = {}
    for each in fields(value):
        inner = getattr(value, each.name)
        if "others" in each.metadata:
            content |= to_json(inner)
        elif inner or "optional" not in each.metadata:
            content[each.name] = to_json(inner)
    return content


def from_json(kind: type[T], value: Any, path: Path = ()) -> T:
    """Make a dataclass, or what else an annotation may be, from what :func:`to_json` made of one.

    Raises:
        MisfitError: if a value is missing, or has another type, or if the dataclass refuses it.
    """
    found: T = _fit(kind, value, path)
    return found


def check_fields(config: Any) -> None:
    """Refuse fields of a configuration that are not what their annotations say.

    What is right in another form gets the form of its field: 1e3 is an integer, a path or a number
    a text, a list a tuple, and numbers of NumPy or PyTorch are Python's.

    Raises:
        SubspanError: for the first field that is something else.
    """
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise unknown(name, value, get_args(kind))
        else:
            object.__setattr__(config, name, fitting(kind, value, name))


def fitting(kind: Any, value: Any, name: str) -> Any:
    """Return a value in the form that an annotation has; see :func:`check_fields`."""
    try:
        return _fit(kind, value, (name,), lenient=True)
    except MisfitError as error:
        keys = [key for key in error.path if isinstance(key, str)]
        raise SubspanError(f"{' of '.join(keys)} {error.message}") from None


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the one kind that an annotation is."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _fit(kind: Any, value: Any, path: Path, *, lenient: bool = False) -> Any:
    """Return a value as an annotation has it: from JSON, or leniently from another form of it."""
    value = value.tolist() if lenient and hasattr(value, "tolist") else value
    kinds, number = alternatives(kind), _is(float, value)
    fit = functools.partial(_fit, lenient=lenient)
    for one in kinds:
        origin, args = get_origin(one) or one, get_args(one)
        if origin is Any:
            return _any(value, path, lenient=lenient)
        if origin is Literal:
            if value in args:
                return value
            continue
        if origin in (list, tuple) and isinstance(value, (list, tuple)):
            return origin(fit(args[0], inner, (*path, i)) for i, inner in enumerate(value))
        if origin in (dict, Mapping) and isinstance(value, Mapping):
            return {key: fit(args[1], inner, (*path, str(key))) for key, inner in value.items()}
        if is_dataclass(origin) and isinstance(value, dict) and not lenient:
            return _dataclass(one, value, path)
        if lenient and origin is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if lenient and origin is str and (number or isinstance(value, os.PathLike)):
            return str(value)
        if _is(origin, value):
            if isinstance(value, float) and not lenient and not math.isfinite(value):
                raise MisfitError(f"must be a finite number, got {value}", path)
            return value
    words = " or ".join(_in_words(one, lenient=lenient) for one in kinds)
    listed = lenient and any(get_origin(one) is tuple for one in kinds)
    scalar = number or isinstance(value, (str, os.PathLike))
    hint = f": give ({value!r},)" if listed and scalar else ""
    raise MisfitError(f"must be {words}, got {reprlib.repr(value)}{hint}", path)


def _any(value: Any, path: Path, *, lenient: bool) -> Any:
    """Return a value that JSON can hold; leniently, one whose numbers are not Python's."""
    value = value.tolist() if lenient and hasattr(value, "tolist") else value
    any_ = functools.partial(_any, lenient=lenient)
    if isinstance(value, (list, tuple)):
        return [any_(inner, (*path, i)) for i, inner in enumerate(value)]
    if isinstance(value, Mapping):
        named = {key if lenient else str(key): inner for key, inner in value.items()}
        return {key: any_(inner, (*path, str(key))) for key, inner in named.items()}
    if value is None or isinstance(value, (str, int)):
        return value
    return _fit(float, value, path)


def _is(kind: type, value: Any) -> bool:
    """Return whether a value is of a kind: integers are numbers, and truth values are neither."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _in_words(kind: Any, *, lenient: bool) -> str:
    origin = get_origin(kind) or kind
    if origin is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if origin is tuple and lenient:
        return f"a tuple of {_in_words(get_args(kind)[0], lenient=True).partition(' ')[2]}s"
    article = "an" if origin.__name__[0] in "AEIOU" else "a"
    return _WORDS.get(origin) or (f"{article} {origin.__name__}" if lenient else "a mapping")


def _dataclass(kind: Any, content: dict[str, Any], path: Path) -> Any:
    hints, given, rest = _hints(kind), {}, dict(content)
    where_others_go = None
    for each in fields(kind):
        if "others" in each.metadata:
            where_others_go = each.name
        elif each.name in content:
            here = (*path, each.name)
            given[each.name] = _fit(hints[each.name], rest.pop(each.name), here)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise MisfitError(f"lacks {each.name}" if path else f"{each.name} is missing", path)
    if where_others_go:
        given[where_others_go] = _fit(hints[where_others_go], rest, path)
    try:
        return kind(**given)
    except MisfitError as error:
        raise MisfitError(error.message, (*path, *error.path)) from None
    except ValueError as error:  # of values that are each of the right type
        raise MisfitError(f"is refused: {error}" if path else str(error), path) from None


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def line_of(text: str, path: Path, renamed: Mapping[str, str]) -> int:
    """Return the line of valid JSON on which a value begins, or on which what should hold it does.

    Keys that the text has under other names are renamed to those in the path.
    """
    decode = json.JSONDecoder().raw_decode
    start = _after_space(text, 0)
    for step in path:
        at = start + 1  # behind the bracket
        for number in itertools.count():
            at = _after_space(text, at)
            if at >= len(text) or text[at] in "]}":
                return text.count("\n", 0, start) + 1
            key: Any = number
            if isinstance(step, str):
                key, at = decode(text, at)
                at = _after_space(text, at)
            if renamed.get(key, key) == step:
                start = at
                break
            at = decode(text, at)[1]
    return text.count("\n", 0, start) + 1


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
