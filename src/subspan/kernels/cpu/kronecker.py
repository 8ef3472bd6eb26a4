"""``kronecker``: the two sign matrices by a kernel, their products by torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange, uint32
from torch import Tensor

from subspan.kernels import Kernel
from subspan.kernels.cpu import common
from subspan.kernels.cpu.common import as_float, philox

ONE = np.uint32(0x3F800000)  # the bits of 1.0


@common.kernel
def _signs(out, first, column, address):
    """Signs first … of columns ``column`` …, (rows, columns)."""
    rows, count = out.shape
    for block in prange(first // 128, (first + rows + 127) // 128):
        for j in range(count):
            words = philox(block, column + j, address)
            for i in range(max(first, block * 128), min(first + rows, block * 128 + 128)):
                word = words[(i % 128) // 32] >> uint32(i % 32)
                out[i - first, j] = as_float(ONE | (word << uint32(31)))


def _matrix(p: Any, step: Tensor, first: int, last: int, column: int, count: int) -> Tensor:
    out = np.empty((last - first, count), np.float32)
    _signs(out, first, column, common.address(p, step))
    return torch.from_numpy(out)


def _factors(p: Any, step: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor, slice]:
    first, last, part = p.covering(start, stop)
    common.threads(2 * (last - first + p.tile[1]) * p.tile[3])
    left = _matrix(p, step, first, last, 0, p.tile[2])
    return left, _matrix(p, step, 0, p.tile[1], 1 << 31, p.tile[3]), part


def matvec(p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Rows of P w."""
    return p.forward(*_factors(p, step, start, stop), w)


def rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g."""
    return p.backward(*_factors(p, step, start, stop), g)


KERNELS = {"kronecker": Kernel(matvec, rmatvec)}
