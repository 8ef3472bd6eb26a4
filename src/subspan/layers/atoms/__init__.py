"""Sums of fixed matrices, M(a) = Σⱼ aⱼ Mⱼ: the factors of :mod:`subspan.layers.product_of_sums`.

Source: Wu, "ProdSumNet: reducing model parameters in deep neural networks via product-of-sums
matrix decompositions", arXiv 1809.02209, 2018. A class here says what its atoms Mⱼ are: how many,
their sum as a matrix, and where there is a shorter way than by that matrix, the product with
vectors. Adding a kind is adding a class; the registry, the tests and the tables find it.
"""

from __future__ import annotations

from typing import Any

from subspan.errors import SubspanError
from subspan.families import projections
from subspan.layers.atoms import convolution, diagonal, fixed, fourier, kronecker  # noqa: F401 (they register)
from subspan.layers.atoms.base import Sum, _kinds
from subspan.layers.atoms.dct import cosines, zigzag
from subspan.layers.atoms.dense import Projected
from subspan.registry import unregistered

__all__ = ["Sum", "atoms", "cosines", "kinds", "zigzag"]


def kinds() -> list[str]:
    """Return all kinds by name; those of :func:`subspan.projections` are atoms, too."""
    return sorted({*_kinds, *projections()})


def atoms(kind: str, n: int, m: int, *, seed: int = 0, stream: int = 0, **options: Any) -> Sum:
    """Return a sum of fixed matrices by name.

    Raises:
        SubspanError: for an unknown kind or option, or a shape that the kind cannot have.
    """
    if kind in _kinds:
        if kind in projections():
            raise SubspanError(
                f"{kind!r} is a kind of atoms and a projection: give the projection another name"
            )
        return _kinds[kind](n, m, seed, stream, **options)
    if kind in projections():
        return Projected(n, m, seed, stream, family=kind, **options)
    raise unregistered("kind of atoms", kind, kinds())
