"""``hash``: rows are dealt to buckets by a keyed permutation, and both products follow its index.

Rounds of the permutation run over a tile of rows at once, lane by lane; the indices that left
[0, D) are then gathered and sent through again together, so that no lane waits for another. The
index of a small matrix is kept between calls: following it costs a fifth of making it. That of a
large one is made tile by tile, and used at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import int64, prange, uint32, uint64
from torch import Tensor

from subspan.cache import cache
from subspan.kernels.cpu import common
from subspan.kernels.cpu.common import (
    SIGN,
    as_bits,
    as_float,
    inline,
    permuted,
    round_keys,
    sequence,
)

TILE = 1024  # rows whose index is made together, in the first cache level
TASK = 16 * TILE  # rows of P w that one task writes
TASKS = 64  # of Pᵀ g at most, each with sums of its own
NOTHING = np.empty(0, np.uint32)


@common.function
def _index(out, tile, size, buckets, keys, widths, address):
    """Bucket, and in the highest bit the sign, of the rows of a tile."""
    room = np.empty((3, TILE), np.uint32)  # here, so that the compiler knows it is not ``out``
    first = tile * TILE
    count = min(TILE, size - first)
    permuted(out, room, first, count, uint32(size - 1), keys, widths)
    # x mod d by a product: with 2^k ≤ d < 2^(k+1), the quotient (x ⌊2^(32+k)/d⌋) div 2^(32+k) is
    # right or too small by one, and then the rest is too large by d; x − d wraps if it is right.
    k = 0
    while buckets >> (k + 1) > 0:
        k += 1
    d, factor, shift = uint32(buckets), uint64((1 << (32 + k)) // buckets), uint64(32 + k)
    for i in range(count):
        rest = uint32(out[i] - uint32((uint64(out[i]) * factor) >> shift) * d)
        out[i] = min(rest, uint32(rest - d))
    words = room[0, : TILE // 32].reshape(TILE // 128, 4)
    sequence(words, first // 128, TILE // 128, 0, address)
    for n in range(TILE // 32):
        word = room[0, n]
        for bit in range(widths[3]):
            out[n * 32 + bit] |= (word << uint32(31 - bit)) & SIGN


@common.kernel
def _fill(out, start, buckets, size, widths, address):
    """The index of the rows from ``start`` on."""
    keys, stop = round_keys(widths[0], 1, address), start + out.size
    for task in prange(start // TASK, (stop + TASK - 1) // TASK):
        index = np.empty(TILE, np.uint32)
        for tile in range(int64(task) * TASK // TILE, int64(task + 1) * TASK // TILE):
            first, last = max(start, tile * TILE), min(stop, (tile + 1) * TILE)
            if first < last:
                _index(index, tile, size, buckets, keys, widths, address)
                out[first - start : last - start] = index[first - tile * TILE : last - tile * TILE]


@inline
def _scale(out, x, size):
    """out_b = x_b/√n_b: the root and the quotient in float64, then float32 (docs/format.md)."""
    more = size % x.size  # the first so many buckets hold one row more
    large = np.float32(1.0 / np.sqrt(float(size // x.size + 1)))
    small = np.float32(1.0 / np.sqrt(float(size // x.size)))
    for bucket in range(x.size):
        out[bucket] = x[bucket] * (large if bucket < more else small)


@common.kernel
def _matvec(w, start, out, kept, size, widths, address):
    """out_i = ±w_b/√n_b, by the index that is kept or, if that is empty, is made."""
    keys, stop = round_keys(widths[0], 1, address), start + out.size
    table = np.empty(w.size, np.float32)
    _scale(table, w, size)
    for task in prange(start // TASK, (stop + TASK - 1) // TASK):
        index = np.empty(TILE, np.uint32)
        for tile in range(int64(task) * TASK // TILE, int64(task + 1) * TASK // TILE):
            first, last = max(start, tile * TILE), min(stop, (tile + 1) * TILE)
            if first < last:
                if kept.size:
                    words = kept[first - start : last - start]
                else:
                    _index(index, tile, size, table.size, keys, widths, address)
                    words = index[first - tile * TILE : last - tile * TILE]
                rows = out[first - start : last - start]
                for i in range(rows.size):
                    word = words[i]
                    rows[i] = as_float(as_bits(table[word & ~SIGN]) ^ (word & SIGN))


@common.kernel
def _rmatvec(g, start, total, partial, chunk, kept, size, widths, address):
    """total[bucket] = Σ ±g_i /√n_b; every task first sums its rows into partial[task]."""
    keys, stop = round_keys(widths[0], 1, address), start + g.size
    begin, end, buckets = start // TILE, (stop + TILE - 1) // TILE, total.size
    for task in prange(len(partial)):
        sums = partial[task]
        sums[:] = 0
        index = np.empty(TILE, np.uint32)
        for tile in range(begin + task * chunk, min(end, begin + (task + 1) * chunk)):
            first, last = max(start, tile * TILE), min(stop, (tile + 1) * TILE)
            if kept.size:
                words = kept[first - start : last - start]
            else:
                _index(index, tile, size, buckets, keys, widths, address)
                words = index[first - tile * TILE : last - tile * TILE]
            rows = g[first - start : last - start]
            for i in range(rows.size):
                word = words[i]
                sums[word & ~SIGN] += as_float(as_bits(rows[i]) ^ (word & SIGN))
    total[:] = 0
    for task in range(len(partial)):
        for bucket in range(buckets):
            total[bucket] += partial[task, bucket]
    _scale(total, total, size)


def _arguments(p: Any, step: Tensor, start: int, stop: int) -> tuple[Any, ...]:
    """The index that is kept, and from what it is made."""
    made_of = p.out_dim, common.widths(p.out_dim), common.address(p, step)

    def build() -> tuple[Tensor]:
        index = np.empty(stop - start, np.uint32)
        common.threads(8 * index.size)
        _fill(index, start, p.in_dim, *made_of)
        return (torch.from_numpy(index),)

    if 4 * p.out_dim > common.KEPT:
        return NOTHING, *made_of
    (index,) = cache.get(("hash", p, int(step), start, stop, "numba"), build)
    return index.numpy(), *made_of


def matvec(p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Rows of P w."""
    if p.out_dim > 1 << 32:  # kernels count rows in 32 bits
        return p._matvec(w, step, start, stop)
    out = np.empty(stop - start, np.float32)
    arguments = _arguments(p, step, start, stop)
    common.threads(2 * out.size)
    _matvec(w.numpy(), start, out, *arguments)
    return torch.from_numpy(out)


def rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g."""
    if p.out_dim > 1 << 32:
        return p._rmatvec(g, step, start, stop)
    # The number of tasks depends on sizes alone, and their sums stay below a sixteenth of g; it is
    # a power of 2, as the number of threads mostly is.
    tiles = -(-stop // TILE) - start // TILE
    tasks = min(TASKS, max(1, (stop - start) // (16 * p.in_dim)), tiles)
    chunk = -(-tiles // (1 << (tasks.bit_length() - 1)))
    partial = np.empty((-(-tiles // chunk), p.in_dim), np.float32)
    total = np.empty(p.in_dim, np.float32)
    arguments = _arguments(p, step, start, stop)
    common.threads(2 * (stop - start))
    _rmatvec(g.numpy(), start, total, partial, chunk, *arguments)
    return torch.from_numpy(total)
