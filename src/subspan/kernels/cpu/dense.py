"""``gaussian``, ``sparse-original``, ``sparse2``: independent entries, made in blocks of 8 × LANES.

A block of 8 rows is one call of the generator for normals and two for families of one word an
entry. It is written to the first cache level and multiplied from there: that costs little beside
the making of the entries.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from numba import int32, prange, uint32
from torch import Tensor

from subspan.kernels import Kernel
from subspan.kernels.cpu import common
from subspan.kernels.cpu.common import LANES, SIGN, as_bits, as_float, columns, inline

ROWS = 8  # of a block
TASK = 128  # rows of P w that one task writes
ROOT_HALF = np.uint32(0x3F3504F3)  # the bits of √½
GAUSSIAN, SIGNED, POSITIVE = range(3)
f32 = np.float32


@inline
def normals(word):
    """Both normals of a word in float32, to 2e-7: :meth:`subspan.philox.Source.normals`.

    The logarithm and the cosines are the polynomials of Moshier's Cephes (logf, sinf, cosf). The
    angle is taken from the middle of its quadrant: cos φ, sin φ = (cos y ∓ sin y)/√2, y = φ − π/4.
    """
    u = f32(uint32(2) * (word & uint32(0xFFFF)) + uint32(1)) * f32(2.0**-17)
    shifted = uint32(as_bits(u) - ROOT_HALF)  # u = 2^e (1 + x), √½ ≤ 1 + x < √2
    e = f32(int32(shifted) >> int32(23))
    x = as_float(uint32((shifted & uint32(0x7FFFFF)) + ROOT_HALF)) - f32(1)
    y = f32(7.0376836292e-2)
    y = y * x - f32(1.1514610310e-1)
    y = y * x + f32(1.1676998740e-1)
    y = y * x - f32(1.2420140846e-1)
    y = y * x + f32(1.4249322787e-1)
    y = y * x - f32(1.6668057665e-1)
    y = y * x + f32(2.0000714765e-1)
    y = y * x - f32(2.4999993993e-1)
    y = y * x + f32(3.3333331174e-1)
    square = x * x
    y = y * x * square - e * f32(2.12194440e-4) - f32(0.5) * square
    radius = np.sqrt(-(x + y + e * f32(0.693359375)))  # √(−ln u): the factor 1/√2 is in it

    middle = int32(uint32(2) * ((word >> uint32(16)) & uint32(0x3FFF)) + uint32(1)) - int32(1 << 14)
    angle = f32(middle) * f32(math.pi * 2.0**-16)
    square = angle * angle
    sine = f32(8.3321608736e-3) - square * f32(1.9515295891e-4)
    sine = angle + angle * square * (square * sine - f32(1.6666654611e-1))
    cosine = square * f32(2.443315711809948e-5) - f32(1.388731625493765e-3)
    cosine = square * cosine + f32(4.166664568298827e-2)
    cosine = f32(1) - f32(0.5) * square + square * square * cosine
    one, other = radius * (cosine - sine), radius * (cosine + sine)
    return (
        as_float(as_bits(one) ^ ((word << uint32(1)) & SIGN)),
        as_float(as_bits(other) ^ (word & SIGN)),
    )


@inline
def _entries(out, words, kind, last, block, column, address):
    """Rows 8·block … of P before scaling, into (8, LANES); a word up to ``last`` is a nonzero."""
    if kind == GAUSSIAN:
        columns(words, block, column, address)
        for k in range(4):
            for lane in range(LANES):
                out[2 * k, lane], out[2 * k + 1, lane] = normals(words[k, lane])
    else:
        for half in range(2):
            columns(words, 2 * block + half, column, address)
            for k in range(4):
                for lane in range(LANES):
                    word = words[k, lane]
                    size = f32(1) if word <= last else f32(0)
                    sign = word << uint32(31) if kind == SIGNED else uint32(0)
                    out[4 * half + k, lane] = as_float(as_bits(size) ^ sign)


@common.kernel
def _matvec(w, start, out, kind, last, address):
    """out_i = Σ_j P_ij w_j; w is padded by zeros to whole LANES."""
    stop = start + out.size
    for task in prange(start // TASK, (stop + TASK - 1) // TASK):
        words, entries = np.empty((4, LANES), np.uint32), np.empty((ROWS, LANES), f32)
        sums = np.empty((ROWS, LANES), f32)
        for block in range(np.int64(task) * TASK // ROWS, np.int64(task + 1) * TASK // ROWS):
            if (block + 1) * ROWS <= start or block * ROWS >= stop:
                continue
            sums[:] = 0
            for column in range(0, w.size, LANES):
                _entries(entries, words, kind, last, block, column, address)
                for lane in range(LANES):
                    value = w[column + lane]
                    for row in range(ROWS):
                        sums[row, lane] += entries[row, lane] * value
            for row in range(ROWS):
                place = block * ROWS + row - start
                if 0 <= place < out.size:
                    out[place] = sums[row].sum()


@common.kernel
def _rmatvec(g, start, partial, chunk, kind, last, address):
    """partial[task, j] = Σ_i P_ij g_i over the rows of the task."""
    first, end = start // ROWS, (start + g.size + ROWS - 1) // ROWS
    groups = partial.shape[1] // LANES
    for task in prange(partial.shape[0] * groups):
        part, group = task // groups, task % groups
        words, entries = np.empty((4, LANES), np.uint32), np.empty((ROWS, LANES), f32)
        sums = np.zeros((ROWS, LANES), f32)
        for block in range(first + part * chunk, min(end, first + (part + 1) * chunk)):
            _entries(entries, words, kind, last, block, group * LANES, address)
            for row in range(ROWS):
                place = block * ROWS + row - start
                value = g[place] if 0 <= place < g.size else f32(0)
                for lane in range(LANES):
                    sums[row, lane] += entries[row, lane] * value
        for lane in range(LANES):
            partial[part, group * LANES + lane] = sums[:, lane].sum()


def _arguments(p: Any, step: Tensor, kind: int) -> tuple[Any, ...]:
    last = 0 if kind == GAUSSIAN else p.threshold - 1
    return kind, np.uint32(last), common.address(p, step)


def _divisor(p: Any, kind: int) -> float:
    return math.sqrt(p.out_dim) if kind == GAUSSIAN else p.divisor


def matvec(kind: int, p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Rows of P w."""
    out = np.empty(stop - start, np.float32)
    common.threads((stop - start) * p.in_dim)
    _matvec(common.padded(w, _divisor(p, kind)), start, out, *_arguments(p, step, kind))
    return torch.from_numpy(out)


def rmatvec(kind: int, p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g."""
    blocks = -(-stop // ROWS) - start // ROWS
    chunk, partial = common.partials(blocks, ROWS, p.in_dim)
    common.threads((stop - start) * p.in_dim)
    _rmatvec(g.numpy(), start, partial, chunk, *_arguments(p, step, kind))
    return common.total(partial, p.in_dim) / _divisor(p, kind)


KERNELS = {
    family: Kernel(functools.partial(matvec, kind), functools.partial(rmatvec, kind))
    for family, kind in (("gaussian", GAUSSIAN), ("sparse-original", SIGNED), ("sparse2", POSITIVE))
}
