"""``sparse`` and ``sparse2full``: one nonzero in every s rows of a column, four of one call.

Pᵀ g gathers. P w scatters: into registers, while s is small, a thread having the rows of four
blocks; else with atomics whose order does not count (:mod:`subspan.kernels.gpu.fixed`).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from subspan.kernels import Kernel
from subspan.kernels.gpu.draws import flip, philox
from subspan.kernels.gpu.fixed import Sums, deposit
from subspan.kernels.gpu.launch import Case, counter, kernel

NARROW = 16  # rows of a block that fit into registers four times
CALLS = 32  # calls, of four blocks, of a program: one per thread of a warp
WARPS = 8  # whose columns are dealt to so many warps
COLUMNS = 128  # columns of the other programs: one per thread
PROGRAMS = 2048  # programs that are wanted
LEAST = 16  # calls of a chunk
SLAB = 1 << 22  # rows whose sums in fixed point exist at once: below 2¹⁶ calls, as a grid takes


@triton.jit
def _length(block, s, size):
    """The rows of a block of s: fewer in the last one, none behind it."""
    left = tl.maximum(size - block * s, 0)
    return tl.minimum(left, s.to(tl.int64)).to(tl.uint32)


@triton.jit
def _place(word, length):
    """The nonzero's row in its block of ``length``: (word div 2) · length div 2³¹."""
    return tl.umulhi(word & 0xFFFFFFFE, length)


@triton.jit
def _select(sums, rows, word, length, x):
    place = _place(word, length).to(tl.int32)
    return sums + tl.where(rows == place, flip(x, word << 31), 0)


@triton.jit
def _store(out, sums, rows, block, s, length, start, n):
    row = block * s + rows - start
    mask = (rows < length.to(tl.int32)) & (row >= 0) & (row < n)
    tl.store(out + row, tl.sum(sums, axis=1)[:, None, :], mask=mask)


@kernel
def _narrow(
    w, out, n, d, first, start, trips, s, size, step, tag, k0, k1,
    ROWS: tl.constexpr, CALLS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """P w: the rows of four blocks per lane, columns dealt to the warps."""
    call = first.to(tl.int64) + tl.program_id(0).to(tl.int64) * CALLS
    call = (call + tl.arange(0, CALLS))[None, None, :]
    block = call * 4
    rows = tl.arange(0, ROWS)[:, None, None]
    column = tl.arange(0, WARPS).to(tl.uint32)[None, :, None]
    l0, l1 = _length(block, s, size), _length(block + 1, s, size)
    l2, l3 = _length(block + 2, s, size), _length(block + 3, s, size)
    zero = tl.zeros((ROWS, WARPS, CALLS), tl.float32)
    s0, s1, s2, s3 = zero, zero, zero, zero
    for _ in range(trips):
        x = tl.load(w + column, mask=column < d.to(tl.uint32), other=0)
        a, b, c, e = philox(call, column, step, tag, k0, k1)
        s0, s1 = _select(s0, rows, a, l0, x), _select(s1, rows, b, l1, x)
        s2, s3 = _select(s2, rows, c, l2, x), _select(s3, rows, e, l3, x)
        column += WARPS
    _store(out, s0, rows, block, s, l0, start, n)
    _store(out, s1, rows, block + 1, s, l1, start, n)
    _store(out, s2, rows, block + 2, s, l2, start, n)
    _store(out, s3, rows, block + 3, s, l3, start, n)


@triton.jit
def _row(word, block, s, size, start):
    """The nonzero's row, counted from ``start``; of blocks behind the last, one behind the last."""
    return block * s - start + _place(word, _length(block, s, size)).to(tl.int64)


@triton.jit
def _scatter(sums, marks, x, word, block, s, size, start, n, scale, mask):
    row = _row(word, block, s, size, start)
    deposit(sums, marks, row, flip(x, word << 31), scale, mask & (row >= 0) & (row < n))


@kernel
def _wide(
    w, sums, marks, scale, n, d, first, start, s, size, step, tag, k0, k1, COLUMNS: tl.constexpr
):
    """P w: a call per program, a column per lane."""
    call = first.to(tl.int64) + tl.program_id(1)
    column = tl.program_id(0).to(tl.uint32) * COLUMNS + tl.arange(0, COLUMNS).to(tl.uint32)
    mask = column < d.to(tl.uint32)
    x = tl.load(w + column, mask=mask, other=0)
    scale = tl.load(scale)
    a, b, c, e = philox(call, column, step, tag, k0, k1)
    _scatter(sums, marks, x, a, call * 4, s, size, start, n, scale, mask)
    _scatter(sums, marks, x, b, call * 4 + 1, s, size, start, n, scale, mask)
    _scatter(sums, marks, x, c, call * 4 + 2, s, size, start, n, scale, mask)
    _scatter(sums, marks, x, e, call * 4 + 3, s, size, start, n, scale, mask)


@triton.jit
def _gather(g, word, block, s, size, start, n):
    row = _row(word, block, s, size, start)
    return flip(tl.load(g + row, mask=(row >= 0) & (row < n), other=0), word << 31)


@kernel
def _rmatvec(g, out, n, d, first, start, trips, s, size, step, tag, k0, k1, COLUMNS: tl.constexpr):
    """Pᵀ g: a column per lane, one chunk of calls: sums of chunk c in row c of ``out``."""
    column = tl.program_id(0).to(tl.uint32) * COLUMNS + tl.arange(0, COLUMNS).to(tl.uint32)
    chunk = tl.program_id(1).to(tl.int64)
    call = first.to(tl.int64) + chunk * trips
    total = tl.zeros((COLUMNS,), tl.float32)
    for _ in range(trips):
        a, b, c, e = philox(call, column, step, tag, k0, k1)
        x = _gather(g, a, call * 4, s, size, start, n)
        x += _gather(g, b, call * 4 + 1, s, size, start, n)
        y = _gather(g, c, call * 4 + 2, s, size, start, n)
        y += _gather(g, e, call * 4 + 3, s, size, start, n)
        total += x + y
        call += 1
    tl.store(out + chunk * d + column, total, mask=column < d.to(tl.uint32))


def _calls(p: Any, start: int, stop: int) -> tuple[int, int]:
    """The first call of rows start … stop−1, and how many there are."""
    first = start // (4 * p.run)
    return first, -(-stop // (4 * p.run)) - first


def matvec(p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Rows of P w."""
    out, shared = w.new_empty(stop - start), (p.run, p.out_dim, *counter(p, step))
    if p.run <= NARROW:
        first, calls = _calls(p, start, stop)
        sizes = stop - start, p.in_dim, first, start, -(-p.in_dim // WARPS)
        tile = 1 << (p.run - 1).bit_length(), CALLS, WARPS
        _narrow[(-(-calls // CALLS),)](w, out, *sizes, *shared, *tile, num_warps=WARPS)
        return out * p.magnitude
    for begin in range(start, stop, SLAB):
        end = min(begin + SLAB, stop)
        first, calls = _calls(p, begin, end)
        sums = Sums.of(w, end - begin, p.in_dim)
        room, slab = (sums.sums, sums.marks, sums.scale), (end - begin, p.in_dim, first, begin)
        grid = -(-p.in_dim // COLUMNS), calls
        _wide[grid](w, *room, *slab, *shared, COLUMNS, num_warps=COLUMNS // 32)
        out[begin - start : end - start] = sums.total() * p.magnitude
    return out


def rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g."""
    first, calls = _calls(p, start, stop)
    tiles = -(-p.in_dim // COLUMNS)
    trips = max(LEAST, -(-calls * tiles // PROGRAMS))
    chunks = -(-calls // trips)
    partial = g.new_empty(chunks, p.in_dim)
    sizes = stop - start, p.in_dim, first, start, trips, p.run, p.out_dim
    _rmatvec[(tiles, chunks)](
        g, partial, *sizes, *counter(p, step), COLUMNS, num_warps=COLUMNS // 32
    )
    return partial.sum(dim=0) * p.magnitude


KERNELS = {name: Kernel(matvec, rmatvec) for name in ("sparse", "sparse2full")}


# A test compiles these without a GPU.
CASES: list[Case] = [
    *((_narrow, 8, {}, {"ROWS": r, "CALLS": 32, "WARPS": 8}) for r in (1, 4, 16)),
    (_wide, 4, {"scale": "*fp64"}, {"COLUMNS": 128}),
    (_rmatvec, 4, {}, {"COLUMNS": 128}),
]
