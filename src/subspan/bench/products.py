"""The time of P w and of Pᵀ g, against a stored matrix and against the machine's bandwidth."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from subspan.bench import candidates
from subspan.bench.timing import interleaved
from subspan.families import stored


def measure(
    methods: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    seconds: float,
    device: torch.device,
    done: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row for every size and projection.

    Args:
        methods: names of :func:`candidates.names`.
        sizes: pairs of D and d.
        seconds: to spend on each product of each projection.
        device: where.
        done: is told about every size that is done.

    Returns:
        Rows with the projection's name, ``out_dim``, ``in_dim``, ``bytes_of_p`` that exist between
        products, and the timings ``forward`` (P w) and ``backward`` (Pᵀ g); or ``skipped``, a
        reason.
    """
    rows = []
    for out_dim, in_dim in sizes:
        w, g = torch.randn(in_dim, device=device), torch.randn(out_dim, device=device)
        at_this_size, forward, backward = {}, {}, {}
        for name in methods:
            row: dict[str, Any] = {"projection": name, "out_dim": out_dim, "in_dim": in_dim}
            rows.append(row)
            if reason := candidates.too_large(name, out_dim, in_dim, device):
                row["skipped"] = reason
                continue
            p = candidates.make(name, out_dim, in_dim)
            at_this_size[name] = row
            row["bytes_of_p"] = candidates.bytes_of(p, device)
            forward[name] = functools.partial(p.matvec, w)
            backward[name] = functools.partial(p.rmatvec, g)
        for direction, functions in (("forward", forward), ("backward", backward)):
            for name, timing in interleaved(functions, seconds, device).items():
                at_this_size[name][direction] = timing
        stored.forget()
        done(f"products at D={out_dim:,}, d={in_dim:,}")
    return rows
