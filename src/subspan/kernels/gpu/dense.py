"""Families of independent entries: ``gaussian``, ``sparse-original`` and ``sparse2``.

One pair of kernels for all: a family is a device function that makes the entries of eight rows (an
octet) in one column, times a scale that the products apply at the end. Rows of an octet are
registers of one thread, and what a thread multiplies with is read once for eight entries.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from subspan.kernels import Kernel
from subspan.kernels.gpu.draws import flip, normal_pair, philox
from subspan.kernels.gpu.launch import Case, counter, kernel, word

OCTETS = 32  # octets of a program of P w: one per thread of a warp
WARPS = 8  # whose columns are dealt to so many warps
COLUMNS = 128  # columns of a program of Pᵀ g: one per thread
PROGRAMS = 2048  # programs of Pᵀ g that are wanted; the device has room for about as many
LEAST = 16  # octets of a chunk
RUN = tl.constexpr(32)  # terms in a row before they are added to the sum: errors grow slower

_OCTETS, _WARPS, _COLUMNS = (tl.constexpr(c) for c in (OCTETS, WARPS, COLUMNS))


@triton.jit
def gaussian_octet(octet, column, most, step, tag, k0, k1):
    """Standard normals: one call makes eight."""
    a, b, c, d = philox(octet, column, step, tag, k0, k1)
    z0, z1 = normal_pair(a)
    z2, z3 = normal_pair(b)
    z4, z5 = normal_pair(c)
    z6, z7 = normal_pair(d)
    return z0, z1, z2, z3, z4, z5, z6, z7


@triton.jit
def _quad(call, column, most, step, tag, k0, k1, SIGNS: tl.constexpr):
    a, b, c, d = philox(call, column, step, tag, k0, k1)
    x0, x1 = (a <= most).to(tl.float32), (b <= most).to(tl.float32)
    x2, x3 = (c <= most).to(tl.float32), (d <= most).to(tl.float32)
    if SIGNS:
        x0, x1, x2, x3 = flip(x0, a << 31), flip(x1, b << 31), flip(x2, c << 31), flip(x3, d << 31)
    return x0, x1, x2, x3


@triton.jit
def signed_octet(octet, column, most, step, tag, k0, k1):
    """Draw signs where a word is at most ``most``, else 0: a word for each entry, two calls."""
    x0, x1, x2, x3 = _quad(octet * 2, column, most, step, tag, k0, k1, True)
    x4, x5, x6, x7 = _quad(octet * 2 + 1, column, most, step, tag, k0, k1, True)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def positive_octet(octet, column, most, step, tag, k0, k1):
    """Draw ones where a word is at most ``most``, else 0: a word for each entry, two calls."""
    x0, x1, x2, x3 = _quad(octet * 2, column, most, step, tag, k0, k1, False)
    x4, x5, x6, x7 = _quad(octet * 2 + 1, column, most, step, tag, k0, k1, False)
    return x0, x1, x2, x3, x4, x5, x6, x7


@kernel
def _matvec(w, out, d, n, first, lead, trips, most, step, tag, k0, k1, ENTRIES: tl.constexpr):
    """Eight rows per lane, columns dealt to the warps; ``lead`` rows of the first octet are cut."""
    lane = tl.program_id(0).to(tl.int64) * _OCTETS + tl.arange(0, _OCTETS)
    octet = first.to(tl.uint32) + lane.to(tl.uint32)[None, :]
    column = tl.arange(0, _WARPS).to(tl.uint32)[:, None]
    most = most.to(tl.uint32)
    zero = tl.zeros((_WARPS, _OCTETS), tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
    for done in range(0, trips, RUN):
        a0, a1, a2, a3, a4, a5, a6, a7 = zero, zero, zero, zero, zero, zero, zero, zero
        for _ in range(tl.minimum(trips - done, RUN)):
            x = tl.load(w + column, mask=column < d.to(tl.uint32), other=0)
            z0, z1, z2, z3, z4, z5, z6, z7 = ENTRIES(octet, column, most, step, tag, k0, k1)
            a0, a1, a2, a3 = a0 + z0 * x, a1 + z1 * x, a2 + z2 * x, a3 + z3 * x
            a4, a5, a6, a7 = a4 + z4 * x, a5 + z5 * x, a6 + z6 * x, a7 + z7 * x
            column += _WARPS
        s0, s1, s2, s3 = s0 + a0, s1 + a1, s2 + a2, s3 + a3
        s4, s5, s6, s7 = s4 + a4, s5 + a5, s6 + a6, s7 + a7
    row = lane * 8 - lead
    _store(out, row, s0, n)
    _store(out, row + 1, s1, n)
    _store(out, row + 2, s2, n)
    _store(out, row + 3, s3, n)
    _store(out, row + 4, s4, n)
    _store(out, row + 5, s5, n)
    _store(out, row + 6, s6, n)
    _store(out, row + 7, s7, n)


@triton.jit
def _store(out, row, sums, n):
    tl.store(out + row, tl.sum(sums, axis=0), mask=(row >= 0) & (row < n))


@triton.jit
def _row(g, K: tl.constexpr, row, n, CUT: tl.constexpr):
    return tl.load(g + K, mask=(row + K >= 0) & (row + K < n), other=0) if CUT else tl.load(g + K)


@triton.jit
def _run(
    g, row, n, count, octet, column, most, step, tag, k0, k1,
    ENTRIES: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Sums over ``count`` octets, the first of which begins at ``row`` of the range."""
    g += row
    a = tl.zeros(column.shape, tl.float32)
    b = a
    for _ in range(count):
        z0, z1, z2, z3, z4, z5, z6, z7 = ENTRIES(octet, column, most, step, tag, k0, k1)
        a, b = a + z0 * _row(g, 0, row, n, CUT), b + z1 * _row(g, 1, row, n, CUT)
        a, b = a + z2 * _row(g, 2, row, n, CUT), b + z3 * _row(g, 3, row, n, CUT)
        a, b = a + z4 * _row(g, 4, row, n, CUT), b + z5 * _row(g, 5, row, n, CUT)
        a, b = a + z6 * _row(g, 6, row, n, CUT), b + z7 * _row(g, 7, row, n, CUT)
        octet += 1
        row += 8
        g += 8
    return a + b


@kernel
def _rmatvec(g, out, d, n, first, lead, trips, most, step, tag, k0, k1, ENTRIES: tl.constexpr):
    """A column per lane, one chunk of octets: sums of chunk c in row c of ``out``."""
    column = tl.program_id(0).to(tl.uint32) * _COLUMNS + tl.arange(0, _COLUMNS).to(tl.uint32)
    chunk = tl.program_id(1).to(tl.int64)
    most = most.to(tl.uint32)
    octet = first.to(tl.uint32) + (chunk * trips).to(tl.uint32)
    row = chunk * trips * 8 - lead
    total = tl.zeros((_COLUMNS,), tl.float32)
    for done in range(0, trips, RUN):
        count = tl.minimum(trips - done, RUN)
        if (row >= 0) & (row + count * 8 <= n):
            total += _run(g, row, n, count, octet, column, most, step, tag, k0, k1, ENTRIES, False)
        else:  # at the ends of the range: each row has to be looked at
            total += _run(g, row, n, count, octet, column, most, step, tag, k0, k1, ENTRIES, True)
        octet += RUN
        row += 8 * RUN
    tl.store(out + chunk * d + column, total, mask=column < d.to(tl.uint32))


def products(entries: Any, parameters: Any) -> Kernel:
    """Both products of a family from its octets, and from (``most``, scale) of a projection."""

    def matvec(p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        first, out = start // 8, w.new_empty(stop - start)
        octets = -(-stop // 8) - first
        trips = -(-p.in_dim // WARPS)
        most, scale = parameters(p)
        arguments = out, p.in_dim, stop - start, first, start % 8, trips, word(most)
        _matvec[(-(-octets // OCTETS),)](
            w * scale, *arguments, *counter(p, step), entries, num_warps=WARPS
        )
        return out

    def rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        first = start // 8
        octets = -(-stop // 8) - first
        tiles = -(-p.in_dim // COLUMNS)
        trips = max(LEAST, -(-octets * tiles // PROGRAMS))
        chunks = -(-octets // trips)
        partial = g.new_empty(chunks, p.in_dim)
        most, scale = parameters(p)
        arguments = partial, p.in_dim, stop - start, first, start % 8, trips, word(most)
        _rmatvec[(tiles, chunks)](
            g, *arguments, *counter(p, step), entries, num_warps=COLUMNS // 32
        )
        return partial.sum(dim=0) * scale

    return Kernel(matvec, rmatvec)


def _gaussian(p: Any) -> tuple[int, float]:
    return 0, 1 / math.sqrt(p.out_dim)


def _threshold(p: Any) -> tuple[int, float]:
    return p.threshold - 1, 1 / p.divisor


KERNELS = {
    "gaussian": products(gaussian_octet, _gaussian),
    "sparse-original": products(signed_octet, _threshold),
    "sparse2": products(positive_octet, _threshold),
}


# A test compiles these without a GPU.
CASES: list[Case] = [
    (product, warps, {}, {"ENTRIES": octet})
    for product, warps in ((_matvec, WARPS), (_rmatvec, COLUMNS // 32))
    for octet in (gaussian_octet, signed_octet, positive_octet)
]
