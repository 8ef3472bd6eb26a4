"""A kind of atoms: a matrix that is linear in its coefficients."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from subspan.errors import SubspanError, check_options, is_integer
from subspan.philox import Source
from subspan.registry import Registry

DOMAIN = 48  # of the random numbers' counter: atoms

_kinds: Registry[type[Sum]] = Registry("kind of atoms")


class Sum(ABC):
    """M(a) = Σⱼ aⱼ Mⱼ, n × m, with p atoms. Pure data: the constants belong to the layer.

    Args:
        n: rows.
        m: columns.
        seed: of atoms that are random.
        stream: tells the factors of one seed apart.
        options: what the kind has beyond these: the arguments of :meth:`setup`.

    Attributes:
        p: number of coefficients; 0 of a fixed matrix.
        energy: Σⱼ ‖Mⱼ‖² (Frobenius), of random atoms in expectation; ‖M‖² of a fixed one.
        matrix_cost: multiply-adds of :meth:`matrix`.
        apply_cost: multiply-adds of :meth:`apply` for one vector; None where there is only the
            matrix.

    Raises:
        SubspanError: for a shape or an option that the kind cannot have.
    """

    kind: ClassVar[str]
    p: int
    energy: float
    matrix_cost: int = 0
    apply_cost: int | None = None

    def __init_subclass__(cls, *, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            _kinds.add(kind, cls)
            cls.kind = kind

    def __init__(self, n: int, m: int, seed: int, stream: int, **options: Any) -> None:
        self.n, self.m = n, m
        self.source = Source(seed, DOMAIN, stream)
        check_options(self.kind, options, self.setup)
        self.options = options
        self.setup(**options)

    @abstractmethod
    def setup(self) -> None:
        """Check the shape, and set ``p``, ``energy`` and the costs."""

    def constants(self) -> tuple[Tensor, ...]:
        """Make the tensors that every product needs, from the seed."""
        return ()

    # A kind defines its matrix, or both products, or all three.

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:
        """M(a), (n, m).

        Args:
            a: (p,); of a fixed matrix anything with the device and dtype wanted.
            constants: of :meth:`constants`.
        """
        eye = torch.eye(self.m, dtype=a.dtype, device=a.device)
        return self.apply(eye, a, *constants).T

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        """M(a) x for rows: (…, m) → (…, n)."""
        raise NotImplementedError

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        """M(a)ᵀ y for rows: (…, n) → (…, m)."""
        raise NotImplementedError

    def _square(self) -> None:
        if self.n != self.m:
            raise SubspanError(f"{self.kind} must be square, got {self.n} × {self.m}")

    def _count(self, p: int) -> None:
        if not is_integer(p, least=1):
            raise SubspanError(f"{self.kind} needs p >= 1 atoms, got {p!r}")
        self.p = p

    def _normals(self, *shape: int, column: int = 0) -> Tensor:
        return self.source.normals(0, math.prod(shape), column=column).view(shape)
