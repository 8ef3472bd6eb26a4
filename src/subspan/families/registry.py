"""Families by name: what ``subspan.projection`` and ``subspan.projections`` know."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

from subspan.errors import check_options
from subspan.registry import Registry

if TYPE_CHECKING:
    from subspan.families.base import Projection

COMMON = {"out_dim", "in_dim", "seed", "stream", "recipe"}  # fields of every projection

FAMILIES: Registry[type[Projection]] = Registry("projection")


def projections() -> dict[str, type[Projection]]:
    """Return every registered family by name; a class's docstring says what it is and whose."""
    return dict(sorted(FAMILIES.items()))


def projection(
    name: str, *, out_dim: int, in_dim: int, seed: int = 0, stream: int = 0, **options: Any
) -> Projection:
    """Make a projection by name.

    Args:
        name: one of :func:`projections`.
        out_dim: D, the number of weights.
        in_dim: d, the number of coordinates.
        seed: in [0, 2⁶⁴).
        stream: in [0, 2²⁴).
        options: what the family has beyond these (``s`` of ``sparse``, say).

    Raises:
        SubspanError: for an unknown name or option, or a value out of range.
    """
    family = FAMILIES.find(name)
    check_options(f"projection {name!r}", options, family, apart=COMMON)
    return family(out_dim=out_dim, in_dim=in_dim, seed=seed, stream=stream, **options)


@functools.lru_cache(maxsize=4096)
def from_recipe(recipe: str) -> Projection:
    """Make the projection that has this :attr:`~subspan.families.base.Projection.recipe`."""
    options = json.loads(recipe)
    return projection(options.pop("family"), **options)
