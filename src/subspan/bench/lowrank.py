"""Low-rank layers against dense ones: a training step, inference and memory by rank.

Source of the comparison: Schotthöfer et al., NeurIPS 2022, timings of a network of five hidden
layers of 5,120 units, where low rank paid below 2.5 % of the width in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from subspan.bench.apart import apart
from subspan.bench.steps import SHAPE, a_batch, training_step
from subspan.bench.timing import interleaved
from subspan.layers import LowRankLinear
from subspan.optim import DLRT
from subspan.training.machine import PeakMemory

DENSE, HIDDEN = 0, 5  # the rank that a dense row has; hidden layers


def network(width: int, rank: int) -> nn.Module:
    """Five hidden layers of a width, dense or of a rank from the start, and ten classes."""
    layers: list[nn.Module] = [nn.Flatten()]
    features = math.prod(SHAPE)
    for _ in range(HIDDEN):
        layers += [
            nn.Linear(features, width)
            if rank == DENSE
            else LowRankLinear(features, width, min(rank, features)),
            nn.ReLU(),
        ]
        features = width
    return nn.Sequential(*layers, nn.Linear(width, 10))


def optimizer_of(net: nn.Module, rank: int, adapting: bool = False) -> torch.optim.Optimizer:
    """SGD, or DLRT with SGD inside: at ranks that stay, or that may change at every step."""
    if rank == DENSE:
        return SGD(net.parameters(), lr=1e-3)
    # A tolerance of 0 with a bound truncates at every step and comes back to the same rank.
    return DLRT(net, 1e-3, tolerance=0.0 if adapting else None, max_rank=rank)


def measure(
    width: int,
    ranks: Sequence[int],
    batch_size: int,
    seconds: float,
    device: torch.device,
    done: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row for the dense network, and one for every rank.

    Args:
        width: of the hidden layers.
        ranks: to be measured, below the width.
        batch_size: images in a step.
        seconds: to spend on each timing.
        device: where.
        done: is told when all is done.

    Returns:
        Rows with ``width``, ``rank`` (0: dense), ``batch_size``; the timings ``step`` (ranks stay),
        ``adaptive`` (ranks may change at each step) and ``inference``; ``peak_bytes`` of two
        training steps, in a process of its own.
    """
    x, y = a_batch(batch_size, device)
    rows = []
    steps: dict[str, Callable[[], object]] = {}
    for rank in (DENSE, *ranks):
        row: dict[str, Any] = {"width": width, "rank": rank, "batch_size": batch_size}
        arguments = (width, rank, batch_size, str(device))
        rows.append(row | {"peak_bytes": apart(peak, *arguments, of=f"rank {rank}")})
        net = network(width, rank).to(device)
        steps[f"step {rank}"] = training_step(net, x, y, optimizer_of(net, rank))
        if rank != DENSE:
            other = network(width, rank).to(device)
            steps[f"adaptive {rank}"] = training_step(
                other, x, y, optimizer_of(other, rank, adapting=True)
            )
        steps[f"inference {rank}"] = _inference(net, x)
    timings = interleaved(steps, seconds, device)
    for row in rows:
        for what in ("step", "adaptive", "inference"):
            if f"{what} {row['rank']}" in timings:
                row[what] = timings[f"{what} {row['rank']}"]
    done(f"low rank at width {width:,}")
    return rows


def _inference(net: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            net(x)

    return run


def peak(width: int, rank: int, batch_size: int, device: str) -> int:
    """Bytes that two training steps need at once, beyond what the libraries need anyway."""
    place = torch.device(device)

    def two_steps(width: int, rank: int) -> None:
        net = network(width, rank).to(place)
        x, y = a_batch(batch_size, place)
        step = training_step(net, x, y, optimizer_of(net, rank))
        step()
        step()

    two_steps(32, min(rank, 8))  # starts threads, loads what is loaded on first use
    before = PeakMemory(place).read()
    memory = PeakMemory(place)
    two_steps(width, rank)
    return max(memory.read() - before, 1)  # a small one may fit into what is there


def break_even(rows: Sequence[dict[str, Any]], what: str = "step") -> float | None:
    """The rank at which a row's time crosses the dense one's, between measured ranks.

    Returns:
        A rank, interpolated linearly; the greatest measured one if even that is faster, or None if
        none is.
    """
    dense = next(row[what]["median"] for row in rows if row["rank"] == DENSE)
    found = None
    before: tuple[float, float] | None = None
    for row in sorted((r for r in rows if r["rank"] != DENSE), key=lambda r: r["rank"]):
        rank, time = float(row["rank"]), row[what]["median"]
        if time > dense:
            if before is None:
                return None
            last, faster = before
            return last + (rank - last) * (dense - faster) / (time - faster)
        before, found = (rank, time), rank
    return found
