"""Functions that modules hold, as attributes or hooks, for copies of the modules.

TRL and others replace ``forward`` by a function that calls the one before; a hook may call another
layer. They hold on to it as a bound method, in a closure or as a default value, and Python copies
no functions: those of a copy would still call the original, with its weights.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial, wraps
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

from subspan.subspace import callers
from subspan.subspace.held import DEPTH, contents_of, defaults_of, is_full

_UNDER_WAY = "subspan"  # in the memo of a copy


def copying(run: Callable[[Any, dict[int, Any]], Any]) -> Callable[[Any, dict[int, Any]], Any]:
    """Make a ``__deepcopy__`` whose copies call copies, and which is its own module's alone.

    Functions are rebound by the outermost of copies inside of others: only then are all of them
    there. A module around it that hands attributes on (``CheckpointWrapper``, say) hands this on,
    too, and would be copied without itself.
    """

    @wraps(run)
    def __deepcopy__(self: Any, memo: dict[Any, Any]) -> Any:  # noqa: N807
        asked = callers.find_copied(sys._getframe(1), self)
        if asked is not self:
            return copy._reconstruct(asked, memo, *asked.__reduce_ex__(4))  # type: ignore[attr-defined]
        if _UNDER_WAY in memo:
            return run(self, memo)
        memo[_UNDER_WAY] = True
        try:
            twin = run(self, memo)
        finally:
            del memo[_UNDER_WAY]
        done: dict[int, Any] = {}
        for module in [copied for copied in memo.values() if isinstance(copied, nn.Module)]:
            _rebind_in(vars(module), memo, done, 0)
        return twin

    return __deepcopy__


def _rebind_in(
    held: dict[Any, Any] | list[Any], memo: Mapping[int, Any], done: dict[int, Any], depth: int
) -> None:
    """Rebind what a copied dictionary or list holds, in place: handles of hooks know theirs."""
    for key, value in list(held.items() if isinstance(held, dict) else enumerate(held)):
        if isinstance(value, dict | list):
            if depth < DEPTH:
                _rebind_in(value, memo, done, depth + 1)
        elif (new := _rebound(value, memo, done)) is not value:
            held[key] = new


def _rebound(value: Any, memo: Mapping[int, Any], done: dict[int, Any]) -> Any:
    """Return a function, or an object that calls one, with copies in the place of modules.

    What holds on to none of the modules is returned as it is.
    """
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, MethodType):
        function, owner = (_rebound(v, memo, done) for v in (value.__func__, value.__self__))
        same = function is value.__func__ and owner is value.__self__
        return value if same else MethodType(function, owner)
    if not callable(value) or isinstance(value, type) or not hasattr(value, "__dict__"):
        return value
    done[id(value)] = value  # to whom it refers itself
    inside = {name: _rebound(item, memo, done) for name, item in vars(value).items()}
    old = [*contents_of(value), *defaults_of(value)]
    if isinstance(value, partial):
        old = [value.func, *value.args, *value.keywords.values()]
    held = [_rebound(item, memo, done) for item in old]
    before, now = [*vars(value).values(), *old], [*inside.values(), *held]
    if all(one is other for one, other in zip(before, now, strict=True)):
        return value
    if isinstance(value, FunctionType):
        twin: Any = _function(value, iter(held))
    elif isinstance(value, partial):
        function, *given = held
        own = len(value.args)
        named = dict(zip(value.keywords, given[own:], strict=True))
        twin = partial(function, *given[:own], **named)
    elif type(value).__new__ is object.__new__:
        twin = object.__new__(type(value))
    else:
        return value
    vars(twin).update(inside)
    done[id(value)] = twin
    return twin


def _function(like: FunctionType, held: Iterator[Any]) -> FunctionType:
    """Make a function that holds other things, first in its closure and then as defaults."""
    closure = [CellType(next(held)) if is_full(c) else c for c in like.__closure__ or ()]
    defaults = None if like.__defaults__ is None else tuple(next(held) for _ in like.__defaults__)
    twin = FunctionType(like.__code__, like.__globals__, like.__name__, defaults, tuple(closure))
    twin.__kwdefaults__ = {name: next(held) for name in like.__kwdefaults__ or {}} or None
    for cell in closure:
        if is_full(cell) and cell.cell_contents is like:  # it calls itself
            cell.cell_contents = twin
    return twin
