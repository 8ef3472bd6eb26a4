"""Matrices without coefficients: identity, permutation, subsample, Hadamard."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from subspan.errors import SubspanError
from subspan.families.fastfood import walsh_hadamard
from subspan.layers.atoms.base import Sum


class Fixed(Sum):
    """One matrix, without a coefficient."""

    p = 0


class Selection(Fixed):
    """Coordinates that are picked: row i of M is a row of the identity."""

    def constants(self) -> tuple[Tensor, ...]:
        return (self._picked(),)

    def _picked(self) -> Tensor:
        """(n,) of the columns picked, no two of them equal."""
        raise NotImplementedError

    def setup(self) -> None:
        if self.n > self.m:
            raise SubspanError(
                f"{self.kind} picks from {self.m} coordinates, it cannot give {self.n}"
            )
        self.energy = float(self.n)
        self.matrix_cost = self.n * self.m
        self.apply_cost = self.n

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        return x[..., constants[0]]

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        return y.new_zeros(*y.shape[:-1], self.m).index_copy(-1, constants[0], y)


class Identity(Fixed, kind="identity"):
    """Ones on the diagonal: the first n coordinates, or zeros behind all m of them."""

    def setup(self) -> None:
        self.energy = float(min(self.n, self.m))
        self.matrix_cost = self.n * self.m
        self.apply_cost = self.n

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        return F.pad(x, (0, self.n - self.m))  # a negative padding cuts off

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        return F.pad(y, (0, self.m - self.n))


class Subsample(Selection, kind="subsample"):
    """n of m coordinates at random, in order: pixels of an image."""

    def _picked(self) -> Tensor:
        order = self.source.permutation(self.m)(torch.arange(self.m))
        return order[: self.n].sort().values


class PermutationMatrix(Selection, kind="permutation"):
    """All coordinates in another order."""

    def setup(self) -> None:
        self._square()
        super().setup()

    def _picked(self) -> Tensor:
        return self.source.permutation(self.m)(torch.arange(self.m))


class Hadamard(Fixed, kind="hadamard"):
    """The Walsh–Hadamard matrix of Sylvester's order over √n, by the fast transform."""

    def setup(self) -> None:
        self._square()
        if self.n & (self.n - 1):
            raise SubspanError(f"{self.kind} needs a power of 2, got {self.n} × {self.m}")
        self.energy = float(self.n)
        self.matrix_cost = self.n * self.n
        self.apply_cost = 2 * self.n * self.n.bit_length()

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        return walsh_hadamard(x)

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        return walsh_hadamard(y)  # symmetric
