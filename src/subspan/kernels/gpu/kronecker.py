"""``kronecker``: two sign matrices by a kernel, the rest by PyTorch's matrix products.

They are products in float64, since those of float32 are done in TF32, to three digits, wherever the
user allows that for the network; there is no way to ask for one product that PyTorch's older and
newer switches agree on, and the time is not in the products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from subspan.kernels import Kernel
from subspan.kernels.gpu.draws import flip, philox
from subspan.kernels.gpu.launch import Case, counter, kernel, word

COLUMNS = 32  # columns of a program: one per thread
PART = 1 << 22  # elements that exist in float64 at once


@kernel
def _fill(out, n, d, first, lead, column, step, tag, k0, k1, COLUMNS: tl.constexpr):
    """The signs of 128 rows, of which ``out`` holds those from ``lead`` on, in some columns."""
    j = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    block = first.to(tl.int64) + tl.program_id(1)
    row = tl.program_id(1).to(tl.int64) * 128 + tl.arange(0, 32)[:, None] - lead
    a, b, c, e = philox(block, column.to(tl.uint32) + j.to(tl.uint32), step, tag, k0, k1)
    _store(out, row, j, n, d, a)
    _store(out, row + 32, j, n, d, b)
    _store(out, row + 64, j, n, d, c)
    _store(out, row + 96, j, n, d, e)


@triton.jit
def _store(out, row, j, n, d, word):
    sign = (word >> tl.arange(0, 32).to(tl.uint32)[:, None]) << 31
    one = tl.full(sign.shape, 1.0, tl.float32)
    tl.store(out + row * d + j, flip(one, sign), mask=(row >= 0) & (row < n) & (j < d))


def _signs(x: Tensor, start: int, stop: int, columns: int, first: int, counter: Any) -> Tensor:
    """Signs start … stop−1 of ``columns`` columns from ``first`` on, (stop − start, columns)."""
    out = x.new_empty(stop - start, columns)
    block = start // 128
    grid, sizes = (-(-columns // COLUMNS), -(-stop // 128) - block), (stop - start, columns)
    _fill[grid](out, *sizes, block, start % 128, word(first), *counter, COLUMNS)
    return out


def _factors(p: Any, x: Tensor, step: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The rows of A that cover rows start … stop−1 of P, and all of B."""
    _, b, columns, q = p.tile
    numbers = counter(p, step)
    A = _signs(x, start // b, -(-stop // b), columns, 0, numbers)
    return A.double(), _signs(x, 0, b, q, 1 << 31, numbers).double()


def _parts(rows: Tensor) -> Sequence[Tensor]:
    """Views of as many rows each as may exist in float64 at once."""
    return rows.split(max(1, PART // rows.shape[1]))


def matvec(p: Any, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Rows of P w."""
    A, B = _factors(p, w, step, start, stop)
    W = pad(w / math.sqrt(p.out_dim), (0, A.shape[1] * B.shape[1] - p.in_dim))
    left = A @ W.double().view(A.shape[1], B.shape[1])
    out, done = w.new_empty(len(A), len(B)), 0
    for part in _parts(out):
        part.copy_(left[done : done + len(part)] @ B.T)
        done += len(part)
    before = start % len(B)
    return out.flatten()[before : before + stop - start]


def rmatvec(p: Any, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
    """Pᵀ g."""
    A, B = _factors(p, g, step, start, stop)
    # The vector is the rows of a matrix of b columns, of which the first and the last may be cut.
    b = len(B)
    before = start % b
    head = min((b - before) % b, len(g))
    tail = (len(g) - head) % b
    pieces = [g[head : len(g) - tail]]
    if head:
        pieces.insert(0, pad(g[:head], (before, b - before - head)))
    if tail:
        pieces.append(pad(g[len(g) - tail :], (0, b - tail)))
    right = [part.double() @ B for piece in pieces for part in _parts(piece.view(-1, b))]
    W = A.T @ torch.cat(right)
    return W.flatten()[: p.in_dim].float() / math.sqrt(p.out_dim)


KERNELS = {"kronecker": Kernel(matvec, rmatvec)}


# A test compiles these without a GPU.
CASES: list[Case] = [(_fill, 4, {}, {"COLUMNS": 32})]
