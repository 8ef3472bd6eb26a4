"""``fastfood``: two Walsh–Hadamard transforms of a block, by its signs, permutation and normals.

To make these costs as much as the transforms: those of a small matrix are kept between calls, at
8 bytes a weight. Those of a large one are made block by block, and used at once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import prange, uint32
from torch import Tensor

from subspan.cache import cache
from subspan.kernels import Kernel
from subspan.kernels.cpu import common
from subspan.kernels.cpu.common import (
    SIGN,
    as_bits,
    as_float,
    inline,
    permuted,
    round_keys,
    sequence,
)
from subspan.kernels.cpu.dense import normals

f32 = np.float32
TASK = 1 << 13  # rows of P w that one task writes
NOTHING = np.empty((0, 0), np.uint32), np.empty((0, 0), f32)


@inline
def walsh_hadamard(x, y):
    """H x without its factor 1/√n, for n a power of 2; ``y`` is room for as much.

    Every level pairs neighbours and writes sums to the first half and differences to the second
    (Pease 1968): one loop without short strides, and after log₂ n levels all is in its place.
    """
    half, level = x.size // 2, x.size
    while level > 1:
        for i in range(half):
            a, b = x[2 * i], x[2 * i + 1]
            y[i], y[half + i] = a + b, a - b
        x, y = y, x
        level //= 2
    return x


@common.function
def _draws(words, z, block, widths, address):
    """Draw for one block: images of the permutation with signs as bit 31, and scaled normals."""
    n = words.size
    keys = round_keys(widths[0], 3 * block + 1, address)
    permuted(words, np.empty((3, n), np.uint32), 0, n, uint32(n - 1), keys, widths)

    calls = max(1, n // 128)
    drawn = np.empty((calls, 4), np.uint32)
    sequence(drawn, 0, calls, 3 * block, address)
    flat = drawn.ravel()
    bits = min(n, widths[3])
    for k in range(max(1, n // 32)):
        for bit in range(bits):
            words[k * 32 + bit] |= (flat[k] << uint32(31 - bit)) & SIGN

    calls = max(1, n // 8)
    drawn, normal = np.empty((calls, 4), np.uint32), np.empty(8 * calls, f32)
    sequence(drawn, 0, calls, 3 * block + 2, address)
    flat = drawn.ravel()
    for k in range(flat.size):
        normal[2 * k], normal[2 * k + 1] = normals(flat[k])
    normal[n:] = 0
    squares = np.zeros(8)  # eight sums side by side: none waits for the one before it
    for i in range(0, normal.size, 8):
        for k in range(8):
            squares[k] += float(normal[i + k]) * float(normal[i + k])
    scale = f32(math.sqrt(n / squares.sum()))
    for i in range(n):
        z[i] = normal[i] * scale


@common.kernel
def _fill(words, z, first, widths, address):
    """The draws of the blocks from ``first`` on, (blocks, n) each."""
    for block in prange(len(words)):
        _draws(words[block], z[block], first + block, widths, address)


@common.kernel
def _matvec(w, start, out, chunk, factor, words, z, widths, address):
    """Rows of factor · (H G Π H B w), block by block; w is padded by zeros to n.

    The draws are those that are kept or, if there are none, are made.
    """
    n, stop = w.size, start + out.size
    begin, end = start // n, (stop + n - 1) // n
    for task in prange((end - begin + chunk - 1) // chunk):
        x, y, mixed = np.empty(n, f32), np.empty(n, f32), np.empty(n, f32)
        word, normal = np.empty(n, np.uint32), np.empty(n, f32)
        for block in range(begin + task * chunk, min(end, begin + (task + 1) * chunk)):
            if words.size:
                word, normal = words[block - begin], z[block - begin]
            else:
                _draws(word, normal, block, widths, address)
            for i in range(n):
                x[i] = as_float(as_bits(w[i]) ^ (word[i] & SIGN))
            found = walsh_hadamard(x, y)
            for i in range(n):
                mixed[i] = found[word[i] & ~SIGN] * normal[i]
            found = walsh_hadamard(mixed, y)
            first, last = max(start, block * n), min(stop, (block + 1) * n)
            rows, found = out[first - start : last - start], found[first - block * n :]
            for i in range(rows.size):
                rows[i] = found[i] * factor


@common.kernel
def _rmatvec(g, start, partial, chunk, words, z, widths, address):
    """partial[task] = Σ B H Πᵀ G H g over the blocks of the task, without factors."""
    n, stop = partial.shape[1], start + g.size
    begin, end = start // n, (stop + n - 1) // n
    for task in prange(len(partial)):
        x, y, mixed = np.empty(n, f32), np.empty(n, f32), np.empty(n, f32)
        word, normal = np.empty(n, np.uint32), np.empty(n, f32)
        sums = partial[task]
        sums[:] = 0
        for block in range(begin + task * chunk, min(end, begin + (task + 1) * chunk)):
            if words.size:
                word, normal = words[block - begin], z[block - begin]
            else:
                _draws(word, normal, block, widths, address)
            first, last = max(start, block * n), min(stop, (block + 1) * n)
            x[:] = 0
            x[first - block * n : last - block * n] = g[first - start : last - start]
            found = walsh_hadamard(x, y)
            for i in range(n):
                mixed[word[i] & ~SIGN] = found[i] * normal[i]
            found = walsh_hadamard(mixed, y)
            for i in range(n):
                sums[i] += as_float(as_bits(found[i]) ^ (word[i] & SIGN))


def _kept(p: Any, step: Tensor, first: int, last: int) -> tuple[Any, ...]:
    """The draws of blocks first … last−1 if they are worth keeping, and from what they are made."""
    made_of = common.widths(p.block), common.address(p, step)
    shape = last - first, p.block

    def build() -> tuple[Tensor, Tensor]:
        words, z = np.empty(shape, np.uint32), np.empty(shape, f32)
        common.threads(16 * words.size)
        _fill(words, z, first, *made_of)
        return torch.from_numpy(words), torch.from_numpy(z)

    if 8 * p.out_dim > common.KEPT:
        return *NOTHING, *made_of
    words, z = cache.get(("fastfood", p, int(step), first, last, "numba"), build)
    return words.numpy(), z.numpy(), *made_of


def _factor(p: Any) -> np.float32:
    """√(n/D), and 1/√n for each of two transforms."""
    return f32(math.sqrt(p.block / p.out_dim) / p.block)


def matvec(p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Rows of P w."""
    n, out = p.block, np.empty(stop - start, f32)
    padded = np.zeros(n, f32)
    padded[: p.in_dim] = w.numpy()
    draws = _kept(p, step, start // n, -(-stop // n))
    common.threads(8 * max(n, stop - start))
    _matvec(padded, start, out, max(1, TASK // n), _factor(p), *draws)
    return torch.from_numpy(out)


def rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g."""
    n, first, last = p.block, start // p.block, -(-stop // p.block)
    blocks = last - first
    chunk = -(-blocks // min(64, max(1, blocks // 8)))  # sums of tasks: an eighth of g at most
    partial = np.empty((-(-blocks // chunk), n), f32)
    draws = _kept(p, step, first, last)
    common.threads(8 * max(n, stop - start))
    _rmatvec(g.numpy(), start, partial, chunk, *draws)
    return common.total(partial, p.in_dim) * float(_factor(p))


KERNELS = {"fastfood": Kernel(matvec, rmatvec)}
