"""Triton kernels of all generated families, for vectors on a CUDA device."""

from __future__ import annotations

import functools
import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from subspan.kernels import Product, collect


def _on_device(product: Product) -> Product:
    """Make the device of the vector the current one, on which Triton launches."""

    @functools.wraps(product)
    def guarded(p: Any, x: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        with torch.cuda.device_of(x) if x.is_cuda else nullcontext():
            return product(p, x, step, start, stop)

    return guarded


KERNELS = {
    family: kernel._replace(matvec=_on_device(kernel.matvec), rmatvec=_on_device(kernel.rmatvec))
    for family, kernel in collect(sys.modules[__name__]).items()
}
