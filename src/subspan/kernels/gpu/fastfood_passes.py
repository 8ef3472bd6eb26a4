"""``fastfood`` with blocks of more than 4,096 rows: one kernel for every pass over some blocks.

H of n = 4096 · 2^k elements is H of 4,096 neighbours and then, up to six at a time, its further
levels. Blocks are taken in groups, so that two arrays of one group are all that exists beside the
result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from subspan.kernels.gpu.butterflies import walsh_hadamard
from subspan.kernels.gpu.draws import encrypt, flip, normal, sign_bit
from subspan.kernels.gpu.launch import Case, counter, kernel

ROW = 12  # log₂ of the neighbours that are transformed at once
LEVELS = 6  # levels of a further pass
BESIDE = 64  # neighbours that take part in a further pass together
TILE = 1024  # elements of the other programs
GROUP = 1 << 22  # elements of a group of blocks, or one block


@kernel
def _near(x, LOG: tl.constexpr):
    place = (tl.program_id(0).to(tl.int64) << LOG) + tl.arange(0, 1 << LOG)
    tl.store(x + place, walsh_hadamard(tl.load(x + place), LOG))


@kernel
def _far(x, stride, LEVELS: tl.constexpr, BESIDE: tl.constexpr):
    """``LEVELS`` levels from the distance ``stride`` on."""
    first = tl.program_id(0).to(tl.int64) * BESIDE
    first = (first // stride * stride << LEVELS) + first % stride
    beside = first + tl.arange(0, BESIDE)[:, None]
    place = beside + tl.arange(0, 1 << LEVELS)[None, :] * stride.to(tl.int64)
    tl.store(x + place, walsh_hadamard(tl.load(x + place), LEVELS))


@triton.jit
def _element(first, LOG: tl.constexpr, TILE: tl.constexpr):
    """Place in the group, element of the block, and the block's first column."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    return place, place & ((1 << LOG) - 1), ((first + (place >> LOG)) * 3).to(tl.uint32)


@kernel
def _spread(w, out, d, first, step, tag, k0, k1, LOG: tl.constexpr, TILE: tl.constexpr):
    """B w of every block."""
    place, m, column = _element(first.to(tl.int64), LOG, TILE)
    x = tl.load(w + m, mask=m < d, other=0)
    tl.store(out + place, flip(x, sign_bit(m, column, step, tag, k0, k1)))


@kernel
def _squares(out, first, step, tag, k0, k1, LOG: tl.constexpr, TILE: tl.constexpr):
    _, m, column = _element(first.to(tl.int64), LOG, TILE)
    z = normal(m, column + 2, step, tag, k0, k1)
    tl.store(out + tl.program_id(0), tl.sum(z * z, axis=0))


@kernel
def _mix(
    x, out, size, first, step, tag, k0, k1,
    LOG: tl.constexpr, INVERSE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """G Π x of every block, or (G Π)ᵀ x; ``size`` holds the factors of the blocks' normals."""
    place, m, column = _element(first.to(tl.int64), LOG, TILE)
    image = encrypt(m.to(tl.uint32), LOG, column + 1, step, tag, k0, k1)
    image = place - m + image.to(tl.int64)
    z = normal(m, column + 2, step, tag, k0, k1) * tl.load(size + (place >> LOG))
    source, target = (place, image) if INVERSE else (image, place)
    tl.store(out + target, tl.load(x + source) * z)


@kernel
def _gather(x, out, d, blocks, first, step, tag, k0, k1, LOG: tl.constexpr, TILE: tl.constexpr):
    """Adds B x of all blocks to ``out``."""
    m = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = m < d
    total = tl.load(out + m, mask=mask, other=0)
    column = (first.to(tl.int64) * 3 + tl.zeros((1,), tl.int64)).to(tl.uint32)
    place = m
    for _ in range(blocks):
        value = tl.load(x + place, mask=mask, other=0)
        total += flip(value, sign_bit(m, column, step, tag, k0, k1))
        place += 1 << LOG
        column += 3
    tl.store(out + m, total, mask=mask)


def _transform(x: Tensor, log: int) -> None:
    """H x in place, not scaled, of every 2^log elements in a row."""
    _near[(x.numel() >> ROW,)](x, ROW, num_warps=8)
    for done in range(ROW, log, LEVELS):
        levels = min(LEVELS, log - done)
        _far[(x.numel() >> levels) // BESIDE,](x, 1 << done, levels, BESIDE)


def _groups(p: Any, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """First and last block (exclusive) of the groups that cover rows start … stop−1."""
    first, last, many = start // p.block, -(-stop // p.block), max(1, GROUP // p.block)
    for begin in range(first, last, many):
        yield begin, min(begin + many, last)


def _mixed(p: Any, x: Tensor, first: int, step: Tensor, inverse: bool) -> Tensor:
    """G Π x of blocks from ``first`` on, or (G Π)ᵀ x."""
    log = (p.block - 1).bit_length()
    programs, numbers = (x.numel() // TILE,), counter(p, step)
    squares, out = x.new_empty(programs), torch.empty_like(x)
    _squares[programs](squares, first, *numbers, log, TILE)
    size = torch.sqrt(p.block / squares.view(-1, p.block // TILE).sum(dim=1))
    _mix[programs](x, out, size, first, *numbers, log, inverse, TILE)
    return out


def matvec(p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Rows of P w, but for the scale."""
    log = (p.block - 1).bit_length()
    out = w.new_empty(stop - start)
    for first, last in _groups(p, start, stop):
        x = w.new_empty((last - first) << log)
        _spread[(x.numel() // TILE,)](w, x, p.in_dim, first, *counter(p, step), log, TILE)
        _transform(x, log)
        x = _mixed(p, x, first, step, inverse=False)
        _transform(x, log)
        begin, end = max(start, first << log), min(stop, last << log)
        out[begin - start : end - start] = x[begin - (first << log) : end - (first << log)]
    return out


def rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g, but for the scale."""
    log = (p.block - 1).bit_length()
    out = g.new_zeros(p.in_dim)
    for first, last in _groups(p, start, stop):
        x = g.new_zeros((last - first) << log)
        begin, end = max(start, first << log), min(stop, last << log)
        x[begin - (first << log) : end - (first << log)] = g[begin - start : end - start]
        _transform(x, log)
        x = _mixed(p, x, first, step, inverse=True)
        _transform(x, log)
        _gather[(-(-p.in_dim // TILE),)](
            x, out, p.in_dim, last - first, first, *counter(p, step), log, TILE
        )
    return out


# A test compiles these without a GPU.
CASES: list[Case] = [
    (_near, 8, {}, {"LOG": 12}),
    (_far, 4, {}, {"LEVELS": 6, "BESIDE": 64}),
    (_spread, 4, {}, {"LOG": 14, "TILE": 1024}),
    (_squares, 4, {}, {"LOG": 14, "TILE": 1024}),
    *((_mix, 4, {"size": "*fp32"}, {"LOG": 31, "INVERSE": i, "TILE": 1024}) for i in (False, True)),
    (_gather, 4, {}, {"LOG": 14, "TILE": 1024}),
]
