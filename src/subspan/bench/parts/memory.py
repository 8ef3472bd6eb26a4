"""The peak memory of a forward and a backward pass over D weights, each in a process of its own.

What counts begins before the weights exist: θ₀, θ, its gradient, the optimizer's
state, whatever exists of P, and every temporary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from subspan.bench import candidates
from subspan.bench.part import Measurement, Part, Quantity
from subspan.bench.settings import Bench
from subspan.bench.subprocess import run_in_process
from subspan.subspace.model import SubspaceModel
from subspan.training.machine import PeakMemory


class Vector(nn.Module):
    """A network that is one vector of weights, and returns it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(number))

    def forward(self) -> Tensor:
        """Return the weights, whatever the input."""
        return self.weight.view_as(self.weight)


def peak(method: str, out_dim: int, in_dim: int, device: str) -> int:
    """Return the peak of two steps of Adam in bytes, beyond what the libraries take."""
    place = torch.device(device)

    def two_steps(out_dim: int, in_dim: int) -> None:
        net: nn.Module = Vector(out_dim).to(place)
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


class Memory(Part):
    """Peak memory of steps."""

    name = "memory"
    help = "the peak memory of steps in a fixed subspace, against that of plain Adam"
    shared = ("out_dim", "in_dim")
    quantities = (Quantity("peak_bytes", "bytes", "peak memory"),)
    title = "peak memory, D = {out_dim:,}, d = {in_dim:,}"
    heading = (
        "peak memory of two steps at D = {out_dim:,}, d = {in_dim:,}: θ₀, θ, gradient, optimizer, "
        "P and all temporaries"
    )
    subject, base_name = "trained by", "4·D"
    unit = "times the weights in float32"

    def count(self, settings: Bench) -> int:
        """Count the sizes."""
        return len(settings.sizes)

    def measure(self, settings: Bench, done: Callable[[str], None]) -> list[Measurement]:
        """Measure every projection at every size, and plain Adam.

        Returns:
            Rows with the projection's name, ``out_dim``, ``in_dim`` and ``peak_bytes``.
        """
        rows, device = [], settings.torch_device
        for out_dim, in_dim in settings.pairs():
            for method in (candidates.PLAIN, *settings.candidates):
                row: Measurement = {"projection": method, "out_dim": out_dim, "in_dim": in_dim}
                rows.append(row)
                if reason := candidates.too_large(method, out_dim, in_dim, device):
                    row["skipped"] = reason
                    continue
                arguments = (method, out_dim, in_dim, str(device))
                row["peak_bytes"] = run_in_process(peak, *arguments, memory_of=method)
            done(f"memory at D={out_dim:,}, d={in_dim:,}")
        return rows

    def whole(
        self, row: Measurement, rows: Sequence[Measurement], quantity: Quantity
    ) -> float | None:
        """Return the bytes of the weights."""
        return float(4 * row["out_dim"])


Memory()
