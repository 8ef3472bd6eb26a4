"""One training step on random images, as several parts time it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from subspan.bench import candidates
from subspan.bench.part import Part, Quantity
from subspan.bench.settings import Bench
from subspan.training import nets

SHAPE = (1, 28, 28)


class StepPart(Part):
    """A part that measures training steps of each network."""

    shared: tuple[str, ...] = ("net",)
    quantities: tuple[Quantity, ...] = (Quantity("step", "step ms", "a training step"),)
    subject = "trained by"

    def check(self, settings: Bench) -> None:
        """Refuse a d that does not fit into one of the networks.

        Raises:
            SubspanError: for such a d.
        """
        for net in settings.nets:
            candidates.make("hash", nets.weights(net, SHAPE), settings.dim)

    def count(self, settings: Bench) -> int:
        """Count the networks."""
        return len(settings.nets)


def random_batch(batch_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw random images (B, 1, 28, 28) and classes (B,)."""
    x = torch.randn(batch_size, *SHAPE, device=device)
    return x, torch.randint(0, 10, (batch_size,), device=device)


def training_step(
    net: nn.Module, x: torch.Tensor, y: torch.Tensor, optimizer: Optimizer | None = None
) -> Callable[[], object]:
    """Make a step of Adam (or another optimizer), forward and backward pass included."""
    optimizer = optimizer or torch.optim.Adam(net.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()

    return step
