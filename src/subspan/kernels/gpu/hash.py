"""``hash``: 128 rows per warp, everything on the fly: a row costs about as much as its place.

A permutation takes a hundred instructions, about the time in which the memory takes a weight, so
that keeping it would save little and cost as much memory as the weights.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from subspan.kernels import Kernel
from subspan.kernels.gpu.draws import block_signs, flip, permute, rounds
from subspan.kernels.gpu.fixed import Sums, deposit
from subspan.kernels.gpu.launch import counter, kernel, on_device

SPREAD = 1 << 14  # sums of Pᵀ g: few buckets are summed in copies, or all rows would wait for them


@triton.jit
def _buckets(n, d, first, lead, last, step, tag, k0, k1, BITS: tl.constexpr, ROUNDS: tl.constexpr):
    """Place in the range, bucket and sign bit of the rows of one call; which are in the range."""
    block = first.to(tl.int64) + tl.program_id(0)
    inside = tl.arange(0, 4)[:, None] * 32 + tl.arange(0, 32)[None, :]
    place = tl.program_id(0).to(tl.int64) * 128 + inside - lead
    mask = (place >= 0) & (place < n)
    row = tl.where(mask, block * 128 + inside, 0)
    row = row.to(tl.uint32) if BITS <= 32 else row.to(tl.uint64)
    column = tl.full((1, 1), 1, tl.uint32)
    image = permute(row, last, BITS, ROUNDS, column, step, tag, k0, k1)
    bucket = (image % d.to(row.dtype)).to(tl.int64)
    return place, bucket, block_signs(block, column - 1, step, tag, k0, k1), mask


@kernel
def _matvec(
    table, out, n, d, first, lead, last, step, tag, k0, k1,
    BITS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    place, bucket, sign, mask = _buckets(n, d, first, lead, last, step, tag, k0, k1, BITS, ROUNDS)
    tl.store(out + place, flip(tl.load(table + bucket), sign), mask=mask)


@kernel
def _rmatvec(
    g, sums, marks, scale, copies, n, d, first, lead, last, step, tag, k0, k1,
    BITS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    place, bucket, sign, mask = _buckets(n, d, first, lead, last, step, tag, k0, k1, BITS, ROUNDS)
    copy = (tl.program_id(0) % copies).to(tl.int64) * d
    value = flip(tl.load(g + place, mask=mask, other=0), sign)
    deposit(sums + copy, marks, bucket, value, tl.load(scale), mask)


def _arguments(p: Any, step: Tensor, start: int, stop: int) -> tuple[tuple[int], tuple[int, ...]]:
    first = start // 128
    shared = (stop - start, p.in_dim, first, start % 128, p.out_dim - 1, *counter(p, step))
    return (-(-stop // 128) - first,), (*shared, *rounds(p.out_dim))


@on_device
def matvec(p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Rows of P w."""
    out = w.new_empty(stop - start)
    grid, arguments = _arguments(p, step, start, stop)
    _matvec[grid](w * p.scale(w), out, *arguments, num_warps=1)
    return out


@on_device
def rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g."""
    terms = min(stop - start, -(-p.out_dim // p.in_dim))
    copies = max(1, SPREAD // p.in_dim)
    sums = Sums.of(g, p.in_dim, terms, copies)
    grid, arguments = _arguments(p, step, start, stop)
    _rmatvec[grid](g, sums.sums, sums.marks, sums.scale, copies, *arguments, num_warps=1)
    return sums.total() * p.scale(g)


KERNELS = {"hash": Kernel(matvec, rmatvec)}
