"""A Kronecker product of two sign matrices: P = (A ⊗ B)/√D, cut to D rows and d columns.

Source: Lotfi, Finzi, Kapoor, Potapczynski, Goldblum and Wilson, "PAC-Bayes compression bounds so
tight that they can explain generalization", NeurIPS 2022 (their factors are Gaussian; signs make
every column norm exactly 1 and keep the factors bit-equal on every backend).

With a·b ≥ D and p·q ≥ d, all near square roots, row i is (i div b, i mod b), column j is
(j div q, j mod q), and P w = vec(A W Bᵀ) for W = w as a p×q matrix: O(√d·(D + d)) operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from subspan.families.base import Projection


def ceil_sqrt(n: int) -> int:
    """Return the least integer whose square is at least n."""
    return math.isqrt(n - 1) + 1


@dataclass(frozen=True)
class Kronecker(Projection, family="kronecker"):
    """A ⊗ B with independent signs (Lotfi 2022), scaled by 1/√D: O(√d·(D + d)).

    Sequence k of the source holds column k of A, sequence 2³¹ + k column k of B.
    """

    domain = 6
    norm = "exact"

    @property
    def tile(self) -> tuple[int, int, int, int]:
        """(a, b, p, q): A is a×p, B is b×q."""
        b, q = ceil_sqrt(self.out_dim), ceil_sqrt(self.in_dim)
        return -(-self.out_dim // b), b, -(-self.in_dim // q), q

    def covering(self, start: int, stop: int) -> tuple[int, int, slice]:
        """Rows first … last−1 of A that cover the rows of P, and where those are in them."""
        b = self.tile[1]
        first, last = start // b, -(-stop // b)
        return first, last, slice(start - first * b, stop - first * b)

    def forward(self, A: Tensor, B: Tensor, part: slice, w: Tensor) -> Tensor:
        """Rows ``part`` of (A ⊗ B) w / √D."""
        _, _, p, q = self.tile
        W = pad(w, (0, p * q - self.in_dim)).view(p, q)
        return (A @ W @ B.T).flatten()[part] / math.sqrt(self.out_dim)

    def backward(self, A: Tensor, B: Tensor, part: slice, g: Tensor) -> Tensor:
        """Return the adjoint of :meth:`forward`."""
        full = g.new_zeros(len(A) * len(B))
        full[part] = g
        W = A.T @ full.view(len(A), len(B)) @ B
        return W.flatten()[: self.in_dim] / math.sqrt(self.out_dim)

    def _factors(
        self, x: Tensor, step: Tensor, start: int, stop: int
    ) -> tuple[Tensor, Tensor, slice]:
        """The rows of A that cover rows start … stop−1 of P, all of B, where the rows are."""
        _, b, p, q = self.tile
        first, last, part = self.covering(start, stop)
        options: dict[str, Any] = {"step": step, "device": x.device, "dtype": x.dtype}
        columns = torch.arange(max(p, q), device=x.device)
        A = self.source.signs(first, last, column=columns[:p], **options)
        B = self.source.signs(0, b, column=columns[:q] + (1 << 31), **options)
        return A, B, part

    def _matvec(self, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        return self.forward(*self._factors(w, step, start, stop), w)

    def _rmatvec(self, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        return self.backward(*self._factors(g, step, start, stop), g)
