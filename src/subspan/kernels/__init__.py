"""Fast products for the families that have them; everything else runs the families' own torch code.

A kernel is a pair of functions with the signature of :meth:`Projection._matvec` and
:meth:`Projection._rmatvec`, the projection first. It computes what those define: the same integers,
sums in an order of its own. A file in ``cpu/`` or ``gpu/`` names the families that it serves in its
``KERNELS``. Set ``SUBSPAN_KERNELS=reference`` to do without.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subspan.registry import import_files

Product = Callable[[Any, Tensor, Tensor, int, int], Tensor]  # (projection, x, step, start, stop)


class Kernel(NamedTuple):
    """Both products of one family on one kind of device, for contiguous float32 vectors."""

    matvec: Product
    rmatvec: Product
    added: Callable[..., None] | None = None
    """θ₀ + P w for vectors of θ₀ whose rows follow each other, into vectors of the same sizes."""
    gathered: Callable[..., Tensor] | None = None
    """Pᵀ g for vectors of g whose rows follow each other."""
    added_apart: Callable[..., None] | None = None
    """Add P w in place to vectors of one length, each from a row of its own on."""
    gathered_apart: Callable[..., Tensor] | None = None
    """Pᵀ g for such vectors of g."""


def collect(package: ModuleType) -> dict[str, Kernel]:
    """Import every file of a package, and put their ``KERNELS`` together, one of each family."""
    kernels: dict[str, Kernel] = {}
    for module in import_files(package):
        for family, kernel in getattr(module, "KERNELS", {}).items():
            if family in kernels:
                raise TypeError(f"{module.__name__} has a second kernel for {family!r}")
            kernels[family] = kernel
    return kernels


@functools.cache
def available(device_type: str) -> dict[str, Kernel]:
    """Load the kernels for a device type, by family, on first use; warn once if there are none."""
    if os.environ.get("SUBSPAN_KERNELS") == "reference" or device_type == "meta":
        return {}
    try:
        if device_type == "cpu":
            from subspan.kernels import cpu

            return cpu.KERNELS
        if device_type == "cuda":
            from subspan.kernels import gpu

            return gpu.KERNELS
        lack = f"there are no kernels for {device_type!r} devices"
    except ImportError as error:  # a machine without them still computes everything
        needed = "Numba" if device_type == "cpu" else "Triton (pip install 'subspan[gpu]')"
        lack = f"{needed} kernels are not available ({error})"
    warnings.warn(f"{lack}; products there run in plain torch", stacklevel=2)
    return {}


def find(family: str, x: Tensor) -> Kernel | None:
    """Return the kernel for ``family`` and vectors like ``x``; None where torch code computes."""
    if x.dtype != torch.float32:
        return None
    return available("cpu" if x.is_cpu else x.device.type).get(family)
