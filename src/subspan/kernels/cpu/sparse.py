"""``sparse``, ``sparse2full``: one nonzero of every column in each block of s rows.

One call of the generator places four nonzeros of a column, one in each of four blocks. Words and
places are made for 64 columns at once; what is left is one addition per nonzero, and those of four
blocks stand side by side so that none waits for the sum before it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import int64, prange, uint32, uint64
from torch import Tensor

from subspan.kernels import Kernel
from subspan.kernels.cpu import common
from subspan.kernels.cpu.common import LANES, as_bits, as_float, columns, inline


@inline
def _places(out, words, call, column, run, size, address):
    """2·place + sign bit, in 64 bits, of the nonzeros of four blocks, (4, LANES).

    A place counts from the first row of its block; of a block past the last row it is negative.
    """
    columns(words, call, column, address)
    for k in range(4):
        length = min(run, size - (4 * call + k) * run)
        for lane in range(LANES):
            word = uint64(words[k, lane])
            place = int64(((word >> uint64(1)) * uint64(max(length, 0))) >> uint64(31))
            out[k, lane] = 2 * place + int64(word & uint64(1))


@common.kernel
def _matvec(w, start, out, run, size, address):
    """out_i = Σ ±w_j over the columns with a nonzero in row i; w is padded to whole LANES."""
    stop, four = start + out.size, 4 * run
    bits = w.view(np.uint32)
    for call in prange(start // four, (stop + four - 1) // four):
        words, places = np.empty((4, LANES), np.uint32), np.empty((4, LANES), np.int64)
        first = int64(call) * four - start
        out[max(0, first) : max(0, first + four)] = 0
        whole = first >= 0 and first + four <= out.size
        for column in range(0, w.size, LANES):
            _places(places, words, int64(call), column, run, size, address)
            for lane in range(LANES):
                value = bits[column + lane]
                for k in range(4):
                    place = places[k, lane]
                    row = first + k * run + (place >> 1)
                    if whole or 0 <= row < out.size:
                        out[row] += as_float(value ^ (uint32(place) << uint32(31)))


@common.kernel
def _rmatvec(g, start, partial, chunk, run, size, address):
    """partial[task, j] = Σ ±g_i over the nonzeros of column j in the blocks of the task."""
    stop, four = start + g.size, 4 * run
    begin, end = start // four, (stop + four - 1) // four
    groups = partial.shape[1] // LANES
    for task in prange(partial.shape[0] * groups):
        part, group = task // groups, task % groups
        words, places = np.empty((4, LANES), np.uint32), np.empty((4, LANES), np.int64)
        sums = np.zeros((4, LANES), np.float32)
        for call in range(begin + part * chunk, min(end, begin + (part + 1) * chunk)):
            _places(places, words, call, group * LANES, run, size, address)
            first = call * four - start
            whole = first >= 0 and first + four <= g.size
            for k in range(4):
                for lane in range(LANES):
                    row = first + k * run + (places[k, lane] >> 1)
                    if whole or 0 <= row < g.size:
                        sign = uint32(places[k, lane]) << uint32(31)
                        sums[k, lane] += as_float(as_bits(g[row]) ^ sign)
        for lane in range(LANES):
            partial[part, group * LANES + lane] = sums[:, lane].sum()


def matvec(p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Rows of P w."""
    out = np.empty(stop - start, np.float32)
    common.threads(4 * (stop - start) * p.in_dim / p.run)
    _matvec(common.padded(w), start, out, p.run, p.out_dim, common.address(p, step))
    return torch.from_numpy(out) * p.magnitude


def rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g."""
    four = 4 * p.run
    blocks = -(-stop // four) - start // four
    chunk, partial = common.partials(blocks, four, p.in_dim)
    common.threads(4 * (stop - start) * p.in_dim / p.run)
    _rmatvec(g.numpy(), start, partial, chunk, p.run, p.out_dim, common.address(p, step))
    return common.total(partial, p.in_dim) * p.magnitude


KERNELS = {name: Kernel(matvec, rmatvec) for name in ("sparse", "sparse2full")}
