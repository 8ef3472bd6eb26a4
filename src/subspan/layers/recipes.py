"""Named special cases of products of sums: factors for an n × m weight.

For example ``ProductOfSumsLinear(m, n, recipes.low_rank(16))``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from subspan.errors import SubspanError, check_options, unknown

FactorList = list[dict[str, Any]]


def recipe(name: str, **options: Any) -> Callable[[int, int], FactorList]:
    """Return the rule of a special case for :func:`~subspan.layers.product_of_sums`.

    Raises:
        SubspanError: for an unknown name, or options that it does not have or lacks.
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    make = RECIPES[name]
    check_options(f"recipe {name}", options, make)
    sizes_of = inspect.signature(make).parameters.keys() & {"n", "m"}

    def factors(n: int, m: int) -> FactorList:
        sizes = {"n": n, "m": m}
        return make(**{key: sizes[key] for key in sizes_of}, **options)

    return factors


def low_rank(rank: int) -> FactorList:
    """W = A B with A (n, r) and B (r, m)."""
    return [{"kind": "free", "inner": rank}, {"kind": "free"}]


def random_projection(size: int) -> FactorList:
    """W = A R with a fixed Gaussian R (size, m), and A (n, size) trained."""
    return [{"kind": "free", "inner": size}, {"kind": "gaussian", "p": 1, "fixed": True}]


def hashed(p: int) -> FactorList:
    """Weights that share p numbers by a hash (Chen 2015, HashedNets; here equal shares)."""
    return [{"kind": "hash", "p": p}]


def circulant(block: int | None = None) -> FactorList:
    """W circulant (Cheng 2015); with ``block`` made of circulant blocks (CirCNN, Ding 2017)."""
    if block is None:
        return [{"kind": "circulant"}]
    return [{"kind": "block-circulant", "block": block}]


def convolution(height: int, width: int, kernel: int = 3) -> FactorList:
    """Return the matrix of a convolution of images of that size, zeros around them."""
    return [{"kind": "convolution", "height": height, "width": width, "kernel": kernel}]


def adaptive_fastfood(n: int, m: int | None = None) -> FactorList:
    """W = S H G Π H B with diagonal S, G and B (Yang 2015, Deep Fried Convnets).

    For n × m weights inside the next power of 2, N: 3 N numbers.
    """
    size = 1 << (max(n, n if m is None else m) - 1).bit_length()
    kinds = ("diagonal", "hadamard", "diagonal", "permutation", "hadamard", "diagonal")
    inside: FactorList = [{"kind": kind, "inner": size} for kind in kinds]
    if (n, m or n) == (size, size):
        return inside
    return [{"kind": "identity", "inner": size}, *inside, {"kind": "identity"}]


def kronecker_fc(n: int, m: int, rows: int, columns: int, terms: int = 1) -> FactorList:
    """W = Σᵣ Aᵣ ⊗ Bᵣ with Aᵣ (rows, columns), ``terms`` of them (KFC, Zhou 2015).

    Raises:
        SubspanError: if A's sides do not divide W's.
    """
    if min(rows, columns, terms) < 1 or n % rows or m % columns:
        raise SubspanError(
            f"A of a {n} × {m} weight must have sides that divide these, got {rows} × {columns}"
        )
    of_b = n // rows
    return [
        {"kind": "kronecker-left", "identity": of_b, "inner": terms * columns * of_b},
        {"kind": "kronecker-right", "identity": columns, "terms": terms},
    ]


RECIPES: dict[str, Callable[..., FactorList]] = {
    make.__name__: make
    for make in (
        low_rank,
        random_projection,
        hashed,
        circulant,
        convolution,
        adaptive_fastfood,
        kronecker_fc,
    )
}
