"""A ``forward`` that a trainer has put into a module, for a copy of the module.

TRL and others replace ``forward`` by a function that calls the one before. It holds on to that as
a bound method, which a copy of the function would still call on the original, with its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

from subspan.subspace.held import is_full


def rebind_forward(twin: nn.Module, memo: Mapping[int, Any]) -> None:
    """Let the ``forward`` that was put into a copied module run on copies, which ``memo`` has."""
    forward = vars(twin).get("forward")
    if forward is not None:
        vars(twin)["forward"] = _rebound(forward, memo, {})


def _rebound(value: Any, memo: Mapping[int, Any], done: dict[int, Any]) -> Any:
    """Return a function, or an object that calls one, with copies in the place of modules.

    What holds on to none of the modules is returned as it is.
    """
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if id(value) in done:
        return done[id(value)]
    done[id(value)] = value  # to whom it refers itself
    if isinstance(value, MethodType):
        function, owner = (_rebound(v, memo, done) for v in (value.__func__, value.__self__))
        same = function is value.__func__ and owner is value.__self__
        return value if same else MethodType(function, owner)
    if not callable(value) or isinstance(value, type) or not hasattr(value, "__dict__"):
        return value
    inside = {name: _rebound(item, memo, done) for name, item in vars(value).items()}
    cells = [c.cell_contents for c in getattr(value, "__closure__", None) or () if is_full(c)]
    if isinstance(value, partial):
        cells = [value.func, *value.args, *value.keywords.values()]
    held = [_rebound(item, memo, done) for item in cells]
    old = [*vars(value).values(), *cells]
    if all(one is other for one, other in zip(old, [*inside.values(), *held], strict=True)):
        return value
    if isinstance(value, FunctionType):
        contents = iter(held)
        closure = [CellType(next(contents)) if is_full(c) else c for c in value.__closure__ or ()]
        twin: Any = FunctionType(
            value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(closure)
        )
        twin.__kwdefaults__ = value.__kwdefaults__
    elif isinstance(value, partial):
        function, *given = held
        own = len(value.args)
        named = dict(zip(value.keywords, given[own:], strict=True))
        twin = partial(function, *given[:own], **named)
    else:
        twin = object.__new__(type(value))
    vars(twin).update(inside)
    done[id(value)] = twin
    return twin
