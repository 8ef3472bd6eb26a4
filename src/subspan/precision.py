"""Full precision inside of autocast: for numbers that are promised, not for the passes of layers.

A region of autocast is meant for forward passes. But weights are read in it, networks are merged,
and whole steps are made; what is computed there goes on afterwards, and must not be rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_AS_IT_IS = nullcontext()


def _is_on(device: torch.device) -> bool:
    """Return whether autocast is on for a kind of device."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products on a device have the precision of their factors."""
    return torch.autocast(device.type, enabled=False) if _is_on(device) else _AS_IT_IS


def as_now(closure: Callable[[], Any] | None, device: torch.device) -> Callable[[], Any] | None:
    """Return a closure that runs under the autocast of now, also inside of full precision.

    It keeps no casts of weights, which may change between its calls.
    """
    if closure is None or not _is_on(device):
        return closure
    dtype = torch.get_autocast_dtype(device.type)
    return torch.autocast(device.type, dtype, cache_enabled=False)(closure)
