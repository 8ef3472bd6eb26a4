"""The projections that are compared: every family, and matrices that are stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import psutil
import torch

from subspan.cache import cache
from subspan.errors import unknown
from subspan.families import Projection, projection, projections, stored
from subspan.training.methods.subspace import STORED

PLAIN = "adam"  # the ordinary training of all weights
DENSE = "stored-dense"  # what products are held against


def names() -> list[str]:
    """List all names, stored matrices last."""
    return [name for name in projections() if name != "stored"] + list(STORED)


def select(methods: Sequence[str]) -> list[str]:
    """Select the known names that were asked for, and the dense matrix to compare them with."""
    for name in methods:
        if name not in names():
            raise unknown("projection to measure", name, names())
    return [name for name in names() if name in methods or name == DENSE]


def options(name: str) -> dict[str, Any]:
    """Return the arguments of :class:`~subspan.subspace.SubspaceModel` that choose a projection."""
    return {"projection": "stored", **STORED[name]} if name in STORED else {"projection": name}


def make(name: str, out_dim: int, in_dim: int) -> Projection:
    """Make the projection itself."""
    arguments = options(name)
    family = arguments.pop("projection")
    return projection(family, out_dim=out_dim, in_dim=in_dim, **arguments)


def too_large(name: str, out_dim: int, in_dim: int, device: torch.device) -> str:
    """Say why a matrix cannot be stored here, by what exists while it is made; "" if it can."""
    if name not in STORED:
        return ""
    dense = STORED[name]["layout"] == "dense"
    # Of the others coordinates are sorted.
    needed = 5 * out_dim * in_dim if dense else 100 * out_dim * math.isqrt(in_dim)
    free = psutil.virtual_memory().available
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return f"needs {needed / 1e9:.0f} of {free / 1e9:.0f} GB" if needed > free else ""


def bytes_of(p: Projection, device: torch.device) -> int:
    """Count the bytes of P between products: a stored matrix, or what is kept of an index."""
    if isinstance(p, stored.Stored):
        return stored.stored_bytes(p, device)
    cache.clear()
    g = torch.zeros(p.out_dim, device=device)
    p.rmatvec(g)
    return cache.held
