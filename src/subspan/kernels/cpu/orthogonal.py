"""``orthogonal``: the butterflies of T where they lie, its long segments by all threads together.

Levels inside rows run on tiles of 32 rows. The levels that halve long segments pass over the whole
vector, every thread over a part of it; segments of up to SHORT rows fit the first cache level, and
one thread does all of their levels at once.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from numba import int64, prange, uint32
from torch import Tensor

from subspan.kernels import Kernel
from subspan.kernels.cpu import common
from subspan.kernels.cpu.common import (
    SIGN,
    as_bits,
    as_float,
    eight,
    inline,
    permuted,
    round_keys,
    sequence,
)
from subspan.kernels.cpu.hash_index import TASK, TILE

ROW = 32
SHORT = 256  # rows
PIECES = 8  # of a long segment
f32 = np.float32
C = f32(math.sqrt(0.5))


@inline
def _butterfly(x, i, k, count):
    """Elements i … and k …, ``count`` of each as far as they exist."""
    count = min(count, x.size - k)
    if count > 0:
        one, two = x[i : i + count], x[k : k + count]
        for n in range(count):
            a, b = one[n], two[n]
            one[n], two[n] = (a + b) * C, (a - b) * C


@common.function
def _rows_of_tile(x, y, z, forward):
    """The five levels inside the rows of a tile, in place; ``y`` and ``z`` are room for a tile."""
    if x.size < TILE:  # the last one: elements may have no partner
        for level in range(5):
            stride = 1 << (level if forward else 4 - level)
            for i in range(x.size - stride):
                if i & stride == 0:
                    a, b = x[i], x[i + stride]
                    x[i], x[i + stride] = (a + b) * C, (a - b) * C
        return
    # They act on different bits of the place, so that their order does not matter. Levels 0, 1, 2
    # read neighbours by eight and write to eighths, where levels 3, 4 find neighbours by four.
    m = TILE // 8
    for i in range(m):
        k = 8 * i
        a, b, c, d = x[k], x[k + 1], x[k + 2], x[k + 3]
        e, f, g, h = x[k + 4], x[k + 5], x[k + 6], x[k + 7]
        a, b, c, d, e, f, g, h = eight(a, b, c, d, e, f, g, h)
        y[i], y[i + m], y[i + 2 * m], y[i + 3 * m] = a, b, c, d
        y[i + 4 * m], y[i + 5 * m], y[i + 6 * m], y[i + 7 * m] = e, f, g, h
    for i in range(TILE // 4):
        k = 4 * i
        a, b, c, d = y[k], y[k + 1], y[k + 2], y[k + 3]
        a, b, c, d = a + b, a - b, c + d, c - d
        z[k], z[k + 1] = (a + c) * f32(2**-2.5), (b + d) * f32(2**-2.5)
        z[k + 2], z[k + 3] = (a - c) * f32(2**-2.5), (b - d) * f32(2**-2.5)
    for i in range(m):
        k = 8 * i
        x[k], x[k + 1], x[k + 2], x[k + 3] = z[i], z[i + m], z[i + 2 * m], z[i + 3 * m]
        x[k + 4], x[k + 5] = z[i + 4 * m], z[i + 5 * m]
        x[k + 6], x[k + 7] = z[i + 6 * m], z[i + 7 * m]


@inline
def _halve(first, size, count):
    """Replace ``count`` segments (first row, rows) by their halves, in place and in order."""
    for n in range(count - 1, -1, -1):
        begin, rows = first[n], size[n]
        first[2 * n], size[2 * n] = begin, rows - rows // 2
        first[2 * n + 1], size[2 * n + 1] = begin + rows - rows // 2, rows // 2


@common.function
def _short(x, begin, rows, levels, forward):
    """All levels of one segment."""
    if levels == 0:  # one row
        return
    first, size = np.empty((levels, SHORT), np.int64), np.empty((levels, SHORT), np.int64)
    first[0, 0], size[0, 0] = begin, rows
    for level in range(1, levels):
        count = 1 << (level - 1)
        first[level, :count], size[level, :count] = (
            first[level - 1, :count],
            size[level - 1, :count],
        )
        _halve(first[level], size[level], count)
    for n in range(levels):
        level = n if forward else levels - 1 - n
        for m in range(1 << level):
            begin, rows = first[level, m], size[level, m]
            _butterfly(x, begin * ROW, (begin + rows - rows // 2) * ROW, rows // 2 * ROW)


@common.kernel
def _inside(x, forward):
    for task in prange((x.size + TASK - 1) // TASK):
        y, z = np.empty(TILE, f32), np.empty(TILE, f32)
        for start in range(task * TASK, min(x.size, (task + 1) * TASK), TILE):
            _rows_of_tile(x[start : start + TILE], y, z, forward)


@common.kernel
def _long(x, first, size):
    """One level of segments."""
    for task in prange(first.size * PIECES):
        begin, rows = first[task // PIECES], size[task // PIECES]
        pairs = rows // 2 * ROW
        share = (pairs + PIECES - 1) // PIECES
        skip = task % PIECES * share
        _butterfly(
            x, begin * ROW + skip, (begin + rows - rows // 2) * ROW + skip, min(share, pairs - skip)
        )


@common.kernel
def _all_short(x, first, size, levels, forward):
    for n in prange(first.size):
        _short(x, first[n], size[n], levels, forward)


@functools.lru_cache(maxsize=64)
def _segments(rows: int) -> tuple[list[tuple[Any, Any]], int]:
    """First row and rows of the segments of each long level, and of those below; their levels."""
    levels = (rows - 1).bit_length()
    long = max(0, levels - (SHORT - 1).bit_length())
    first, size = np.zeros(1, np.int64), np.array([rows])
    found = [(first, size)]
    for _ in range(long):
        lower = size - size // 2
        first = np.stack((first, first + lower), 1).ravel()
        size = np.stack((lower, size // 2), 1).ravel()
        found.append((first, size))
    return found, levels - long


def transform(x: Any, forward: bool) -> None:
    """T x, or Tᵀ x, in place."""
    (*long, short), levels = _segments(-(-x.size // ROW))
    steps = [
        (_inside, (x, forward)),
        *((_long, (x, *segments)) for segments in long),
        (_all_short, (x, *short, levels, forward)),
    ]
    for step, arguments in steps if forward else reversed(steps):
        step(*arguments)


@common.kernel
def _places(out, size, widths, address):
    """Images of 0, 1, … under the permutation of [0, size)."""
    keys = round_keys(widths[0], 1, address)
    for tile in prange((out.size + TILE - 1) // TILE):
        image, room = np.empty(TILE, np.uint32), np.empty((3, TILE), np.uint32)
        first = int64(tile) * TILE
        count = min(TILE, out.size - first)
        permuted(image, room, first, count, uint32(size - 1), keys, widths)
        out[first : first + count] = image[:count]


@common.kernel
def _sign(x, first, out, address):
    """out_i = ±x_i, with the signs of the rows from ``first`` on."""
    stop = first + x.size
    for task in prange(first // TASK, (stop + TASK - 1) // TASK):
        words, base = np.empty((TASK // 128, 4), np.uint32), int64(task) * TASK
        sequence(words, base // 128, TASK // 128, 0, address)
        flat = words.ravel()
        for k in range(flat.size):
            begin, end = max(first, base + 32 * k), min(stop, base + 32 * k + 32)
            if begin < end:
                word = flat[k] >> uint32(begin & 31)
                # Slices, because an index that might be negative keeps the compiler from vectors.
                here, there = x[begin - first : end - first], out[begin - first : end - first]
                for i in range(here.size):
                    there[i] = as_float(as_bits(here[i]) ^ ((word << uint32(31 - i)) & SIGN))


def _chosen(p: Any, step: Tensor) -> Any:
    places = np.empty(p.in_dim, np.uint32)
    _places(places, p.out_dim, common.widths(p.out_dim), common.address(p, step))
    return places


def matvec(p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Rows of P w."""
    if p.out_dim > 1 << 32:  # kernels count rows in 32 bits
        return p._matvec(w, step, start, stop)
    common.threads(8 * p.out_dim)
    x = np.zeros(p.out_dim, f32)
    x[_chosen(p, step)] = w.numpy()
    transform(x, forward=True)
    rows = x[start:stop]
    _sign(rows, start, rows, common.address(p, step))
    return torch.from_numpy(rows)


def rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g."""
    if p.out_dim > 1 << 32:
        return p._rmatvec(g, step, start, stop)
    common.threads(8 * p.out_dim)
    x = np.zeros(p.out_dim, f32)
    _sign(g.numpy(), start, x[start:stop], common.address(p, step))
    transform(x, forward=False)
    return torch.from_numpy(x[_chosen(p, step)])


KERNELS = {"orthogonal": Kernel(matvec, rmatvec)}
