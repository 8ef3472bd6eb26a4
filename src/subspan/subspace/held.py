"""Modules and tensors that a module holds elsewhere than in its parameters, buffers and parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

DEPTH = 3  # of containers, functions and objects in each other
_REGISTERED = ("_parameters", "_buffers", "_modules")


def held_by(module: nn.Module) -> Iterator[Tensor | nn.Module]:
    """Yield the tensors and modules that attributes and hooks of a module hold.

    So do containers, functions and objects among them.
    """
    stack = [(value, 0) for key, value in vars(module).items() if key not in _REGISTERED]
    while stack:
        value, depth = stack.pop()
        if isinstance(value, Tensor | nn.Module):
            yield value
        elif depth < DEPTH:
            stack += [(inner, depth + 1) for inner in _inside(value)]


def _inside(value: Any) -> Iterable[Any]:
    """Return what a container, a bound method, a function or another object holds."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple | set):
        return value
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    if isinstance(value, partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, type):
        return ()
    own = getattr(value, "__dict__", None)
    inside = [*contents_of(value), *defaults_of(value)]
    return [*inside, *own.values()] if isinstance(own, dict) else inside


def contents_of(value: Any) -> list[Any]:
    """Return what the variables of a function's closure hold."""
    cells = getattr(value, "__closure__", None) or ()
    return [cell.cell_contents for cell in cells if is_full(cell)]


def defaults_of(value: Any) -> list[Any]:
    """Return the default values of a function's arguments, as they stand and then by name."""
    if not isinstance(value, FunctionType):
        return []
    return [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]


def is_full(cell: CellType) -> bool:
    """Return whether a variable of a closure has been given a value."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
