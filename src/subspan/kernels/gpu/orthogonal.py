"""``orthogonal``: the levels of butterflies in one array of all D elements, in place.

The five levels inside rows of 32 are one kernel; each level among rows is one more, in which a
program finds its rows' partners by descending the halving.
"""

from __future__ import annotations

import math
from typing import Any

import triton.language as tl
from torch import Tensor

from subspan.kernels import Kernel
from subspan.kernels.gpu.butterflies import halves, merge
from subspan.kernels.gpu.draws import block_signs, flip, permute
from subspan.kernels.gpu.launch import Case, counter, kernel

ROWS = 64  # rows of 32 elements of a program
TILE = 256  # coordinates of a program
HALF = tl.constexpr(math.sqrt(0.5))

_TILE = tl.constexpr(TILE)


@kernel
def _inner(x, n, ROWS: tl.constexpr, INVERSE: tl.constexpr):
    """Levels 0 … 4, or back, of every row; an element without a partner stays."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * 32 + tl.arange(0, 32)[None, :]
    value = tl.load(x + place, mask=place < n, other=0)
    for number in tl.static_range(5):
        a, b = halves(value, 16 >> number if INVERSE else 1 << number)
        _, partner = halves(place, 16 >> number if INVERSE else 1 << number)
        meets = partner < n
        a, b = tl.where(meets, (a + b) * HALF, a), tl.where(meets, (a - b) * HALF, b)
        value = merge(a, b, value.shape)
    tl.store(x + place, value, mask=place < n)


@kernel
def _outer(x, n, rows, depth, ROWS: tl.constexpr):
    """Level 5 + depth: rows of the first half of each segment meet those of the second."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    first = row * 0
    size = first + rows
    for _ in range(depth):
        lower = size - (size >> 1)
        right = row - first >= lower
        first += tl.where(right, lower, 0)
        size = tl.where(right, size >> 1, lower)
    one = row * 32 + tl.arange(0, 32)[None, :]
    other = one + (size - (size >> 1)) * 32
    meets = (row < rows) & (row - first < size >> 1) & (other < n)
    a = tl.load(x + one, mask=meets, other=0)
    b = tl.load(x + other, mask=meets, other=0)
    tl.store(x + one, (a + b) * HALF, mask=meets)
    tl.store(x + other, (a - b) * HALF, mask=meets)


@kernel
def _signs(x, out, start, n, first, begin, end, step, tag, k0, k1):
    """out[i − begin] = s_i x[i − start], or 0 where x of n elements has none; begin ≤ i < end."""
    block = first.to(tl.int64) + tl.program_id(0)
    place = block * 128 + tl.arange(0, 4)[:, None] * 32 + tl.arange(0, 32)[None, :]
    mask = (place >= start) & (place - start < n)
    value = tl.load(x + (place - start), mask=mask, other=0)
    value = flip(value, block_signs(block, tl.full((1, 1), 0, tl.uint32), step, tag, k0, k1))
    tl.store(out + (place - begin), value, mask=(place >= begin) & (place < end))


@kernel
def _chosen(x, out, d, last, step, tag, k0, k1, BITS: tl.constexpr, SCATTER: tl.constexpr):
    """out[π(j)] = x[j], or out[j] = x[π(j)], for j < d."""
    j = tl.program_id(0).to(tl.int64) * _TILE + tl.arange(0, _TILE)
    mask = j < d
    index = tl.where(mask, j, 0)
    index = index.to(tl.uint32) if BITS <= 32 else index.to(tl.uint64)
    column = tl.full((1,), 1, tl.uint32)
    image = permute(index, last, BITS, column, step, tag, k0, k1).to(tl.int64)
    source, target = (j, image) if SCATTER else (image, j)
    tl.store(out + target, tl.load(x + source, mask=mask, other=0), mask=mask)


def _transform(x: Tensor, inverse: bool) -> None:
    """T x or Tᵀ x in place."""
    n = x.numel()
    rows = -(-n // 32)
    programs = (-(-rows // ROWS),)
    depths = range((rows - 1).bit_length())
    if not inverse:
        _inner[programs](x, n, ROWS, inverse)
    for depth in reversed(depths) if inverse else depths:
        _outer[programs](x, n, rows, depth, ROWS)
    if inverse:
        _inner[programs](x, n, ROWS, inverse)


def _choose(p: Any, x: Tensor, out: Tensor, step: Tensor, scatter: bool) -> None:
    bits, programs = (p.out_dim - 1).bit_length(), (-(-p.in_dim // TILE),)
    _chosen[programs](x, out, p.in_dim, p.out_dim - 1, *counter(p, step), bits, scatter)


def matvec(p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Rows of P w."""
    full, out = w.new_zeros(p.out_dim), w.new_empty(stop - start)
    _choose(p, w, full, step, scatter=True)
    _transform(full, inverse=False)
    first = start // 128
    _signs[(-(-stop // 128) - first,)](
        full, out, 0, p.out_dim, first, start, stop, *counter(p, step), num_warps=1
    )
    return out


def rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g."""
    full, out = g.new_empty(p.out_dim), g.new_empty(p.in_dim)
    _signs[(-(-p.out_dim // 128),)](
        g, full, start, stop - start, 0, 0, p.out_dim, *counter(p, step), num_warps=1
    )
    _transform(full, inverse=True)
    _choose(p, full, out, step, scatter=False)
    return out


KERNELS = {"orthogonal": Kernel(matvec, rmatvec)}


# A test compiles these without a GPU.
CASES: list[Case] = [
    *((_inner, 4, {}, {"ROWS": 64, "INVERSE": i}) for i in (False, True)),
    (_outer, 4, {}, {"ROWS": 64}),
    (_signs, 1, {}, {}),
    *((_chosen, 4, {}, {"BITS": b, "SCATTER": s}) for b, s in ((19, False), (34, True))),
]
