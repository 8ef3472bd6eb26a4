"""``rademacher``: a table holds the 16 signed sums of every four elements of the vector.

Flipping a sign takes a shift, an exclusive or and an addition; looking up four flipped and summed
elements by four bits takes a shift, a mask, a load from the nearest cache and an addition. In Pᵀ g
the four bits are rows of one column, neighbours in a word. In P w they are one row of four columns:
four words are transposed in groups of 4 × 4 bits, for which 16 instructions make 128 of them.

Threads of a warp look into one table at a time (16 floats, half a cache line), so that their loads
never conflict: in Pᵀ g they are columns, in P w blocks of 128 rows.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from subspan.kernels import Kernel
from subspan.kernels.gpu.draws import philox
from subspan.kernels.gpu.launch import Case, counter, kernel

BLOCKS = 32  # blocks of 128 rows of a program of P w: one per thread of a warp
WARPS = 4  # whose groups of four columns are dealt to so many warps
COLUMNS = 128  # columns of a program of Pᵀ g: one per thread
PROGRAMS = 1024  # programs that are wanted
GROUPS = 64  # groups of four elements of a program that fills the table
SLAB = 1 << 20  # elements whose table exists at once: it is four times as large


@kernel
def _table(x, out, n, lead, GROUPS: tl.constexpr):
    """out[group, bits] = Σ ±x over four elements; ``lead`` zeros stand before x, zeros behind."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    bits = tl.arange(0, 16)[None, :]
    s0 = _signed(x, group * 4 - lead, n, bits, 0) + _signed(x, group * 4 - lead, n, bits, 1)
    s1 = _signed(x, group * 4 - lead, n, bits, 2) + _signed(x, group * 4 - lead, n, bits, 3)
    tl.store(out + group * 16 + bits, s0 + s1)


@triton.jit
def _signed(x, place, n, bits, BIT: tl.constexpr):
    value = tl.load(x + place + BIT, mask=(place + BIT >= 0) & (place + BIT < n), other=0)
    return tl.where((bits >> BIT) & 1 == 0, value, -value)


@triton.jit
def _swap(a, b, MASK: tl.constexpr, SHIFT: tl.constexpr):
    """Exchanges the unmasked bits of ``a`` with the masked bits of ``b``."""
    return (a & MASK) | ((b & MASK) << SHIFT), ((a >> SHIFT) & MASK) | (b & (MASK << SHIFT))


@triton.jit
def _look(table, words, shift, entry):
    """Sums by four bits, in the table of 64 bytes that begins ``entry`` floats from ``table``."""
    # A table is aligned, so that its address is joined with an offset by one instruction.
    offset = (((words >> shift) & 15) << 2).to(tl.int64)
    return tl.load((table.to(tl.int64) | offset).to(tl.pointer_type(tl.float32)) + entry)


@triton.jit
def _add(table, shift, x0, x1, x2, x3, s0, s1, s2, s3):
    """Adds four columns to the sums of 32 rows: row 4q + p is element q of sum number p."""
    x0, x1 = _swap(x0, x1, 0x55555555, 1)
    x2, x3 = _swap(x2, x3, 0x55555555, 1)
    x0, x2 = _swap(x0, x2, 0x33333333, 2)
    x1, x3 = _swap(x1, x3, 0x33333333, 2)
    s0, s1 = s0 + _look(table, x0, shift, 0), s1 + _look(table, x1, shift, 0)
    s2, s3 = s2 + _look(table, x2, shift, 0), s3 + _look(table, x3, shift, 0)
    return s0, s1, s2, s3


@kernel
def _matvec(
    table, out, n, first, lead, trips, column, step, tag, k0, k1,
    BLOCKS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """128 rows per lane; sums over the groups of columns of split c in row c of ``out``."""
    lane = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    split = tl.program_id(1).to(tl.int64)
    block = (first.to(tl.uint32) + lane.to(tl.uint32))[None, None, :]
    shift = (tl.arange(0, 8) * 4).to(tl.uint32)[:, None, None]
    group = (split * trips * WARPS + tl.arange(0, WARPS))[None, :, None]
    zero = tl.zeros((8, WARPS, BLOCKS), tl.float32)
    a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, zero, zero, zero, zero
    c0, c1, c2, c3, d0, d1, d2, d3 = zero, zero, zero, zero, zero, zero, zero, zero
    for _ in range(trips):
        j = column.to(tl.uint32) + group.to(tl.uint32) * 4
        p0, q0, r0, t0 = philox(block, j, step, tag, k0, k1)
        p1, q1, r1, t1 = philox(block, j + 1, step, tag, k0, k1)
        p2, q2, r2, t2 = philox(block, j + 2, step, tag, k0, k1)
        p3, q3, r3, t3 = philox(block, j + 3, step, tag, k0, k1)
        here = table + group * 16
        a0, a1, a2, a3 = _add(here, shift, p0, p1, p2, p3, a0, a1, a2, a3)
        b0, b1, b2, b3 = _add(here, shift, q0, q1, q2, q3, b0, b1, b2, b3)
        c0, c1, c2, c3 = _add(here, shift, r0, r1, r2, r3, c0, c1, c2, c3)
        d0, d1, d2, d3 = _add(here, shift, t0, t1, t2, t3, d0, d1, d2, d3)
        group += WARPS
    row = lane[None, :] * 128 + tl.arange(0, 8)[:, None] * 4 - lead
    out += split * n
    _store(out, row, a0, a1, a2, a3, n)
    _store(out, row + 32, b0, b1, b2, b3, n)
    _store(out, row + 64, c0, c1, c2, c3, n)
    _store(out, row + 96, d0, d1, d2, d3, n)


@triton.jit
def _store(out, row, s0, s1, s2, s3, n):
    tl.store(out + row, tl.sum(s0, axis=1), mask=(row >= 0) & (row < n))
    tl.store(out + row + 1, tl.sum(s1, axis=1), mask=(row + 1 >= 0) & (row + 1 < n))
    tl.store(out + row + 2, tl.sum(s2, axis=1), mask=(row + 2 >= 0) & (row + 2 < n))
    tl.store(out + row + 3, tl.sum(s3, axis=1), mask=(row + 3 >= 0) & (row + 3 < n))


@kernel
def _rmatvec(table, out, d, first, trips, blocks, step, tag, k0, k1, COLUMNS: tl.constexpr):
    """A column per lane; sums over the blocks of rows of chunk c in row c of ``out``."""
    column = tl.program_id(0).to(tl.uint32) * COLUMNS + tl.arange(0, COLUMNS).to(tl.uint32)
    chunk = tl.program_id(1).to(tl.int64)
    q = tl.arange(0, 8)[:, None]
    shift, entry = (q * 4).to(tl.uint32), q * 16
    block = chunk * trips
    sums = tl.zeros((8, COLUMNS), tl.float32)
    for _ in range(tl.minimum(blocks - block, trips)):
        a, b, c, e = philox(
            first.to(tl.uint32) + block.to(tl.uint32), column[None, :], step, tag, k0, k1
        )
        here = table + block * 512
        s = _look(here, a, shift, entry) + _look(here, b, shift, entry + 128)
        t = _look(here, c, shift, entry + 256) + _look(here, e, shift, entry + 384)
        sums += s + t
        block += 1
    tl.store(out + chunk * d + column, tl.sum(sums, axis=0), mask=column < d.to(tl.uint32))


def table(x: Tensor, lead: int, groups: int) -> Tensor:
    """Signed sums of at least ``groups`` groups of four of: ``lead`` zeros, ``x``, zeros."""
    programs = -(-groups // GROUPS)
    out = x.new_empty(programs * GROUPS * 16)
    _table[(programs,)](x, out, x.numel(), lead, GROUPS)
    return out


def matvec(p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Rows of P w."""
    n, first = stop - start, start // 128
    tiles = -(-(-(-stop // 128) - first) // BLOCKS)
    out = w.new_empty(n)
    for column in range(0, p.in_dim, SLAB):
        x = w[column : column + SLAB] / math.sqrt(p.out_dim)
        warps = -(-x.numel() // (4 * WARPS))  # groups of a warp if columns are not split
        trips = -(-warps // min(warps, -(-PROGRAMS // tiles)))
        splits = -(-warps // trips)
        # Few rows leave most of the device idle: then columns are split. The sums of the splits are
        # no more than a device full of programs holds.
        partial = out if splits == 1 and column == 0 else w.new_empty(splits, n)
        sums, sizes = table(x, 0, splits * trips * WARPS), (n, first, start % 128, trips, column)
        _matvec[(tiles, splits)](
            sums, partial, *sizes, *counter(p, step), BLOCKS, WARPS, num_warps=WARPS
        )
        if partial is not out:
            total = partial.sum(dim=0)
            out = total if column == 0 else out.add_(total)
    return out


def rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g."""
    tiles = -(-p.in_dim // COLUMNS)
    out = g.new_zeros(p.in_dim)
    for first in range(start // 128, -(-stop // 128), SLAB // 128):
        lead = max(0, start - first * 128)
        x = g[max(0, first * 128 - start) : first * 128 + SLAB - start]
        blocks = -(-(lead + x.numel()) // 128)
        trips = -(-blocks * tiles // PROGRAMS)
        chunks = -(-blocks // trips)
        partial = g.new_empty(chunks, p.in_dim)
        sums, sizes = table(x, lead, blocks * 32), (p.in_dim, first, trips, blocks)
        _rmatvec[(tiles, chunks)](
            sums, partial, *sizes, *counter(p, step), COLUMNS, num_warps=COLUMNS // 32
        )
        out += partial.sum(dim=0)
    return out / math.sqrt(p.out_dim)


KERNELS = {"rademacher": Kernel(matvec, rmatvec)}


# A test compiles these without a GPU.
CASES: list[Case] = [
    (_table, 4, {}, {"GROUPS": 64}),
    (_matvec, 4, {}, {"BLOCKS": 32, "WARPS": 4}),
    (_rmatvec, 4, {}, {"COLUMNS": 128}),
]
