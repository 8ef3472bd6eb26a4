"""The time of a whole training step, against the ordinary step of the same network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from subspan.bench import candidates
from subspan.bench.timing import interleaved
from subspan.families import stored
from subspan.subspace.model import SubspaceModel
from subspan.training import nets

SHAPE = (1, 28, 28)


def a_batch(batch_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and classes."""
    x = torch.randn(batch_size, *SHAPE, device=device)
    return x, torch.randint(0, 10, (batch_size,), device=device)


def training_step(
    net: nn.Module, x: torch.Tensor, y: torch.Tensor, optimizer: Optimizer | None = None
) -> Callable[[], object]:
    """One step of Adam (or another optimizer), forward and backward pass included."""
    optimizer = optimizer or torch.optim.Adam(net.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def measure(
    methods: Sequence[str],
    net_names: Sequence[str],
    dim: int,
    batch_size: int,
    seconds: float,
    device: torch.device,
    done: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row for every network and projection, and one for plain Adam on all weights.

    Args:
        methods: names of :func:`candidates.names`.
        net_names: networks by name, for images of 28 by 28 pixels.
        dim: d of all of them.
        batch_size: images in a step.
        seconds: to spend on each.
        device: where.
        done: is told about every network that is done.

    Returns:
        Rows with ``net``, ``weights``, ``projection`` ("adam" for the ordinary training), ``dim``,
        ``batch_size`` and the timing ``step``; or ``skipped``, a reason.
    """
    rows = []
    for name in net_names:
        weights = nets.weights(name, SHAPE)
        x, y = a_batch(batch_size, device)
        here, steps = {}, {}
        for method in (candidates.PLAIN, *methods):
            row: dict[str, Any] = {
                "net": name,
                "weights": weights,
                "projection": method,
                "dim": dim,
                "batch_size": batch_size,
            }
            rows.append(row)
            net = nets.build(name, SHAPE)
            if method != candidates.PLAIN:
                if reason := candidates.too_large(method, weights, dim, device):
                    row["skipped"] = reason
                    continue
                net = SubspaceModel(net, dim, **candidates.options(method))
            here[method], steps[method] = row, training_step(net.to(device), x, y)
        for method, timing in interleaved(steps, seconds, device).items():
            here[method]["step"] = timing
        stored.forget()
        done(f"training steps of {name}")
    return rows
