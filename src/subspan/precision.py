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

# Asked for each call, PyTorch's function would break the graphs of its compiler before 2.12.
_KINDS = ("meta", "vulkan", "lazy", "fpga", "ve", "opencl", "opengl", "ideep")
_WITHOUT = frozenset(kind for kind in _KINDS if not torch.amp.is_autocast_available(kind))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype to which autocast casts on a kind of device; None where it is off."""
    kind = device.type
    on = kind not in _WITHOUT and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products on a device have the precision of their factors."""
    return torch.autocast(device.type, enabled=False) if autocast_dtype(device) else _AS_IT_IS


def as_now(closure: Callable[[], Any] | None, device: torch.device) -> Callable[[], Any] | None:
    """Return a closure that runs under the autocast of now, also inside of full precision.

    It keeps no casts of weights, which may change between its calls.
    """
    if closure is None or (dtype := autocast_dtype(device)) is None:
        return closure
    return torch.autocast(device.type, dtype, cache_enabled=False)(closure)
