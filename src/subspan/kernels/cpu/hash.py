"""``hash``: both products follow an index of the rows, which is made where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import int64, prange, uint32
from torch import Tensor

from subspan.kernels import Kernel
from subspan.kernels.cpu import common
from subspan.kernels.cpu.common import as_bits, as_float, floats_at, inline, widest
from subspan.kernels.cpu.hash_index import TASK, TILE, find_index, made_from, write_index

TASKS = 64  # of Pᵀ g at most, each with sums of its own
FEW = 1 << 10  # coordinates whose negatives have places of their own, in the first cache level
FEW_SUMS = 1 << 14  # coordinates that have two sums each, in the second
NOWHERE = np.empty(0, np.int64)


@inline
def _scales(size, d):
    """1/√n_b of the first buckets and of the rest, and how many the first are.

    The root and the quotient are of float64, then rounded to float32 (docs/format.md).
    """
    large = np.float32(1.0 / np.sqrt(float(size // d + 1)))
    return large, np.float32(1.0 / np.sqrt(float(size // d))), size % d


@inline
def _table(w, d, size):
    """±w_b/√n_b where coordinates are few, by the words of the index; else w_b/√n_b."""
    table, (large, small, more) = np.empty(2 * d, np.float32), _scales(size, d)
    for bucket in range(d):
        value = w[bucket] * (large if bucket < more else small)
        if d <= FEW:
            table[2 * bucket], table[2 * bucket + 1] = value, -value
        else:
            table[bucket] = value
    return table


@inline
def _look_up(values, words, table, signed):
    """Rows of P w by their words of the index."""
    if signed:
        for i in range(words.size):
            values[i] = table[words[i]]
    else:
        for i in range(words.size):
            values[i] = table[words[i] >> uint32(1)]
        for i in range(words.size):
            values[i] = _flipped(values[i], words[i])


@inline
def _sum(sums, words, rows, room, signed):
    """Add rows of g to the sums of their buckets."""
    if signed:
        for i in range(rows.size):
            sums[words[i]] += rows[i]
    else:
        values = room[: rows.size]
        for i in range(rows.size):
            values[i] = _flipped(rows[i], words[i])
        for i in range(rows.size):
            sums[words[i] >> uint32(1)] += values[i]


@inline
def _total(out, partial, d, size):
    """Σ ±g_i/√n_b from the sums of all tasks, in their order."""
    large, small, more = _scales(size, d)
    for bucket in range(d):
        out[bucket] = 0
    for task in range(len(partial)):
        sums = partial[task]
        if d <= FEW_SUMS:
            for bucket in range(d):
                out[bucket] += sums[2 * bucket] - sums[2 * bucket + 1]
        else:
            for bucket in range(d):
                out[bucket] += sums[bucket]
    for bucket in range(d):
        out[bucket] *= large if bucket < more else small


@inline
def _piece(bounds, row):
    """The number of the vector, of several laid end to end, that holds a row."""
    n = 0
    while bounds[n + 1] <= row:
        n += 1
    return n


@inline
def _flipped(x, word):
    """A number times the sign of a word of the index."""
    return as_float(as_bits(x) ^ uint32(word << uint32(31)))


@common.kernel
def _matvec(w_at, d, bases, outs, bounds, start, kept, size, widths, address):
    """out_i = ±w_b/√n_b, added to θ₀ if there is any.

    The index is kept, or made here. All vectors are given by their addresses; those of θ₀ and of
    the results are laid end to end, and ``bounds`` are the rows at which they begin, counted from
    ``start``. Of few coordinates, the table holds the negative ones, too.
    """
    stop, signed, table = start + bounds[-1], d <= FEW, _table(floats_at(w_at, d), d, size)
    for task in prange(start // TASK, (stop + TASK - 1) // TASK):
        widest()
        index, signs = np.empty(TILE, np.uint32), np.empty((TILE // 128, 4), np.uint32)
        along = np.empty(TILE, np.float32)
        for tile in range(int64(task) * TASK // TILE, int64(task + 1) * TASK // TILE):
            first, last = max(start, tile * TILE), min(stop, (tile + 1) * TILE)
            if first >= last:
                continue
            if kept.size:
                words = kept[first - start : last - start]
            else:
                write_index(index, signs, tile, size, d, widths, address)
                words = index[first - tile * TILE : last - tile * TILE]
            done, stopped = first - start, last - start
            while done < stopped:
                n = _piece(bounds, done)
                until, place = min(stopped, bounds[n + 1]), done - (first - start)
                out = floats_at(outs[n], bounds[n + 1] - bounds[n])
                rows = out[done - bounds[n] : until - bounds[n]]
                own_words = words[place : place + rows.size]
                if bases.size:
                    _look_up(along, own_words, table, signed)
                    base = floats_at(bases[n], bounds[n + 1] - bounds[n])
                    own = base[done - bounds[n] : until - bounds[n]]
                    for i in range(rows.size):
                        rows[i] = own[i] + along[i]
                else:
                    _look_up(rows, own_words, table, signed)
                done = until


@common.kernel
def _rmatvec(parts, bounds, start, out_at, d, room, chunk, kept, size, widths, address):
    """out[bucket] = Σ ±g_i /√n_b; every task first sums its rows on its own.

    ``room`` is how many tasks there are, and sums of each. g are vectors laid end to end, as of
    :func:`_matvec`. Of few coordinates, what is added and what is subtracted have sums of their
    own.
    """
    stop, signed, out = start + bounds[-1], d <= FEW_SUMS, floats_at(out_at, d)
    begin, end = start // TILE, (stop + TILE - 1) // TILE
    partial = np.empty(room, np.float32)
    for task in prange(room[0]):
        sums = partial[task]
        sums[:] = 0
        widest()
        index, signs = np.empty(TILE, np.uint32), np.empty((TILE // 128, 4), np.uint32)
        values = np.empty(TILE, np.float32)
        for tile in range(begin + task * chunk, min(end, begin + (task + 1) * chunk)):
            first, last = max(start, tile * TILE), min(stop, (tile + 1) * TILE)
            if kept.size:
                words = kept[first - start : last - start]
            else:
                write_index(index, signs, tile, size, d, widths, address)
                words = index[first - tile * TILE : last - tile * TILE]
            done, stopped = first - start, last - start
            while done < stopped:
                n = _piece(bounds, done)
                until, place = min(stopped, bounds[n + 1]), done - (first - start)
                g = floats_at(parts[n], bounds[n + 1] - bounds[n])
                rows = g[done - bounds[n] : until - bounds[n]]
                _sum(sums, words[place : place + rows.size], rows, values, signed)
                done = until
    _total(out, partial, d, size)


@common.kernel
def _matvec_apart(w, d, outs, firsts, size, widths, address):
    """Add rows of P w to each of ``outs``, from a row of its own on."""
    signed, table, width = d <= FEW, _table(w, d, size), outs.shape[1]
    for n in prange(len(outs)):
        widest()
        index, signs = np.empty(TILE, np.uint32), np.empty((TILE // 128, 4), np.uint32)
        along, start, stop = np.empty(TILE, np.float32), firsts[n], firsts[n] + width
        for tile in range(start // TILE, (stop + TILE - 1) // TILE):
            first, last = max(start, tile * TILE), min(stop, (tile + 1) * TILE)
            write_index(index, signs, tile, size, d, widths, address)
            _look_up(along, index[first - tile * TILE : last - tile * TILE], table, signed)
            rows = outs[n, first - start : last - start]
            for i in range(rows.size):
                rows[i] += along[i]


@common.kernel
def _rmatvec_apart(parts, firsts, out, d, room, chunk, size, widths, address):
    """The adjoint of :func:`_matvec_apart`; every task first sums its rows on its own."""
    signed, width = d <= FEW_SUMS, parts.shape[1]
    partial = np.empty(room, np.float32)
    for task in prange(room[0]):
        sums = partial[task]
        sums[:] = 0
        widest()
        index, signs = np.empty(TILE, np.uint32), np.empty((TILE // 128, 4), np.uint32)
        values = np.empty(TILE, np.float32)
        for n in range(task * chunk, min(len(parts), (task + 1) * chunk)):
            start, stop = firsts[n], firsts[n] + width
            for tile in range(start // TILE, (stop + TILE - 1) // TILE):
                first, last = max(start, tile * TILE), min(stop, (tile + 1) * TILE)
                write_index(index, signs, tile, size, d, widths, address)
                rows = parts[n, first - start : last - start]
                _sum(sums, index[first - tile * TILE : last - tile * TILE], rows, values, signed)
    _total(out, partial, d, size)


def matvec(p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Rows of P w."""
    # NumPy asks for huge pages, so that a large result costs few faults; torch.empty does not.
    out = torch.from_numpy(np.empty(stop - start, np.float32))
    _rows(p, w, NOWHERE, [out], step, start)
    return out


def added(
    p: Any, bases: Sequence[Tensor], w: Tensor, step: Tensor, start: int, outs: Sequence[Tensor]
) -> None:
    """Put rows of θ₀ + P w from ``start`` on into ``outs``, for vectors of θ₀ laid end to end."""
    _rows(p, w, common.addresses(bases), outs, step, start)


def _rows(p: Any, w: Tensor, bases: Any, outs: Sequence[Tensor], step: Tensor, start: int) -> None:
    bounds, rows = common.bounds(outs)
    arguments = find_index(p, step, start, start + rows)
    common.threads(2 * rows)
    _matvec(w.data_ptr(), p.in_dim, bases, common.addresses(outs), bounds, start, *arguments)


def rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g."""
    return gathered(p, (g,), step, start)


def gathered(p: Any, parts: Sequence[Tensor], step: Tensor, start: int) -> Tensor:
    """Pᵀ g for the rows from ``start`` on, for vectors of g laid end to end."""
    # The number of tasks depends on sizes alone, and their sums stay below a sixteenth of g; it is
    # a power of 2, as the number of threads mostly is.
    (bounds, rows), d = common.bounds(parts), p.in_dim
    sums = 2 * d if d <= FEW_SUMS else d
    tiles = -(-(start + rows) // TILE) - start // TILE
    tasks = min(TASKS, max(1, rows // (16 * sums)), tiles)
    chunk = -(-tiles // (1 << (tasks.bit_length() - 1)))
    out = torch.empty(d, dtype=torch.float32, device="cpu")
    arguments = find_index(p, step, start, start + rows)
    common.threads(2 * rows)
    places = common.addresses(parts), bounds, start, out.data_ptr()
    _rmatvec(*places, d, (-(-tiles // chunk), sums), chunk, *arguments)
    return out


def added_apart(p: Any, w: Tensor, step: Tensor, firsts: Tensor, outs: Tensor) -> None:
    """Add P w to the vectors ``outs``, (n, width), whose first rows are ``firsts``, (n,)."""
    common.threads(8 * outs.numel())
    _matvec_apart(w.numpy(), p.in_dim, outs.numpy(), firsts.numpy(), *made_from(p, step))


def gathered_apart(p: Any, parts: Tensor, step: Tensor, firsts: Tensor) -> Tensor:
    """Pᵀ g for the vectors ``parts`` of g, (n, width), whose first rows are ``firsts``, (n,)."""
    d, count = p.in_dim, len(parts)
    sums = 2 * d if d <= FEW_SUMS else d
    tasks = min(TASKS, max(1, parts.numel() // (8 * sums)), max(1, count))
    chunk = max(1, -(-count // (1 << (tasks.bit_length() - 1))))
    out = torch.empty(d, dtype=torch.float32, device="cpu")
    common.threads(8 * parts.numel())
    room = -(-count // chunk), sums
    arguments = out.numpy(), d, room, chunk, *made_from(p, step)
    _rmatvec_apart(parts.numpy(), firsts.numpy(), *arguments)
    return out


KERNELS = {"hash": Kernel(matvec, rmatvec, added, gathered, added_apart, gathered_apart)}
