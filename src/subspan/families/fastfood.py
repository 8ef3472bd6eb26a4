"""Stacked blocks H G Π H B: a Gaussian-like projection in O(D log d).

Source: Le, Sarlós and Smola, "Fastfood: approximating kernel expansions in loglinear time",
ICML 2013; the projection of Li 2018 and of Aghajanyan 2020 for large D.

Each block has n = 2^⌈log₂ d⌉ rows: B random signs, H the orthonormal Walsh–Hadamard transform, Π a
permutation, G normals scaled to Σ g² = n. All entries of H have the same size 1/√n, so a column of
a block has norm √(Σ g²/n) = 1 exactly; √(n/D) scales the stack, and only a last block that is cut
short makes the norm of the whole column an expectation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subspan.cache import cache
from subspan.errors import SubspanError
from subspan.families.base import Projection


def walsh_hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh–Hadamard transform along the last dimension, a power of 2."""
    shape, n, half = x.shape, x.shape[-1], 1
    while half < n:
        a, b = x.reshape(*shape[:-1], n // (2 * half), 2, half).unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2)
        half *= 2
    return x.reshape(shape) / math.sqrt(n)


def _sum_by_halves(x: Tensor) -> Tensor:
    """Sums along the first dimension, a power of 2: one order whatever stands beside a sum."""
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x


@dataclass(frozen=True)
class Fastfood(Projection, family="fastfood"):
    """Stacked blocks H G Π H B (Le 2013, the projection of Li 2018): O(D log d), near-Gaussian.

    Column k of the source's sequences belongs to block k div 3: 3k holds B, 3k + 1 the keys of Π,
    3k + 2 the normals of G.
    """

    domain = 5
    norm = "expected"

    def __post_init__(self) -> None:
        super().__post_init__()
        if 3 * -(-self.out_dim // self.block) > 1 << 32:
            raise SubspanError(
                f"fastfood has columns of random numbers for 2^32/3 blocks of {self.block} rows, "
                f"got out_dim={self.out_dim}; use a larger in_dim"
            )

    @property
    def block(self) -> int:
        """n, the rows of a block: the power of 2 that d fits in."""
        return 1 << (self.in_dim - 1).bit_length()

    def _draws(self, x: Tensor, step: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """B (blocks, n), Π (blocks, n) and G (blocks, n) of blocks first … last−1."""

        def build() -> tuple[Tensor, ...]:
            n, source = self.block, self.source
            blocks = torch.arange(first, last, device=x.device)
            place = torch.arange(n, device=x.device)
            options: dict[str, Any] = {"step": step, "device": x.device}
            signs = source.signs(0, n, column=3 * blocks, dtype=x.dtype, **options)
            order = source.permutation(n, column=3 * blocks + 1, step=step)(place.unsqueeze(1))
            normals = source.normals(0, n, column=3 * blocks + 2, dtype=torch.float64, **options)
            normals = (normals * torch.sqrt(n / _sum_by_halves(normals**2))).to(x.dtype)
            return signs.T.contiguous(), order.T.contiguous(), normals.T.contiguous()

        return cache.get(("fastfood", self, int(step), first, last, x.device, x.dtype), build)

    def _covering(self, start: int, stop: int) -> tuple[int, int, slice]:
        """Blocks first … last−1 that cover the rows, and where the rows are in them."""
        first, last = start // self.block, -(-stop // self.block)
        return first, last, slice(start - first * self.block, stop - first * self.block)

    def _matvec(self, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        first, last, part = self._covering(start, stop)
        signs, order, normals = self._draws(w, step, first, last)
        padded = torch.nn.functional.pad(w, (0, self.block - self.in_dim))
        mixed = walsh_hadamard(padded * signs).gather(1, order)
        rows = walsh_hadamard(mixed * normals).flatten()[part]
        return rows * math.sqrt(self.block / self.out_dim)

    def _rmatvec(self, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        first, last, part = self._covering(start, stop)
        signs, order, normals = self._draws(g, step, first, last)
        full = g.new_zeros((last - first) * self.block)
        full[part] = g
        mixed = walsh_hadamard(full.view(-1, self.block)) * normals
        unmixed = torch.zeros_like(mixed).scatter_(1, order, mixed)
        columns = (walsh_hadamard(unmixed) * signs).sum(dim=0)[: self.in_dim]
        return columns * math.sqrt(self.block / self.out_dim)
