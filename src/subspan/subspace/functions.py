"""Functions of PyTorch, as ``__torch_function__`` is given them: which write, set, or only move."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor

_IN_PLACE = (
    {"__idiv__"}
    | {  # __iadd__, say, beside __add__
        name
        for name in dir(operator)
        if name.startswith("__i") and hasattr(operator, "__" + name[3:])
    }
)
_MOVING = "to cpu cuda type type_as float half double bfloat16 contiguous pin_memory _to_copy"
_COPYING = "detach clone new __deepcopy__ view_as expand_as reshape_as"
_HARMLESS = frozenset(f"{_MOVING} {_COPYING}".split())


def property_of(function: Any) -> str:
    """Return the name of the property whose getter or setter this is; "" of other functions."""
    return getattr(getattr(function, "__self__", None), "__name__", "")


def sets(function: Any, name: str) -> bool:
    """Return whether a function sets a property of this name."""
    return getattr(function, "__name__", "") == "__set__" and property_of(function) == name


def sets_flag(function: Any) -> bool:
    """Return whether a function sets ``requires_grad``, as a property or by its method."""
    return getattr(function, "__name__", "") == "requires_grad_" or sets(function, "requires_grad")


def writes_first(function: Any) -> bool:
    """Return whether a function writes to its first argument."""
    name = getattr(function, "__name__", "")
    if name == "__set__":
        return property_of(function) == "data"
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or name in _IN_PLACE


def is_harmless(name: str) -> bool:
    """Return whether a function moves or changes a parameter, and computes nothing from it."""
    if name in _HARMLESS or name.endswith("_like") or name.startswith(("new_", "__i")):
        return True
    return name.endswith("_") and not name.endswith("__")


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same storage."""
    try:
        return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):  # without a storage
        return False
