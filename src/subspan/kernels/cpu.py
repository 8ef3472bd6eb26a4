"""Numba kernels for vectors on the CPU: ``rademacher`` and ``hash``.

The integers are those of :mod:`subspan.philox`; sums run in an order that depends on sizes only, so
results do not change with the number of threads.

``rademacher`` is compute-bound: one Philox call makes 128 entries and costs about 70 operations, so
the rest must be cheap. Lanes of the vector registers are 64 columns (for P w: the 32 rows of a
word), so that the word and the shift are constants or one vector in the inner loop; a sign is
flipped by an exclusive or with the shifted bit, and four terms are summed before they meet the
accumulator.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import int64, njit, prange, types, uint32, uint64
from numba.extending import intrinsic
from torch import Tensor

from subspan.cache import cache
from subspan.kernels import Kernel
from subspan.philox import MULTIPLIERS, WEYL

LANES = 64  # columns generated together
CHUNK = 1 << 16  # rows summed by one thread before partial sums are added, in order
GRAIN = 1 << 15  # operations that are worth a thread
M0, M1 = (np.uint64(m) for m in MULTIPLIERS)
W0, W1 = (np.uint32(w) for w in WEYL)


@intrinsic
def _as_float(context: Any, bits: Any) -> Any:
    """Reinterpret 32 bits as a float."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _as_bits(context: Any, value: Any) -> Any:
    """Reinterpret a float as 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@njit(inline="always")
def _philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    for _ in range(10):
        p0, p1 = M0 * uint64(c0), M1 * uint64(c2)
        c0, c1, c2, c3 = (
            uint32(uint32(p1 >> uint64(32)) ^ c1 ^ k0),
            uint32(p1),
            uint32(uint32(p0 >> uint64(32)) ^ c3 ^ k1),
            uint32(p0),
        )
        k0, k1 = uint32(k0 + W0), uint32(k1 + W1)
    return c0, c1, c2, c3


@njit(inline="always")
def _words(out, block, column, step, tag, k0, k1):  # type: ignore[no-untyped-def]
    """The four words of row block ``block`` for LANES columns from ``column``: (4, LANES)."""
    for lane in range(LANES):
        a, b, c, d = _philox(uint32(block), uint32(column + lane), step, tag, k0, k1)
        out[0, lane], out[1, lane], out[2, lane], out[3, lane] = a, b, c, d


@njit(inline="always")
def _flip(bits, word, shift):  # type: ignore[no-untyped-def]
    """The float with these bits, negated if bit 31 − ``shift`` of ``word`` is set."""
    return _as_float(bits ^ ((word << shift) & uint32(0x80000000)))


@njit(parallel=True, cache=True, nogil=True, boundscheck=False, error_model="numpy")
def _rademacher_rmatvec(g, first, out, step, tag, k0, k1):  # type: ignore[no-untyped-def]
    """out_j = Σ_i ±g_i for whole blocks of 128 rows from block ``first``; g is padded by zeros."""
    blocks = g.size // 128
    bits = g.view(np.uint32)
    for group in prange(out.size // LANES):
        words = np.empty((4, LANES), np.uint32)
        total = np.zeros(LANES, np.float32)
        for block in range(blocks):
            _words(words, first + block, group * LANES, step, tag, k0, k1)
            part = np.zeros(LANES, np.float32)
            for k in range(4):
                for bit in range(0, 32, 4):
                    i = block * 128 + k * 32 + bit
                    g0, g1, g2, g3 = bits[i], bits[i + 1], bits[i + 2], bits[i + 3]
                    shift = uint32(31 - bit)
                    for lane in range(LANES):
                        word = words[k, lane]
                        part[lane] += (
                            _flip(g0, word, shift) + _flip(g1, word, shift - uint32(1))
                        ) + (
                            _flip(g2, word, shift - uint32(2)) + _flip(g3, word, shift - uint32(3))
                        )
            for lane in range(LANES):
                total[lane] += part[lane]
        out[group * LANES : (group + 1) * LANES] = total


@njit(parallel=True, cache=True, nogil=True, boundscheck=False, error_model="numpy")
def _rademacher_matvec(w, first, out, step, tag, k0, k1):  # type: ignore[no-untyped-def]
    """out_i = Σ_j ±w_j for whole blocks of 128 rows from block ``first``; w is padded by zeros."""
    bits = w.view(np.uint32)
    for block in prange(out.size // 128):
        words = np.empty((4, LANES), np.uint32)
        total = np.zeros((4, 32), np.float32)
        for group in range(w.size // LANES):
            _words(words, first + block, group * LANES, step, tag, k0, k1)
            part = np.zeros((4, 32), np.float32)
            for j in range(0, LANES, 4):
                c = group * LANES + j
                w0, w1, w2, w3 = bits[c], bits[c + 1], bits[c + 2], bits[c + 3]
                for k in range(4):
                    a, b, e, f = words[k, j], words[k, j + 1], words[k, j + 2], words[k, j + 3]
                    for row in range(32):
                        shift = uint32(31 - row)
                        part[k, row] += (_flip(w0, a, shift) + _flip(w1, b, shift)) + (
                            _flip(w2, e, shift) + _flip(w3, f, shift)
                        )
            for k in range(4):
                for row in range(32):
                    total[k, row] += part[k, row]
        for k in range(4):
            for row in range(32):
                out[block * 128 + k * 32 + row] = total[k, row]


def _threads(work: int) -> None:
    """As many threads as torch uses, but one for each GRAIN of ``work`` operations at most.

    A worker that was given one core takes one, and a bias does not wait for a second.
    """
    wanted = torch.get_num_threads()
    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(max(1, min(wanted, most, work // GRAIN)))
    if torch.get_num_threads() != wanted:  # Numba's pool started, and reset the OpenMP they share
        torch.set_num_threads(wanted)


def _counter(p: Any, step: Tensor) -> tuple[np.uint32, ...]:
    """Philox's step, tag and key as the kernels take them."""
    source = p.source
    return (np.uint32(int(step)), np.uint32(source.tag), *(np.uint32(k) for k in source.key))


def _padded(x: Tensor, before: int, length: int) -> Any:
    """``x`` with zeros before and after it, as a NumPy array of ``length``."""
    out = np.zeros(length, np.float32)
    out[before : before + x.numel()] = x.numpy()
    return out


def rademacher_matvec(p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Rows of P w for :class:`~subspan.families.rademacher.Rademacher`."""
    first, last = start // 128, -(-stop // 128)
    out = np.empty((last - first) * 128, np.float32)
    _threads((stop - start) * p.in_dim // 16)  # 16 signs are one operation
    padded = _padded(w / p.out_dim**0.5, 0, -(-p.in_dim // LANES) * LANES)
    _rademacher_matvec(padded, first, out, *_counter(p, step))
    return torch.from_numpy(out)[start - first * 128 : stop - first * 128]


def rademacher_rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g for :class:`~subspan.families.rademacher.Rademacher`."""
    first, last = start // 128, -(-stop // 128)
    out = np.empty(-(-p.in_dim // LANES) * LANES, np.float32)
    _threads((stop - start) * p.in_dim // 16)
    padded = _padded(g, start - first * 128, (last - first) * 128)
    _rademacher_rmatvec(padded, first, out, *_counter(p, step))
    return torch.from_numpy(out)[: p.in_dim] / p.out_dim**0.5


@njit(inline="always")
def _mix(x):  # type: ignore[no-untyped-def]
    x = uint32((x ^ (x >> uint32(16))) * uint32(0x85EBCA6B))
    x = uint32((x ^ (x >> uint32(13))) * uint32(0xC2B2AE35))
    return uint32(x ^ (x >> uint32(16)))


@njit(parallel=True, cache=True, nogil=True, boundscheck=False, error_model="numpy")
def _hash_index(out, start, size, buckets, keys, high_bits, low_bits, step, tag, k0, k1):  # type: ignore[no-untyped-def]
    """2·bucket + sign bit of rows start … : see :class:`~subspan.families.hash.Hash`."""
    high_mask, low_mask = uint32((1 << high_bits) - 1), uint32((1 << low_bits) - 1)
    stop = start + out.size
    for block in prange(start // 128, (stop + 127) // 128):
        words = _philox(uint32(block), uint32(0), step, tag, k0, k1)
        for i in range(max(start, int64(block) * 128), min(stop, int64(block) * 128 + 128)):
            x = int64(i)
            while True:
                high, low = uint32(x >> low_bits), uint32(uint32(x) & low_mask)
                for r in range(0, keys.size, 2):
                    high = uint32(high ^ (_mix(uint32(low ^ keys[r])) & high_mask))
                    low = uint32(low ^ (_mix(uint32(high ^ keys[r + 1])) & low_mask))
                x = (int64(high) << low_bits) | int64(low)
                if x < size:
                    break
            bit = (words[(i % 128) // 32] >> uint32(i % 32)) & uint32(1)
            out[i - start] = 2 * (x % buckets) + int64(bit)


@njit(parallel=True, cache=True, nogil=True, boundscheck=False, error_model="numpy")
def _gather(table, index, out):  # type: ignore[no-untyped-def]
    for i in prange(out.size):
        out[i] = table[index[i]]


@njit(parallel=True, cache=True, nogil=True, boundscheck=False, error_model="numpy")
def _scatter(index, g, partial, chunk):  # type: ignore[no-untyped-def]
    for part in prange(len(partial)):
        row = partial[part]
        row[:] = 0
        for i in range(part * chunk, min((part + 1) * chunk, g.size)):
            row[index[i]] += g[i]


def _index(p: Any, step: Tensor, start: int, stop: int) -> Any:
    """The int32 index of a range of rows, kept between calls while it fits the cache's budget."""

    def build() -> tuple[Tensor]:
        permutation = p.source.permutation(p.out_dim, column=1, step=step)
        out = np.empty(stop - start, np.int32 if p.in_dim < 1 << 30 else np.int64)
        keys = np.array(permutation.keys, np.uint32)
        _hash_index(out, start, p.out_dim, p.in_dim, keys, *permutation.bits, *_counter(p, step))
        return (torch.from_numpy(out),)

    (index,) = cache.get(("hash", p, int(step), start, stop, "numba"), build)
    return index.numpy()


def hash_matvec(p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Rows of P w for :class:`~subspan.families.hash.Hash`."""
    _threads(stop - start)
    scaled = w * p.scale(w)
    table = torch.stack((scaled, -scaled), dim=1).flatten().numpy()
    out = np.empty(stop - start, np.float32)
    _gather(table, _index(p, step, start, stop), out)
    return torch.from_numpy(out)


def hash_rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g for :class:`~subspan.families.hash.Hash`."""
    _threads(stop - start)
    # Chunks grow with d, so that the partial sums stay below the size of g.
    chunk = max(CHUNK, 8 * p.in_dim)
    partial = np.empty((max(1, -(-g.numel() // chunk)), 2 * p.in_dim), np.float32)
    _scatter(_index(p, step, start, stop), g.numpy(), partial, chunk)
    plus, minus = torch.from_numpy(partial.sum(axis=0)).view(-1, 2).unbind(dim=1)
    return (plus - minus) * p.scale(g)


KERNELS = {
    "rademacher": Kernel(rademacher_matvec, rademacher_rmatvec),
    "hash": Kernel(hash_matvec, hash_rmatvec),
}
