"""``rademacher``: one call of the generator makes 128 entries, so that all else must be cheap.

Four terms meet the accumulator as one sum, looked up by their signs (:mod:`.signed_sums`). The sums
of four entries of g serve SPAN · LANES columns, those of four coordinates all rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from subspan.kernels import Kernel
from subspan.kernels.cpu import common
from subspan.kernels.cpu.common import LANES, columns
from subspan.kernels.cpu.signed_sums import FOURS, SUMS, add_columns, add_rows, by_rows, signed_sums

SPAN = 2  # groups of LANES columns that one task goes through


@common.kernel
def _rmatvec(g, start, partial, chunk, address):
    """partial[task, j] = Σ ±g_i over the blocks of 128 rows of the task."""
    first, last = start // 128, (start + g.size + 127) // 128
    groups = partial.shape[1] // LANES
    spans = (groups + SPAN - 1) // SPAN
    for task in prange(partial.shape[0] * spans):
        part, begin = task // spans, task % spans * SPAN
        end = min(groups, begin + SPAN)
        words, rows = np.empty((4, LANES), np.uint32), np.empty(128, np.float32)
        sums, total = np.empty((32, SUMS), np.float32), np.zeros(SPAN * LANES, np.float32)
        for block in range(first + part * chunk, min(last, first + (part + 1) * chunk)):
            for i in range(128):
                place = block * 128 + i - start
                rows[i] = g[place] if 0 <= place < g.size else np.float32(0)
            signed_sums(sums, rows)
            for group in range(begin, end):
                columns(words, block, group * LANES, address)
                add_columns(total, (group - begin) * LANES, words, rows, sums)
        partial[part, begin * LANES : end * LANES] = total[: (end - begin) * LANES]


@common.kernel
def _matvec(w, start, out, address):
    """out_i = Σ_j ±w_j; w is padded by zeros to whole LANES."""
    first, last = start // 128, (start + out.size + 127) // 128
    sums = np.empty((w.size // 4, SUMS), np.float32)
    signed_sums(sums, w)
    for block in prange(first, last):
        words, signs = np.empty((4, LANES), np.uint32), np.empty((4, 2, FOURS, 2), np.uint32)
        total = np.zeros((4, 2, 8, 2), np.float32)
        for group in range(w.size // LANES):
            columns(words, block, group * LANES, address)
            by_rows(signs, words)
            add_rows(total, signs, w, sums, group)
        for i in range(128):
            place = np.int64(block) * 128 + i - start
            if 0 <= place < out.size:
                out[place] = total[i // 32, i // 2 % 2, i // 4 % 8, i % 2]


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
