"""``fastfood``: signs, permutation and normals of a block are made anew, beside its transforms.

They cost less than the two Walsh–Hadamard transforms of the block, and nothing of P is kept.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import prange, uint32
from torch import Tensor

from subspan.kernels.cpu import common
from subspan.kernels.cpu.common import as_bits, as_float, feistel, inline, round_keys, sequence
from subspan.kernels.cpu.dense import normals

f32 = np.float32


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
def _draws(n, block, widths, address):
    """Signs as bit 31 of words, images of the permutation, and scaled normals of one block."""
    calls = max(1, n // 128)
    words, signs = np.empty((calls, 4), np.uint32), np.empty(128 * calls, np.uint32)
    sequence(words, 0, calls, 3 * block, address)
    flat = words.ravel()
    for k in range(flat.size):
        for bit in range(widths[3]):
            signs[k * 32 + bit] = (flat[k] << uint32(31 - bit)) & common.SIGN

    halves, order = np.empty((2, n), np.uint32), np.empty(n, np.uint32)
    high_bits, low_bits = uint32(widths[1]), uint32(widths[2])
    for i in range(n):
        halves[0, i] = uint32(i) >> low_bits
        halves[1, i] = uint32(i) & uint32((1 << low_bits) - 1)
    keys = round_keys(widths[0], 3 * block + 1, address)
    feistel(halves[0], halves[1], n, keys, high_bits, low_bits)
    for i in range(n):
        order[i] = (halves[0, i] << low_bits) | halves[1, i]

    calls = max(1, n // 8)
    z, words = np.empty(8 * calls, f32), np.empty((calls, 4), np.uint32)
    sequence(words, 0, calls, 3 * block + 2, address)
    flat = words.ravel()
    for k in range(flat.size):
        z[2 * k], z[2 * k + 1] = normals(flat[k])
    z[n:] = 0
    squares = np.zeros(8)  # eight sums side by side: none waits for the one before it
    for i in range(0, z.size, 8):
        for k in range(8):
            squares[k] += float(z[i + k]) * float(z[i + k])
    scale = f32(math.sqrt(n / squares.sum()))
    for i in range(n):
        z[i] *= scale
    return signs, order, z


@common.kernel
def _matvec(w, start, out, n, factor, widths, address):
    """Rows of factor · (H G Π H B w), block by block; w is padded by zeros to n."""
    stop = start + out.size
    for block in prange(start // n, (stop + n - 1) // n):
        signs, order, z = _draws(n, np.int64(block), widths, address)
        x, y, mixed = np.empty(n, f32), np.empty(n, f32), np.empty(n, f32)
        for i in range(n):
            x[i] = as_float(as_bits(w[i]) ^ signs[i])
        x = walsh_hadamard(x, y)
        for i in range(n):
            mixed[i] = x[order[i]] * z[i]
        x = walsh_hadamard(mixed, y)
        first = np.int64(block) * n
        for row in range(max(start, first), min(stop, first + n)):
            out[row - start] = x[row - first] * factor


@common.kernel
def _rmatvec(g, start, partial, chunk, n, widths, address):
    """partial[task] = Σ B H Πᵀ G H g over the blocks of the task, without factors."""
    stop = start + g.size
    begin, end = start // n, (stop + n - 1) // n
    for task in prange(len(partial)):
        sums = partial[task]
        sums[:] = 0
        for block in range(begin + task * chunk, min(end, begin + (task + 1) * chunk)):
            signs, order, z = _draws(n, block, widths, address)
            x, y, mixed = np.zeros(n, f32), np.empty(n, f32), np.empty(n, f32)
            first = block * n
            for row in range(max(start, first), min(stop, first + n)):
                x[row - first] = g[row - start]
            x = walsh_hadamard(x, y)
            for i in range(n):
                mixed[order[i]] = x[i] * z[i]
            x = walsh_hadamard(mixed, y)
            for i in range(n):
                sums[i] += as_float(as_bits(x[i]) ^ signs[i])


def _factor(p: Any) -> np.float32:
    """√(n/D), and 1/√n for each of two transforms."""
    return f32(math.sqrt(p.block / p.out_dim) / p.block)


def matvec(p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Rows of P w."""
    n, out = p.block, np.empty(stop - start, f32)
    padded = np.zeros(n, f32)
    padded[: p.in_dim] = w.numpy()
    common.threads(8 * max(n, stop - start))
    _matvec(padded, start, out, n, _factor(p), common.widths(n), common.address(p, step))
    return torch.from_numpy(out)


def rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g."""
    n = p.block
    blocks = -(-stop // n) - start // n
    chunk = -(-blocks // min(64, max(1, blocks // 8)))  # sums of tasks: an eighth of g at most
    partial = np.empty((-(-blocks // chunk), n), f32)
    common.threads(8 * max(n, stop - start))
    _rmatvec(g.numpy(), start, partial, chunk, n, common.widths(n), common.address(p, step))
    return common.total(partial, p.in_dim) * float(_factor(p))
