"""Atoms without structure: a projection of the library, rank one, every entry, given matrices."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from subspan.errors import SubspanError
from subspan.families import projection
from subspan.layers.atoms.base import Sum


class Projected(Sum):
    """A projection of the library, reshaped: column j of P is Mⱼ, row by row."""

    kind = "projection"

    def setup(self, family: str, p: int, **options: Any) -> None:  # type: ignore[override]
        """``p`` atoms, and the family's own options."""
        self.kind = family  # type: ignore[misc]
        self._count(p)
        self.projection = projection(
            family,
            out_dim=self.n * self.m,
            in_dim=p,
            seed=self.source.seed,
            stream=self.source.stream,
            **options,
        )
        self.energy = float(p)
        # A generated entry costs about a multiply-add; of hash there is one for each weight.
        self.matrix_cost = self.n * self.m * (1 if self.projection.bitwise else p)

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:
        return self.projection.matvec(a).view(self.n, self.m)


class RankOne(Sum, kind="rank1"):
    """Mⱼ = uⱼ vⱼᵀ with normal entries, E‖Mⱼ‖² = 1: M(a) = U diag(a) Vᵀ, never expanded."""

    def setup(self, p: int) -> None:  # type: ignore[override]
        """``p`` atoms."""
        self._count(p)
        self.energy = float(p)
        self.matrix_cost = self.n * self.m * p
        self.apply_cost = (self.n + self.m) * p

    def constants(self) -> tuple[Tensor, ...]:
        # Vector by vector: with more atoms the first ones stay what they are.
        return (
            self._normals(self.p, self.n).T / math.sqrt(self.n),
            self._normals(self.p, self.m, column=1).T / math.sqrt(self.m),
        )

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:
        u, v = constants
        return (u * a) @ v.T

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        u, v = constants
        return F.linear((x @ v) * a, u)

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        u, v = constants
        return F.linear((y @ u) * a, v)


class Dense(Sum, kind="free"):
    """Every entry by itself, Mⱼ = e eᵀ: a factor as it is in any network."""

    def setup(self) -> None:
        self.p = self.n * self.m
        self.energy = float(self.p)

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:
        return a.view(self.n, self.m)


class UserBasis(Sum, kind="given"):
    """Matrices of the user's, (p, n, m), which a file must hold."""

    def setup(
        self,
        tensor: Tensor | None = None,
        shape: tuple[int, int, int] | None = None,
        energy: float = 1.0,
    ) -> None:
        """``tensor`` holds them; or a file does, and only ``shape`` and ``energy`` are known."""
        has_values = tensor is not None
        if shape is not None and not has_values:
            tensor = torch.zeros(*shape)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() != 3:
            raise SubspanError("given matrices must be one floating tensor (p, n, m)")
        if tensor.shape[1:] != (self.n, self.m):
            raise SubspanError(
                f"given matrices must be {self.n} × {self.m}, got "
                f"{tensor.shape[1]} × {tensor.shape[2]}"
            )
        self._count(tensor.shape[0])
        self.tensor = tensor
        self.energy = float(tensor.double().square().sum()) if has_values else energy
        if not 0 < self.energy < math.inf:
            raise SubspanError("given matrices must be finite, and not all zero")
        self.matrix_cost = self.n * self.m * self.p

    def constants(self) -> tuple[Tensor, ...]:
        return (self.tensor.clone(),)  # a layer's own, which may be changed

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:
        return torch.tensordot(a, constants[0], dims=1)
