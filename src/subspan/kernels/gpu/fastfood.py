"""``fastfood``: a block of up to 4,096 rows is one program, in which all its numbers are drawn.

The permutation goes through the memory: of P w through the block's place in the result, of Pᵀ g
through the program's place in the partial sums. Larger blocks take several passes
(:mod:`subspan.kernels.gpu.fastfood_passes`).
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from subspan.kernels import Kernel
from subspan.kernels.gpu import fastfood_passes
from subspan.kernels.gpu.butterflies import walsh_hadamard
from subspan.kernels.gpu.draws import encrypt, flip, normal, sign_bit
from subspan.kernels.gpu.launch import Case, counter, kernel

LARGEST = 12  # log₂ of the largest block that is one program
TILE = 10  # log₂ of the elements of a program with several blocks
PROGRAMS = 1024  # programs of Pᵀ g that are wanted


@triton.jit
def _draws(block, m, step, tag, k0, k1, LOG: tl.constexpr):
    """Signs, places and normals of elements ``m`` of blocks, the normals with Σ z² = n."""
    column = (block * 3).to(tl.uint32)
    sign = sign_bit(m, column, step, tag, k0, k1)
    place = encrypt(m.to(tl.uint32), LOG, column + 1, step, tag, k0, k1).to(tl.int64)
    z = normal(m, column + 2, step, tag, k0, k1)
    return sign, place, z * tl.sqrt((1 << LOG) / tl.sum(z * z, axis=1))[:, None]


@kernel
def _matvec(
    w, out, d, blocks, first, scale, step, tag, k0, k1, LOG: tl.constexpr, BLOCKS: tl.constexpr
):
    """Some blocks of rows, whole ones."""
    number = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    m = tl.arange(0, 1 << LOG)[None, :]
    sign, place, z = _draws(first + number, m, step, tag, k0, k1, LOG)
    x = flip(tl.load(w + m, mask=m < d, other=0), sign)
    here, mask = out + (number << LOG), number < blocks
    tl.store(here + m, walsh_hadamard(x, LOG), mask=mask)
    tl.debug_barrier()
    x = tl.load(here + place, mask=mask, other=0) * z
    tl.debug_barrier()
    tl.store(here + m, walsh_hadamard(x, LOG) * scale, mask=mask)


@kernel
def _rmatvec(
    g, out, n, first, lead, trips, step, tag, k0, k1, LOG: tl.constexpr, BLOCKS: tl.constexpr
):
    """Sums over a chunk of blocks, ``BLOCKS`` of them side by side; ``lead`` rows are cut."""
    chunk = tl.program_id(0).to(tl.int64)
    side = tl.arange(0, BLOCKS)[:, None]
    number = chunk * trips * BLOCKS + side
    m = tl.arange(0, 1 << LOG)[None, :]
    here = out + ((chunk * BLOCKS + side) << LOG)
    total = tl.zeros((BLOCKS, 1 << LOG), tl.float32)
    for _ in range(trips):
        sign, place, z = _draws(first + number, m, step, tag, k0, k1, LOG)
        row = (number << LOG) + m - lead
        x = tl.load(g + row, mask=(row >= 0) & (row < n), other=0)
        tl.store(here + place, walsh_hadamard(x, LOG) * z)
        tl.debug_barrier()
        x = tl.load(here + m)
        tl.debug_barrier()
        total += flip(walsh_hadamard(x, LOG), sign)
        number += BLOCKS
    tl.store(here + m, total)


def _scale(p: Any) -> float:
    """√(n/D) and the 1/√n of two transforms."""
    return math.sqrt(p.block / p.out_dim) / p.block


def _shape(p: Any) -> tuple[int, int, int]:
    """log₂ n, blocks of a program, and its warps."""
    log = (p.block - 1).bit_length()
    return log, 1 << max(0, TILE - log), 4 if log <= TILE else 16  # or registers run out


def matvec(p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Rows of P w."""
    log, beside, warps = _shape(p)
    scale = _scale(p)
    if log > LARGEST:
        return fastfood_passes.matvec(p, w, step, start, stop) * scale
    first = start >> log
    blocks = -(-stop // p.block) - first
    out = w.new_empty(blocks << log)
    _matvec[(-(-blocks // beside),)](
        w, out, p.in_dim, blocks, first, scale, *counter(p, step), log, beside, num_warps=warps
    )
    return out[start - (first << log) : stop - (first << log)]


def rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g."""
    log, beside, warps = _shape(p)
    if log > LARGEST:
        return fastfood_passes.rmatvec(p, g, step, start, stop) * _scale(p)
    first = start >> log
    groups = -(-(-(-stop // p.block) - first) // beside)
    trips = -(-groups // PROGRAMS)
    chunks = -(-groups // trips)
    partial = g.new_empty(chunks * beside, p.block)
    rows = stop - start, first, start - (first << log)
    _rmatvec[(chunks,)](g, partial, *rows, trips, *counter(p, step), log, beside, num_warps=warps)
    return partial.sum(dim=0)[: p.in_dim] * _scale(p)


KERNELS = {"fastfood": Kernel(matvec, rmatvec)}


# A test compiles these without a GPU.
CASES: list[Case] = [
    (f, n, {"scale": "fp32"}, {"LOG": log, "BLOCKS": b})
    for f in (_matvec, _rmatvec)
    for log, b, n in ((0, 1024, 4), (4, 64, 4), (9, 2, 4), (12, 1, 16))
]
