"""Diagonal matrices."""

from __future__ import annotations

from torch import Tensor

from subspan.layers.atoms.base import Sum


class Diagonal(Sum, kind="diagonal"):
    """M(a) = diag(a)."""

    def setup(self) -> None:
        self._square()
        self.p = self.n
        self.energy = float(self.n)
        self.matrix_cost = self.apply_cost = self.n

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:
        return a.diag()

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        return x * a

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        return y * a
