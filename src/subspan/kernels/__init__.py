"""Fast products for the families that have them; everything else runs the families' own torch code.

A kernel is a pair of functions with the signature of :meth:`Projection._matvec` and
:meth:`Projection._rmatvec`, the projection first. It computes what those define: the same integers,
sums in an order of its own. Set ``SUBSPAN_KERNELS=reference`` to do without.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Product = Callable[[Any, Tensor, Tensor, int, int], Tensor]  # (projection, x, step, start, stop)


class Kernel(NamedTuple):
    """Both products of one family on one kind of device, for contiguous float32 vectors."""

    matvec: Product
    rmatvec: Product


@functools.cache
def available(device_type: str) -> dict[str, Kernel]:
    """The kernels for a device type ("cpu", "cuda") by family; loaded on first use."""
    if os.environ.get("SUBSPAN_KERNELS") == "reference" or device_type != "cpu":
        return {}
    try:
        from subspan.kernels import cpu
    except ImportError as error:  # a machine without Numba still computes everything
        warnings.warn(f"Numba kernels are not available ({error}); using plain torch", stacklevel=2)
        return {}
    return cpu.KERNELS


def find(family: str, x: Tensor) -> Kernel | None:
    """The kernel for ``family`` and vectors like ``x``, or None: then torch code computes it."""
    return available(x.device.type).get(family) if x.dtype == torch.float32 else None
