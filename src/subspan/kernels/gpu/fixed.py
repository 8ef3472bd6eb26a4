"""Scattered sums that do not depend on the order of their terms: atomics on 64-bit fixed point.

Terms are scaled by a power of two for which no sum can overflow, the largest of them and their
number being known; what is cut off is far below a float32's precision. A term that is not finite
leaves a mark instead, and its sum comes out as IEEE arithmetic has it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from subspan.kernels.gpu.launch import Case, kernel

TILE = 4096


@kernel
def _largest(x, out, n, TILE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    size = tl.abs(tl.load(x + place, mask=place < n, other=0))
    tl.store(out + tl.program_id(0), tl.max(tl.where(size < float("inf"), size, 0), axis=0))


@triton.jit
def deposit(sums, marks, place, value, scale, mask):
    """Adds ``value`` to the sum at ``place``."""
    finite = tl.abs(value) < float("inf")
    term = (tl.where(finite, value, 0).to(tl.float64) * scale).to(tl.int64)
    tl.atomic_add(sums + place, term, mask=mask & finite, sem="relaxed")
    mark = tl.where(value == float("inf"), 1, tl.where(value == -float("inf"), 2, 4))
    tl.atomic_or(marks + place, mark, mask=mask & (finite == 0), sem="relaxed")


class Sums(NamedTuple):
    """Sums that a kernel deposits terms in, in ``copies`` whose totals count."""

    sums: Tensor
    marks: Tensor
    scale: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, x: Tensor, size: int, terms: int, copies: int = 1) -> Sums:
        """``size`` sums of at most ``terms`` elements of ``x`` each."""
        programs = -(-x.numel() // TILE)
        largest = x.new_empty(programs)
        _largest[(programs,)](x, largest, x.numel(), TILE)
        # |x| < 2^e, so that terms · 2^(e + shift) ≤ 2⁶²; powers of two are written as their bits.
        shift = 62 - terms.bit_length() - largest.amax().frexp().exponent.long()
        return cls(
            torch.zeros(copies, size, dtype=torch.int64, device=x.device),
            torch.zeros(size, dtype=torch.int32, device=x.device),
            (1023 + shift << 52).view(torch.float64),
            (1023 - shift << 52).view(torch.float64),
        )

    def total(self) -> Tensor:
        """The sums in float32."""
        exact = self.sums.sum(dim=0) if len(self.sums) > 1 else self.sums[0]
        out = (exact.double() * self.inverse).float()
        for mark, value in ((1, math.inf), (2, -math.inf)):
            out.masked_fill_(self.marks == mark, value)
        return out.masked_fill_(self.marks > 2, math.nan)  # 3 is both infinities


# A test compiles these without a GPU.
CASES: list[Case] = [(_largest, 4, {}, {"TILE": 4096})]
