"""The peak memory of a forward and a backward pass over D weights, each in a process of its own.

What counts begins before the weights exist: θ₀, θ, its gradient, the optimizer's
state, whatever exists of P, and every temporary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subspan.bench import candidates
from subspan.bench.apart import apart
from subspan.subspace.model import SubspaceModel
from subspan.training.machine import PeakMemory


class Weights(nn.Module):
    """A network that is one vector of weights, and gives it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(number))

    def forward(self) -> Tensor:
        """The weights."""
        return self.weight.view_as(self.weight)


def peak(method: str, out_dim: int, in_dim: int, device: str) -> int:
    """Bytes that two steps of Adam need at once, beyond what the libraries need anyway."""
    place = torch.device(device)

    def two_steps(out_dim: int, in_dim: int) -> None:
        net: nn.Module = Weights(out_dim).to(place)
        if method != candidates.PLAIN:
            net = SubspaceModel(net, in_dim, **candidates.options(method))
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, foreach=False)
        for _ in range(2):
            optimizer.zero_grad()
            theta = net()
            theta.backward(torch.ones(out_dim, device=place))
            del theta
            optimizer.step()

    two_steps(5000, 50)  # compiles kernels, starts threads
    before = PeakMemory(place).read()
    if method != candidates.PLAIN:  # a stored matrix counts, what it takes to make it does not
        candidates.make(method, out_dim, in_dim).rmatvec(torch.zeros(out_dim, device=place))
    memory = PeakMemory(place)
    two_steps(out_dim, in_dim)
    return memory.read() - before


def measure(
    methods: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    device: torch.device,
    done: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row for every size and projection, and one for plain Adam.

    Returns:
        Rows with the projection's name, ``out_dim``, ``in_dim`` and ``peak_bytes``, or ``skipped``.
    """
    rows = []
    for out_dim, in_dim in sizes:
        for method in (candidates.PLAIN, *methods):
            row: dict[str, Any] = {"projection": method, "out_dim": out_dim, "in_dim": in_dim}
            rows.append(row)
            if reason := candidates.too_large(method, out_dim, in_dim, device):
                row["skipped"] = reason
                continue
            arguments = (method, out_dim, in_dim, str(device))
            row["peak_bytes"] = apart(peak, *arguments, of=method)
        done(f"memory at D={out_dim:,}, d={in_dim:,}")
    return rows
