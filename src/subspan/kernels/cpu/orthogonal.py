"""``orthogonal``: the butterflies of T where they lie, its long segments by all threads together.

Levels inside rows run on tiles of 32 rows. The levels that halve long segments pass over the whole
vector, every thread over a part of it; segments of up to SHORT rows fit the first cache level, and
one thread does all of their levels at once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import int64, prange, uint32
from torch import Tensor

from subspan.kernels.cpu import common
from subspan.kernels.cpu.common import SIGN, as_bits, as_float, inline, round_keys, sequence
from subspan.kernels.cpu.hash import TILE, permuted

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
def _rows_of_tile(x, forward):
    """The five levels inside the rows of a tile, in place."""
    if x.size < ROW * ROW:  # the last tile: elements may have no partner
        for level in range(5):
            stride = 1 << (level if forward else 4 - level)
            for i in range(x.size - stride):
                if i & stride == 0:
                    a, b = x[i], x[i + stride]
                    x[i], x[i + stride] = (a + b) * C, (a - b) * C
        return
    one, two, half = np.empty(ROW * ROW, f32), np.empty(ROW * ROW, f32), ROW * ROW // 2
    one[:] = x
    for _ in range(5):  # as in fastfood: the lowest bit of the place becomes the highest
        for i in range(half):
            a, b = one[2 * i], one[2 * i + 1]
            two[i], two[half + i] = a + b, a - b
        one, two = two, one
    for _ in range(4):  # five more turns and every element is back
        for i in range(half):
            two[i], two[half + i] = one[2 * i], one[2 * i + 1]
        one, two = two, one
    for i in range(half):
        x[i], x[half + i] = one[2 * i] * f32(2**-2.5), one[2 * i + 1] * f32(2**-2.5)


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
    for tile in prange((x.size + ROW * ROW - 1) // (ROW * ROW)):
        _rows_of_tile(x[tile * ROW * ROW : (tile + 1) * ROW * ROW], forward)


@common.kernel
def _long(x, first, size, count):
    """One level of ``count`` segments."""
    for task in prange(count * PIECES):
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


def transform(x: Any, forward: bool) -> None:
    """T x, or Tᵀ x, in place."""
    rows = -(-x.size // ROW)
    levels = (rows - 1).bit_length()
    long = max(0, levels - (SHORT - 1).bit_length())
    first, size = np.zeros(1 << long, np.int64), np.zeros(1 << long, np.int64)
    size[0] = rows
    segments = []
    for level in range(long):
        segments.append((first.copy(), size.copy(), 1 << level))
        _halve.py_func(first, size, 1 << level)
    steps = [
        (_inside, (x, forward)),
        *((_long, (x, *level)) for level in segments),
        (_all_short, (x, first, size, levels - long, forward)),
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
def _sign(x, first, out, widths, address):
    """out_i = ±x_i, with the signs of the rows from ``first`` on."""
    stop = first + x.size
    for tile in prange(first // TILE, (stop + TILE - 1) // TILE):
        words, signs = np.empty((TILE // 128, 4), np.uint32), np.empty(TILE, np.uint32)
        base = int64(tile) * TILE
        sequence(words, base // 128, TILE // 128, 0, address)
        flat = words.ravel()
        for k in range(flat.size):
            for bit in range(widths[3]):
                signs[k * 32 + bit] = (flat[k] << uint32(31 - bit)) & SIGN
        for i in range(max(first, base), min(stop, base + TILE)):
            out[i - first] = as_float(as_bits(x[i - first]) ^ signs[i - base])


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
    _sign(rows, start, rows, common.widths(p.out_dim), common.address(p, step))
    return torch.from_numpy(rows)


def rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g."""
    if p.out_dim > 1 << 32:
        return p._rmatvec(g, step, start, stop)
    common.threads(8 * p.out_dim)
    x = np.zeros(p.out_dim, f32)
    _sign(g.numpy(), start, x[start:stop], common.widths(p.out_dim), common.address(p, step))
    transform(x, forward=False)
    return torch.from_numpy(x[_chosen(p, step)])
