"""One signed coordinate per weight: θ_i = ±w_b(i)/√n_b, with buckets of equal size.

Source: Chen, Wilson, Tyree, Weinberger and Chen, "Compressing neural networks with the hashing
trick", ICML 2015; the same map with equal buckets is in Uni-LoRA (2025) and GPart.

A keyed permutation π deals the D weights to the d buckets like cards, b(i) = π(i) mod d, so that
bucket b holds n_b = ⌊D/d⌋ + [b < D mod d] weights and every column norm is known in closed form:
P is an isometry onto its range. Doubling d splits each bucket in two, for π(i) mod 2d mod d is
π(i) mod d; hence the subspace of d lies inside that of k·d for the same seed, D and signs.

π is the permutation of :mod:`subspan.shuffle`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.cache import cache
from subspan.families.base import Projection
from subspan.shuffle import SIGNS, SPAN, shuffled

CHUNK = 1 << 22  # rows indexed at once


@dataclass(frozen=True)
class Hash(Projection, family="hash"):
    """One signed coordinate per weight, equal buckets (HashedNets, Chen 2015): an isometry in O(D).

    Sequences 0 and 1 of the source hold the keys of the permutation, sequence 2 the signs (and 3
    those of rows from 2³⁹ on).
    """

    domain = 3
    norm = "exact"
    orthonormal = True
    bitwise = True
    most = 1 << 40

    def _index(self, step: Tensor, start: int, stop: int, device: torch.device) -> tuple[Tensor]:
        """2·b(i) + [sign is minus] for rows start … stop−1, int64 (stop − start,)."""
        bits = []
        for span in range(start // SPAN, (stop - 1) // SPAN + 1):
            low, high = (min(max(row - span * SPAN, 0), SPAN) for row in (start, stop))
            column = SIGNS + span
            bits.append(self.source.signbits(low, high, column=column, step=step, device=device))
        place = shuffled(self.source, self.out_dim, start, stop, step=step, device=device)
        return (2 * (place % self.in_dim) + torch.cat(bits),)

    def _indices(
        self, step: Tensor, start: int, stop: int, device: torch.device
    ) -> list[tuple[slice, Tensor]]:
        """The index by chunks; of matrices that fit the budget it is kept between calls."""
        chunks = []
        for first in range(start, stop, CHUNK):
            last = min(first + CHUNK, stop)
            build = functools.partial(self._index, step, first, last, device)
            (index,) = cache.get(("hash", self, int(step), first, last, device), build)
            chunks.append((slice(first - start, last - start), index))
        return chunks

    def scale(self, x: Tensor) -> Tensor:
        """1/√n_b of every bucket, (d,), like ``x``."""
        small, larger = divmod(self.out_dim, self.in_dim)
        out = x.new_full((self.in_dim,), 1 / math.sqrt(small))
        out[:larger] = 1 / math.sqrt(small + 1)
        return out

    def _matvec(self, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        # The table holds each scaled coordinate and its negative, so that the product is a gather.
        scaled = w * self.scale(w)
        table = torch.stack((scaled, -scaled), dim=1).flatten()
        out = w.new_empty(stop - start)
        for part, index in self._indices(step, start, stop, w.device):
            torch.index_select(table, 0, index, out=out[part])
        return out

    def _rmatvec(self, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        table = g.new_zeros(2 * self.in_dim)
        for part, index in self._indices(step, start, stop, g.device):
            table.index_add_(0, index, g[part])
        plus, minus = table.view(-1, 2).unbind(dim=1)
        return (plus - minus) * self.scale(g)
