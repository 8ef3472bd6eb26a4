"""``rademacher``: one call of the generator makes 128 entries, so that all else must be cheap.

Lanes are 64 columns (for P w: the 32 rows of a word), so that the word and the shift are constants
or one vector in the inner loop; a sign is flipped by an exclusive or with the shifted bit, and four
terms are summed before they meet the accumulator.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange, uint32
from torch import Tensor

from subspan.kernels import Kernel
from subspan.kernels.cpu import common
from subspan.kernels.cpu.common import LANES, columns, flip


@common.kernel
def _rmatvec(g, start, partial, chunk, address):
    """partial[task, j] = Σ ±g_i over the blocks of 128 rows of the task."""
    first, last = start // 128, (start + g.size + 127) // 128
    groups = partial.shape[1] // LANES
    for task in prange(partial.shape[0] * groups):
        part, group = task // groups, task % groups
        words, rows = np.empty((4, LANES), np.uint32), np.empty(128, np.float32)
        bits = rows.view(np.uint32)
        total = np.zeros(LANES, np.float32)
        for block in range(first + part * chunk, min(last, first + (part + 1) * chunk)):
            for i in range(128):
                place = block * 128 + i - start
                rows[i] = g[place] if 0 <= place < g.size else np.float32(0)
            columns(words, block, group * LANES, address)
            inner = np.zeros(LANES, np.float32)
            for k in range(4):
                for bit in range(0, 32, 4):
                    i = k * 32 + bit
                    g0, g1, g2, g3 = bits[i], bits[i + 1], bits[i + 2], bits[i + 3]
                    shift = uint32(31 - bit)
                    for lane in range(LANES):
                        word = words[k, lane]
                        inner[lane] += (
                            flip(g0, word, shift) + flip(g1, word, shift - uint32(1))
                        ) + (flip(g2, word, shift - uint32(2)) + flip(g3, word, shift - uint32(3)))
            for lane in range(LANES):
                total[lane] += inner[lane]
        partial[part, group * LANES : (group + 1) * LANES] = total


@common.kernel
def _matvec(w, start, out, address):
    """out_i = Σ_j ±w_j; w is padded by zeros to whole LANES."""
    first, last = start // 128, (start + out.size + 127) // 128
    bits = w.view(np.uint32)
    for block in prange(first, last):
        words = np.empty((4, LANES), np.uint32)
        total = np.zeros((4, 32), np.float32)
        for group in range(w.size // LANES):
            columns(words, block, group * LANES, address)
            inner = np.zeros((4, 32), np.float32)
            for j in range(0, LANES, 4):
                c = group * LANES + j
                w0, w1, w2, w3 = bits[c], bits[c + 1], bits[c + 2], bits[c + 3]
                for k in range(4):
                    a, b, e, f = words[k, j], words[k, j + 1], words[k, j + 2], words[k, j + 3]
                    for row in range(32):
                        shift = uint32(31 - row)
                        inner[k, row] += (flip(w0, a, shift) + flip(w1, b, shift)) + (
                            flip(w2, e, shift) + flip(w3, f, shift)
                        )
            for k in range(4):
                for row in range(32):
                    total[k, row] += inner[k, row]
        for i in range(128):
            place = np.int64(block) * 128 + i - start
            if 0 <= place < out.size:
                out[place] = total[i // 32, i % 32]


def matvec(p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Rows of P w."""
    out = np.empty(stop - start, np.float32)
    common.threads((stop - start) * p.in_dim / 16)  # 16 signs are one operation
    _matvec(common.padded(w, p.out_dim**0.5), start, out, common.address(p, step))
    return torch.from_numpy(out)


def rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g."""
    blocks = -(-stop // 128) - start // 128
    chunk, partial = common.partials(blocks, 128, p.in_dim)
    common.threads((stop - start) * p.in_dim / 16)
    _rmatvec(g.numpy(), start, partial, chunk, common.address(p, step))
    return common.total(partial, p.in_dim) / p.out_dim**0.5


KERNELS = {"rademacher": Kernel(matvec, rmatvec)}
