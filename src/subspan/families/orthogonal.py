"""Exactly orthonormal columns at any length without QR: a subsampled, sign-randomised transform.

Source: Ailon and Chazelle, "The fast Johnson–Lindenstrauss transform", SIAM J. Comput. 2009 (signs,
transform, subset). Their Hadamard matrix exists for powers of 2 alone. Our T has any length: it is
made of the same butterflies (a, b) → (a + b, a − b)/√2, each of them orthogonal, and an element
that finds no partner is left as it is.

    P = S T R,   S = diag(random signs) (D×D),   R = d random columns of the identity

T first transforms every row of 32 elements by itself (partners at distances 1, 2, 4, 8, 16), and
then the rows among each other: the rows of a segment are halved, row k of the first half (the
longer one) meets row k of the second, element by element, and each half goes on by itself. So every
segment of a level is as long as the others up to one row, and all elements are mixed alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.cache import cache
from subspan.families.base import Projection

ROW = 32  # elements of a row


def levels(n: int) -> int:
    """Return the number of levels of butterflies of the transform of length n."""
    return 5 + (-(-n // ROW) - 1).bit_length()


def butterfly(x: Tensor, level: int) -> Tensor:
    """One level of butterflies on (n,): symmetric, and its own inverse."""
    n = x.numel()
    place = torch.arange(n, device=x.device)
    if level < 5:
        second = (place >> level & 1).bool()
        partner = place ^ (1 << level)
    else:
        row, first = place // ROW, torch.zeros_like(place)
        size = torch.full_like(place, -(-n // ROW))
        for _ in range(level - 5):  # descend to this level's segments
            lower = size - size // 2
            right = row - first >= lower
            first, size = first + lower * right, torch.where(right, size // 2, lower)
        lower = size - size // 2
        second = row - first >= lower
        partner = place + torch.where(second, -lower, lower) * ROW
        partner = torch.where(second | (row - first < size // 2), partner, n)
    alone = partner >= n
    other = x[torch.where(alone, place, partner)]
    return torch.where(alone, x, torch.where(second, other - x, x + other) * math.sqrt(0.5))


def transform(x: Tensor) -> Tensor:
    """T x for (n,)."""
    for level in range(levels(x.numel())):
        x = butterfly(x, level)
    return x


def inverse(x: Tensor) -> Tensor:
    """Tᵀ x for (n,), which is also T⁻¹ x."""
    for level in reversed(range(levels(x.numel()))):
        x = butterfly(x, level)
    return x


@dataclass(frozen=True)
class Orthogonal(Projection, family="orthogonal"):
    """Random columns of a sign-randomised butterfly transform: PᵀP = I exactly, in O(D log D).

    Sequence 0 of the source holds the signs of S; R keeps the images of 0 … d−1 under the
    permutation whose keys are sequence 1.
    """

    domain = 4
    norm = "exact"
    orthonormal = True
    local = False

    def _draws(self, x: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        """Signs (D,) and chosen elements (d,)."""

        def build() -> tuple[Tensor, ...]:
            place = self.source.permutation(self.out_dim, column=1, step=step)
            signs = self.source.signs(0, self.out_dim, step=step, device=x.device, dtype=x.dtype)
            return signs, place(torch.arange(self.in_dim, device=x.device))

        return cache.get(("orthogonal", self, int(step), x.device, x.dtype), build)

    def _matvec(self, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        signs, places = self._draws(w, step)
        chosen = w.new_zeros(self.out_dim).index_copy_(0, places, w)
        return transform(chosen)[start:stop] * signs[start:stop]

    def _rmatvec(self, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        signs, places = self._draws(g, step)
        full = g.new_zeros(self.out_dim)
        full[start:stop] = g * signs[start:stop]
        return inverse(full)[places]
