"""``hash``: 1024 rows per warp, everything on the fly: a row costs about as much as its place.

A tile of rows is a part of one block of the shuffle, or the whole tail, so that it has one set of
keys, and no row waits for another outside of the tail. The signs of a tile are eight calls of the
generator, which the lanes share. A row takes about 50 instructions of a lane.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from subspan.kernels import Kernel
from subspan.kernels.gpu.draws import flip, permute, philox, pick
from subspan.kernels.gpu.fixed import Sums, deposit
from subspan.kernels.gpu.launch import Case, counter, kernel, word
from subspan.shuffle import KEYS, LARGEST, MULTIPLIERS, SIGNS, SMALLEST, SPAN, TAIL

SPREAD = 1 << 14  # sums of Pᵀ g: few buckets are summed in copies, or all rows would wait for them
TILE = 1 << SMALLEST

_TILE, _LARGEST, _TAIL, _KEYS = (tl.constexpr(c) for c in (TILE, LARGEST, TAIL, KEYS))
_SIGNS, _SPAN = tl.constexpr(SIGNS), tl.constexpr(SPAN.bit_length() - 1)
_M0, _M1, _M2, _M3 = (tl.constexpr(m) for m in MULTIPLIERS)


@triton.jit
def _block(row, size, top):
    """Counts the blocks before that of ``row`` (int64), and gives log₂ of the rows of that one.

    A block of 2^k rows, k < 32, begins at the number of all rows with its bits up to k cleared. So
    k is the highest bit in which row and size differ, and every bit above it that is 1 in both is a
    block before this one. ``top`` is where the search begins: the bits of size, at most 32.
    """
    number = row >> _LARGEST
    bits = top.to(tl.int64)
    while (row ^ size) >> bits == 0:
        bits -= 1
        number += (row >> bits) & 1
    return number, bits


@triton.jit
def _round(x, key, multiplier, mask, shift):
    """Does one round of the shuffle, on uint32."""
    x = ((x ^ key) * multiplier) & mask
    return x ^ (x >> shift)


@triton.jit
def _image(row, inside, size, top, step, tag, k0, k1, BITS: tl.constexpr):
    """Finds the places of the tile's rows in the block or tail that they are in, and its start."""
    if row + _TILE > size:  # only the tail is no whole tile
        last = (size - row - 1).to(tl.int32)
        column = tl.full((1,), _TAIL, tl.uint32)
        x = tl.where(inside <= last, inside, 0).to(tl.uint32)
        start = row
        image = permute(x, last, BITS, column, step, tag, k0, k1)
    else:
        number, bits = _block(row, size, top)
        a, b, c, d = philox(number, tl.full((1,), _KEYS, tl.uint32), step, tag, k0, k1)
        mask = ((tl.full((1,), 1, tl.int64) << bits) - 1).to(tl.uint32)
        shift = ((bits + 1) >> 1).to(tl.uint32)
        # Bits of the row above those of the block are lost in the first round.
        image = _round(row.to(tl.uint32) + inside.to(tl.uint32), a, _M0, mask, shift)
        image = _round(image, b, _M1, mask, shift)
        image = _round(image, c, _M2, mask, shift)
        image = _round(image, d, _M3, mask, shift)
        start = (row >> bits) << bits
    return image, start


@triton.jit
def _modulo(x, offset, d, factor):
    """Computes (x + offset) mod d, on uint32, for offset < d < 2³¹, by a product.

    With ⌊(2³² − 1)/d⌋ as the factor the quotient is right or too small by one, and then the rest is
    too large by d; rest − d wraps, and is larger than the rest, if it is right.
    """
    rest = x - ((x.to(tl.uint64) * factor) >> 32).to(tl.uint32) * d
    rest = tl.minimum(rest, rest - d) + offset
    return tl.minimum(rest, rest - d)


@triton.jit
def _signs(row, step, tag, k0, k1):
    """Draws the tile's sign bits, at the place of a float's sign."""
    number = tl.arange(0, _TILE // 32)  # of a word, four a call
    call = (row >> 7).to(tl.uint32) + (number >> 2).to(tl.uint32)  # it begins anew every 2³⁹ rows
    a, b, c, d = philox(call, (row >> _SPAN) + _SIGNS, step, tag, k0, k1)
    bits = pick(a, b, c, d, number)[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]
    return tl.reshape(bits << 31, (_TILE,))


@triton.jit
def _buckets(n, size, d, factor, first, lead, top, step, tag, k0, k1, BITS: tl.constexpr):
    """Gives the begin of a tile in the range, which rows are in it, their buckets and signs."""
    inside = tl.arange(0, _TILE)
    begin = tl.program_id(0).to(tl.int64) * _TILE - lead
    row = (tl.program_id(0).to(tl.int64) + first) * _TILE
    size = size.to(tl.int64)
    image, start = _image(row, inside, size, top, step, tag, k0, k1, BITS)
    offset = (start.to(tl.uint64) % d.to(tl.uint64)).to(tl.uint32)
    bucket = _modulo(image, offset, d.to(tl.uint32), factor.to(tl.uint32).to(tl.uint64))
    sign = _signs(row, step, tag, k0, k1)
    low, high = tl.maximum(-begin, 0), tl.minimum(n - begin, _TILE)
    mask = (inside >= low.to(tl.int32)) & (inside < high.to(tl.int32))
    return begin, mask, bucket.to(tl.int64), sign


@kernel
def _matvec(
    table, out, n, size, d, factor, first, lead, top, step, tag, k0, k1, BITS: tl.constexpr
):
    begin, mask, bucket, sign = _buckets(
        n, size, d, factor, first, lead, top, step, tag, k0, k1, BITS
    )
    tl.store(out + begin + tl.arange(0, _TILE), flip(tl.load(table + bucket), sign), mask=mask)


@kernel
def _rmatvec(
    g, sums, marks, scale, copies, n, size, d, factor, first, lead, top, step, tag, k0, k1,
    BITS: tl.constexpr,
):  # fmt: skip
    begin, mask, bucket, sign = _buckets(
        n, size, d, factor, first, lead, top, step, tag, k0, k1, BITS
    )
    copy = (tl.program_id(0) % copies).to(tl.int64) * d
    value = flip(tl.load(g + begin + tl.arange(0, _TILE), mask=mask, other=0), sign)
    deposit(sums + copy, marks, bucket, value, tl.load(scale), mask)


def _arguments(p: Any, step: Tensor, start: int, stop: int) -> tuple[tuple[int], tuple[int, ...]]:
    first, size, d = start // TILE, p.out_dim, p.in_dim
    factor, top = word(((1 << 32) - 1) // d), min(size.bit_length(), LARGEST)
    shared = (stop - start, size, d, factor, first, start % TILE, top, *counter(p, step))
    return (-(-stop // TILE) - first,), (*shared, max(0, size % TILE - 1).bit_length())


def matvec(p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Rows of P w."""
    out = w.new_empty(stop - start)
    grid, arguments = _arguments(p, step, start, stop)
    _matvec[grid](w * p.scale(w), out, *arguments, num_warps=1)
    return out


def rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g."""
    terms = min(stop - start, -(-p.out_dim // p.in_dim))
    copies = max(1, SPREAD // p.in_dim)
    sums = Sums.of(g, p.in_dim, terms, copies)
    grid, arguments = _arguments(p, step, start, stop)
    _rmatvec[grid](g, sums.sums, sums.marks, sums.scale, copies, *arguments, num_warps=1)
    return sums.total() * p.scale(g)


KERNELS = {"hash": Kernel(matvec, rmatvec)}


# A test compiles these without a GPU.
CASES: list[Case] = [
    (f, 1, {"scale": "*fp64"}, {"BITS": bits}) for f in (_matvec, _rmatvec) for bits in (0, 5, 10)
]
