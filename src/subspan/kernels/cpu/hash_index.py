"""The index of the rows of ``hash``: bucket and sign of every row of a tile.

A tile of rows lies in one block of the shuffle, whose rounds run over all of its lanes at once. The
index of a small matrix is kept between calls, where making it takes longer than following it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import int64, prange, uint32, uint64
from torch import Tensor

from subspan.cache import cache
from subspan.kernels.cpu import common
from subspan.kernels.cpu.common import (
    add_signs,
    inline,
    permuted,
    philox,
    round_keys,
    sequence,
    shift_right,
    widest,
)
from subspan.shuffle import KEYS, LARGEST, MULTIPLIERS, SIGNS, SMALLEST, SPAN, TAIL

TILE = 1 << SMALLEST  # rows whose index is made together, in the first cache level
TASK = 16 * TILE  # rows of P w that one task writes
M0, M1, M2, M3 = (np.uint32(m) for m in MULTIPLIERS)
NOTHING = np.empty(0, np.uint32)


@inline
def _round(x, key, multiplier, mask, shift):
    x = uint32(uint32(uint32(x ^ key) * multiplier) & mask)
    return uint32(x ^ shift_right(x, shift))


@inline
def _images(out, x, bits, keys):
    """Images of the rows x, x + 1, … of a block of 2^bits rows, as places in it."""
    mask, shift = uint32((uint64(1) << uint64(bits)) - uint64(1)), uint32((bits + 1) // 2)
    k0, k1, k2, k3 = keys
    for i in range(TILE):
        y = _round(uint32(x + uint32(i)), k0, M0, mask, shift)
        y = _round(y, k1, M1, mask, shift)
        y = _round(y, k2, M2, mask, shift)
        out[i] = _round(y, k3, M3, mask, shift)


@inline
def _modulo(out, offset, d):
    """(x + offset) mod d, for offset < d, by a product.

    With 2^k ≤ d < 2^(k+1), the quotient x ⌊(2^(32+k) − 1)/d⌋ div 2^(32+k) is right or too small by
    one, and then the rest is too large by d; x − d wraps, and is larger than x, if it is right.
    """
    k = 0
    while d >> (k + 1) > 0:
        k += 1
    factor, shift = uint32(((1 << (32 + k)) - 1) // d), uint32(k)
    d, offset = uint32(d), uint32(offset)
    for i in range(TILE):
        high = uint32((uint64(out[i]) * uint64(factor)) >> uint64(32))
        rest = uint32(out[i] - uint32(shift_right(high, shift) * d))
        rest = uint32(min(rest, uint32(rest - d)) + offset)
        out[i] = min(rest, uint32(rest - d))


@inline
def _block(first, size):
    """Number, first row and bits of the block that holds a row; bits 0 of the tail."""
    number = first >> LARGEST
    start, bits = number << LARGEST, LARGEST
    if number == size >> LARGEST:  # no block of 2³² rows is left
        while bits > 0:
            bits -= 1
            if bits < SMALLEST:
                bits = 0
            elif size >> bits & 1:
                if first < start + (1 << bits):
                    break
                start += 1 << bits
                number += 1
    return number, start, bits


@common.function
def write_index(out, signs, tile, size, d, widths, address):
    """2·bucket + [sign is minus] of a tile's rows; ``signs`` is room of (8, 4)."""
    first = tile * TILE
    number, start, bits = _block(first, size)
    if bits:
        _images(out, uint32(first - start), bits, philox(number, KEYS, address))
    else:
        keys, count = round_keys(widths[0], TAIL, address), size - first
        room = np.empty((3, TILE), np.uint32)
        permuted(out, room, 0, count, uint32(count - 1), keys, widths)
        out[count:] = 0
    _modulo(out, start % d, d)
    sequence(signs, first % SPAN // 128, TILE // 128, SIGNS + first // SPAN, address)
    for n in range(TILE // 128):
        for m in range(4):
            add_signs(out, n * 128 + m * 32, signs[n, m])


@common.kernel
def _fill(out, start, d, size, widths, address):
    """The index of the rows from ``start`` on."""
    stop = start + out.size
    for task in prange(start // TASK, (stop + TASK - 1) // TASK):
        widest()
        index, signs = np.empty(TILE, np.uint32), np.empty((TILE // 128, 4), np.uint32)
        for tile in range(int64(task) * TASK // TILE, int64(task + 1) * TASK // TILE):
            first, last = max(start, tile * TILE), min(stop, (tile + 1) * TILE)
            if first < last:
                write_index(index, signs, tile, size, d, widths, address)
                out[first - start : last - start] = index[first - tile * TILE : last - tile * TILE]


def made_from(p: Any, step: Tensor) -> tuple[Any, ...]:
    """Return what an index is made from: the size, widths of the shuffle, and the address."""
    return p.out_dim, common.widths(max(1, p.out_dim % TILE)), common.address(p, step)


def find_index(p: Any, step: Tensor, start: int, stop: int) -> tuple[Any, ...]:
    """Return the index that is kept, or an empty one, and what an index is made from."""
    size, widths, address = made_from(p, step)

    def build() -> tuple[Any]:
        index = np.empty(stop - start, np.uint32)
        common.threads(4 * index.size)
        _fill(index, start, p.in_dim, size, widths, address)
        return (index,)

    if 4 * size > common.KEPT or address[0]:  # a basis that is drawn again is used twice
        return NOTHING, size, widths, address
    (index,) = cache.get(("hash", p.recipe, start, stop, "numba"), build)
    return index, size, widths, address
