"""``hash``: both products follow an index of the rows, which is made where it is used.

A tile of rows lies in one block of the shuffle, whose rounds run over all of its lanes at once. The
index of a small matrix is kept between calls, where making it takes longer than following it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import int64, prange, uint32, uint64
from torch import Tensor

from subspan.cache import cache
from subspan.kernels.cpu import common
from subspan.kernels.cpu.common import (
    SIGN,
    add_signs,
    as_bits,
    as_float,
    floats_at,
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
TASKS = 64  # of Pᵀ g at most, each with sums of its own
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
def _index(out, signs, tile, size, d, widths, address):
    """Bucket, and in the highest bit the sign, of a tile's rows; ``signs`` is room of (8, 4)."""
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
                _index(index, signs, tile, size, d, widths, address)
                out[first - start : last - start] = index[first - tile * TILE : last - tile * TILE]


@inline
def _scale(out, x, size):
    """out_b = x_b/√n_b: the root and the quotient in float64, then float32 (docs/format.md)."""
    more = size % x.size  # the first so many buckets hold one row more
    large = np.float32(1.0 / np.sqrt(float(size // x.size + 1)))
    small = np.float32(1.0 / np.sqrt(float(size // x.size)))
    for bucket in range(x.size):
        out[bucket] = x[bucket] * (large if bucket < more else small)


@inline
def _piece(addresses, bounds, row):
    """Which of several vectors, laid end to end, holds a row."""
    n = 0
    while bounds[n + 1] <= row:
        n += 1
    return n


@common.kernel
def _matvec(w, addresses, bounds, start, out, kept, size, widths, address):
    """out_i = ±w_b/√n_b, added to vectors laid end to end if there are any.

    The index is kept, or made here. Vectors are given by their addresses, and ``bounds`` are the
    rows at which they begin, counted from ``start``.
    """
    stop = start + out.size
    table = np.empty(w.size, np.float32)
    _scale(table, w, size)
    for task in prange(start // TASK, (stop + TASK - 1) // TASK):
        widest()
        index, signs = np.empty(TILE, np.uint32), np.empty((TILE // 128, 4), np.uint32)
        found = np.empty(TILE, np.float32)
        for tile in range(int64(task) * TASK // TILE, int64(task + 1) * TASK // TILE):
            first, last = max(start, tile * TILE), min(stop, (tile + 1) * TILE)
            if first >= last:
                continue
            if kept.size:
                words = kept[first - start : last - start]
            else:
                _index(index, signs, tile, size, table.size, widths, address)
                words = index[first - tile * TILE : last - tile * TILE]
            for i in range(last - first):
                found[i] = table[words[i] & ~SIGN]
            for i in range(last - first):
                found[i] = as_float(as_bits(found[i]) ^ uint32(words[i] & SIGN))
            done, stopped = first - start, last - start
            if not addresses.size:
                out[done:stopped] = found[: last - first]
            while addresses.size and done < stopped:
                n = _piece(addresses, bounds, done)
                until, place = min(stopped, bounds[n + 1]), done - (first - start)
                base = floats_at(addresses[n], bounds[n + 1] - bounds[n])
                own, rows = base[done - bounds[n] : until - bounds[n]], out[done:until]
                along = found[place : place + rows.size]
                for i in range(rows.size):
                    rows[i] = own[i] + along[i]
                done = until


@common.kernel
def _rmatvec(addresses, bounds, start, total, partial, chunk, kept, size, widths, address):
    """total[bucket] = Σ ±g_i /√n_b; every task first sums its rows into partial[task].

    g are vectors laid end to end, as of :func:`_matvec`.
    """
    stop = start + bounds[-1]
    begin, end, d = start // TILE, (stop + TILE - 1) // TILE, total.size
    for task in prange(len(partial)):
        sums = partial[task]
        sums[:] = 0
        widest()
        index, signs = np.empty(TILE, np.uint32), np.empty((TILE // 128, 4), np.uint32)
        signed = np.empty(TILE, np.float32)
        for tile in range(begin + task * chunk, min(end, begin + (task + 1) * chunk)):
            first, last = max(start, tile * TILE), min(stop, (tile + 1) * TILE)
            if kept.size:
                words = kept[first - start : last - start]
            else:
                _index(index, signs, tile, size, d, widths, address)
                words = index[first - tile * TILE : last - tile * TILE]
            done, stopped = first - start, last - start
            while done < stopped:
                n = _piece(addresses, bounds, done)
                until = min(stopped, bounds[n + 1])
                g = floats_at(addresses[n], bounds[n + 1] - bounds[n])
                rows, place = g[done - bounds[n] : until - bounds[n]], done - (first - start)
                part, own = signed[place : place + rows.size], words[place : place + rows.size]
                for i in range(rows.size):
                    part[i] = as_float(as_bits(rows[i]) ^ uint32(own[i] & SIGN))
                done = until
            for i in range(last - first):
                sums[words[i] & ~SIGN] += signed[i]
    total[:] = 0
    for task in range(len(partial)):
        for bucket in range(d):
            total[bucket] += partial[task, bucket]
    _scale(total, total, size)


def _arguments(p: Any, step: Tensor, start: int, stop: int) -> tuple[Any, ...]:
    """The index that is kept, and from what it is made."""
    made_of, number = _made_of(p), int(step)
    address = (np.uint32(number), *made_of[2])

    def build() -> tuple[Any]:
        index = np.empty(stop - start, np.uint32)
        common.threads(4 * index.size)
        _fill(index, start, p.in_dim, *made_of[:2], address)
        return (index,)

    if 4 * p.out_dim > common.KEPT or number:  # a basis that is drawn again is used twice
        return NOTHING, *made_of[:2], address
    (index,) = cache.get(("hash", p, start, stop, "numba"), build)
    return index, *made_of[:2], address


@functools.lru_cache(maxsize=4096)
def _made_of(p: Any) -> tuple[Any, ...]:
    return p.out_dim, common.widths(max(1, p.out_dim % TILE)), common.place(p)


def matvec(p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Rows of P w."""
    return _rows(p, w, common.NO_VECTORS, step, start, torch.empty(stop - start))


def added(
    p: Any, bases: Sequence[Tensor], w: Tensor, step: Tensor, start: int, out: Tensor | None = None
) -> Tensor:
    """Rows of θ₀ + P w from ``start`` on, for vectors of θ₀ laid end to end; ``out`` may be θ₀."""
    vectors = common.vectors(bases)
    out = torch.empty(int(vectors[1][-1])) if out is None else out
    return _rows(p, w, vectors, step, start, out)


def _rows(p: Any, w: Tensor, bases: Any, step: Tensor, start: int, out: Tensor) -> Tensor:
    arguments = _arguments(p, step, start, start + out.numel())
    common.threads(2 * out.numel())
    _matvec(w.numpy(), *bases, start, out.numpy(), *arguments)
    return out


def rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g."""
    return gathered(p, (g,), step, start)


def gathered(p: Any, parts: Sequence[Tensor], step: Tensor, start: int) -> Tensor:
    """Pᵀ g for the rows from ``start`` on, for vectors of g laid end to end."""
    # The number of tasks depends on sizes alone, and their sums stay below a sixteenth of g; it is
    # a power of 2, as the number of threads mostly is.
    addresses, bounds = common.vectors(parts)
    stop = start + int(bounds[-1])
    tiles = -(-stop // TILE) - start // TILE
    tasks = min(TASKS, max(1, (stop - start) // (16 * p.in_dim)), tiles)
    chunk = -(-tiles // (1 << (tasks.bit_length() - 1)))
    partial = np.empty((-(-tiles // chunk), p.in_dim), np.float32)
    total = torch.empty(p.in_dim)
    arguments = _arguments(p, step, start, stop)
    common.threads(2 * (stop - start))
    _rmatvec(addresses, bounds, start, total.numpy(), partial, chunk, *arguments)
    return total
