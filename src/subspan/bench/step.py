"""One training step on random images, as several parts time it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from subspan.bench import candidates
from subspan.bench.part import Measurement, Part, Quantity
from subspan.bench.settings import Bench
from subspan.bench.timing import interleaved
from subspan.families import stored
from subspan.training import nets

SHAPE = (1, 28, 28)


class StepPart(Part):
    """A part that measures training steps of each network."""

    shared: tuple[str, ...] = ("net",)
    quantities: tuple[Quantity, ...] = (Quantity("step", "step ms", "a training step"),)
    subject = "trained by"

    def check(self, settings: Bench) -> None:
        """Refuse a d that does not fit into one of the networks."""
        for net in settings.nets:
            candidates.make("hash", nets.weights(net, SHAPE), settings.dim)

    def count(self, settings: Bench) -> int:
        """Count the networks."""
        return len(settings.nets)


def time_steps(
    settings: Bench,
    methods: Sequence[str],
    prepare: Callable[[nn.Module, str], tuple[nn.Module, Optimizer]],
    done: Callable[[str], None],
) -> list[Measurement]:
    """Time a training step of every network by every method, in turns.

    Methods of stored matrices that are too large here are skipped. ``prepare`` makes, of a network
    and a method, what is trained and its optimizer; ``done`` is called with the name of each
    network. Return rows with ``net``, ``weights``, ``projection`` (the method), ``dim``,
    ``batch_size`` and the timing ``step``.
    """
    rows, device, dim = [], settings.torch_device, settings.dim
    for name in settings.nets:
        weights = nets.weights(name, SHAPE)
        x, y = random_batch(settings.batch_size, device)
        timed, steps = {}, {}
        for method in methods:
            row: Measurement = {
                "net": name,
                "weights": weights,
                "projection": method,
                "dim": dim,
                "batch_size": settings.batch_size,
            }
            rows.append(row)
            if reason := candidates.too_large(method, weights, dim, device):
                row["skipped"] = reason
                continue
            trained, optimizer = prepare(nets.build(name, SHAPE).to(device), method)
            timed[method], steps[method] = row, training_step(trained, x, y, optimizer)
        for method, timing in interleaved(steps, settings.seconds, device).items():
            timed[method]["step"] = timing
        stored.forget()
        done(name)
    return rows


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
