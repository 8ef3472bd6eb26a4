"""The families of projections, one per file; importing this package registers them all."""

from subspan.families import (
    fastfood,
    gaussian,
    hash,  # noqa: A004 - the family's name
    kronecker,
    orthogonal,
    rademacher,
    sparse,
    stored,
)
from subspan.families.base import Projection, projection, projections

__all__ = [
    "Projection",
    "fastfood",
    "gaussian",
    "hash",
    "kronecker",
    "orthogonal",
    "projection",
    "projections",
    "rademacher",
    "sparse",
    "stored",
]
