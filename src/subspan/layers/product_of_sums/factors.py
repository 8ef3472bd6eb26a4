"""Factors as people write them, and as a recipe has them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from subspan.errors import SubspanError, is_integer, unknown
from subspan.layers.atoms import Sum, atoms


def identity(a: Tensor) -> Tensor:
    """Return the coefficients themselves; a lambda would not pickle."""
    return a


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": identity,
    "exp": torch.exp,
    "sin": torch.sin,
    "softplus": F.softplus,
    "square": torch.square,
    "tanh": torch.tanh,
}


STREAMS = 64  # of a layer: one for each factor, the last for its bias
GAINS = {  # variance of an output over that of an input, of a weight n × m
    "he": lambda n, m: 2.0,  # He 2015: 2/m for each entry
    "glorot": lambda n, m: 2 * m / (n + m),  # Glorot 2010
    "lecun": lambda n, m: 1.0,
}


def parse_factor(factor: Any) -> dict[str, Any]:
    """Return a factor, which is a mapping, a name or a tensor, as a mapping with its ``kind``."""
    if isinstance(factor, str):
        return {"kind": factor}
    if isinstance(factor, Tensor):
        return {"kind": "given", "tensor": factor if factor.dim() == 3 else factor.unsqueeze(0)}
    if isinstance(factor, Mapping) and isinstance(factor.get("kind"), str):
        return dict(factor)
    raise SubspanError(
        f"a factor is a kind of atoms, as 'circulant', or a mapping, as {{'kind': 'rank1', 'p': 8, "
        f"'inner': 64}}, or a tensor; got {factor!r}"
    )


def chain(
    n: int, m: int, factors: Sequence[Mapping[str, Any]], seed: int, stream: int
) -> list[Sum]:
    """Return the factors of an n × m weight.

    ``inner`` of a factor is the number of its columns and of the next one's rows; without it a
    factor is square, and the last one has m columns.

    Raises:
        SubspanError: for factors that do not chain, and for what a kind cannot be.
    """
    if not factors:
        raise SubspanError("a product of sums needs one factor at least")
    if len(factors) >= STREAMS:
        raise SubspanError(f"a product has at most {STREAMS - 1} factors, got {len(factors)}")
    sums = []
    rows = n
    for i, factor in enumerate(factors):
        options = {k: v for k, v in factor.items() if k not in ("kind", "inner", "f", "fixed")}
        last = i == len(factors) - 1
        columns = factor.get("inner", m if last else rows)
        if not is_integer(columns, least=1):
            raise SubspanError(f"inner of factor {i + 1} must be a size >= 1, got {columns!r}")
        if last and columns != m:
            raise SubspanError(
                f"the factors of a {n} × {m} weight must end with {m} columns, got {columns}"
            )
        try:
            sums.append(
                atoms(factor["kind"], rows, columns, seed=seed, stream=stream + i, **options)
            )
        except SubspanError as error:
            shape = f"factor {i + 1} of {len(factors)}, {rows} × {columns}, of a {n} × {m} weight"
            raise SubspanError(f"{shape}: {error}") from None
        rows = columns
    return sums


def function(name: str) -> Callable[[Tensor], Tensor]:
    """Return a scalar function of coefficients: one of `FUNCTIONS`, or "package.module:name"."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    module, colon, attribute = str(name).partition(":")
    if not colon:
        raise unknown("function f", name, FUNCTIONS)
    try:
        loaded = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SubspanError(f"no function {name!r}: {error}") from None
    if not callable(loaded):
        raise SubspanError(f"{name!r} is no function")
    return loaded
