"""Kronecker factors, A ⊗ I and I ⊗ B."""

from __future__ import annotations

import torch
from torch import Tensor

from subspan.errors import SubspanError
from subspan.layers.atoms.base import Sum


class KroneckerLeft(Sum, kind="kronecker-left"):
    """M(a) = A ⊗ I_k; [A₁ … A_r] ⊗ I_k beside a ``kronecker-right`` of r terms."""

    def setup(self, identity: int) -> None:  # type: ignore[override]
        """``identity``: k, which divides n and m."""
        if not isinstance(identity, int) or identity < 1 or self.n % identity or self.m % identity:
            raise SubspanError(
                f"{self.kind} needs an identity that divides {self.n} and {self.m}, got "
                f"{identity!r}"
            )
        self.k = identity
        self.p = self.n // identity * (self.m // identity)
        self.energy = float(self.p * identity)
        self.matrix_cost = self.n * self.m
        self.apply_cost = self.p * identity

    def _small(self, a: Tensor) -> Tensor:
        return a.view(self.n // self.k, self.m // self.k)

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:
        return torch.kron(self._small(a), torch.eye(self.k, dtype=a.dtype, device=a.device))

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        return (self._small(a) @ x.unflatten(-1, (-1, self.k))).flatten(-2)

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        return (self._small(a).T @ y.unflatten(-1, (-1, self.k))).flatten(-2)


class KroneckerRight(Sum, kind="kronecker-right"):
    """M(a): I_k ⊗ B₁ above I_k ⊗ B₂ … of r terms. KFC's Σᵣ Aᵣ ⊗ Bᵣ is a left factor times this."""

    def setup(self, identity: int, terms: int = 1) -> None:  # type: ignore[override]
        """``identity``: k, which divides m, as k · ``terms`` does n."""
        fits = all(isinstance(x, int) and x >= 1 for x in (identity, terms))
        if not fits or self.n % (identity * terms) or self.m % identity:
            raise SubspanError(
                f"{self.kind} needs an identity that divides {self.m} and, times the terms, "
                f"{self.n}, got {identity!r} and {terms!r}"
            )
        self.k, self.terms = identity, terms
        self.p = self.n // identity * (self.m // identity)
        self.energy = float(self.p * identity)
        self.matrix_cost = self.n * self.m
        self.apply_cost = self.p * identity

    def _small(self, a: Tensor) -> Tensor:
        return a.view(self.terms, -1, self.m // self.k)  # (r, rows, columns)

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:
        eye = torch.eye(self.k, dtype=a.dtype, device=a.device)
        return torch.cat([torch.kron(eye, small) for small in self._small(a)])

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        y = torch.einsum("...kc,trc->...tkr", x.unflatten(-1, (self.k, -1)), self._small(a))
        return y.flatten(-3)

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        parts = y.unflatten(-1, (self.terms, self.k, -1))
        return torch.einsum("...tkr,trc->...kc", parts, self._small(a)).flatten(-2)
