"""Measures what it costs to train a large network through few numbers: memory and steps.

The network is a row of residual blocks n → h → n. Memory is in units of all weights: 3 is what
training them with Adam takes (a gradient, two moments). Everything is measured twice, with a
malloc that gives back what is freed and with glibc's as it comes, which keeps freed blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from subspan.bench import candidates
from subspan.bench.large_network import Problem, measure
from subspan.bench.large_part import LargePart
from subspan.bench.part import Measurement
from subspan.bench.settings import Bench
from subspan.bench.subprocess import ALLOCATOR

ALLOCATORS: dict[str, dict[str, str]] = {"given back at once": ALLOCATOR, "as glibc keeps it": {}}
SMALL = (1, 32, 64)


class ResidualBlock(nn.Module):
    """x + B relu(A x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n) → (B, n)."""
        y: Tensor = x + self.b(torch.relu(self.a(x)))
        return y


class Blocks(nn.Module):
    """Blocks in a row, checkpointed one by one or not at all."""

    def __init__(self, number: int, width: int, hidden: int, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(width, hidden) for _ in range(number))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        """(B, n) → (B, n)."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def weights(sizes: Sequence[int]) -> int:
    """Count the weights of a number of blocks, of a width and a hidden width."""
    number, width, hidden = sizes
    return number * (2 * width * hidden + width + hidden)


def problem(
    large: bool, checkpointed: bool, device: torch.device, sizes: Sequence[int], batch_size: int
) -> Problem:
    """Make the network and its loss, see :func:`subspan.bench.large_network.steps`."""
    number, width, hidden = sizes if large else SMALL
    x = torch.randn(batch_size, width, device=device)

    def loss(net: nn.Module, to_input: bool) -> Tensor:
        return net(x.detach().requires_grad_(to_input)).square().mean()

    return Problem(Blocks(number, width, hidden, checkpointed).to(device), loss)


def allocators(device: torch.device) -> dict[str, dict[str, str]]:
    """Name what is compared: on a GPU glibc has no part in it."""
    return {"PyTorch's": {}} if device.type == "cuda" else ALLOCATORS


class BlocksPart(LargePart):
    """A large network of dense blocks."""

    name = "blocks"
    help = (
        "ways to train a large network of dense blocks (24 of 1024 → 4096 → 1024, 201 million "
        "weights: minutes, and up to 8 GB): peak memory, steps, loss"
    )
    shared = ("blocks", "batch_size", "allocator")
    title = "{weights:,} weights, batch {batch_size}, memory {allocator}"
    heading = "blocks {blocks}, batch of {batch_size}, memory {allocator}"

    def check(self, settings: Bench) -> None:
        """Refuse a d that does not fit into the network."""
        candidates.make("hash", weights(settings.block_sizes), settings.large_dim)

    def count(self, settings: Bench) -> int:
        """Count batches and allocators."""
        return len(settings.batches) * len(allocators(settings.torch_device))

    def measure(self, settings: Bench, done: Callable[[str], None]) -> list[Measurement]:
        """Measure every batch, allocator and way to train.

        Returns:
            Rows with ``blocks``, ``weights``, ``batch_size``, ``allocator``, ``dim`` and those of
            :func:`subspan.bench.large_network.measure`.
        """
        rows: list[Measurement] = []
        sizes, number = settings.block_sizes, weights(settings.block_sizes)
        for batch_size in settings.batches:
            for name, allocator in allocators(settings.torch_device).items():
                common = {
                    "blocks": settings.blocks,
                    "weights": number,
                    "batch_size": batch_size,
                    "allocator": name,
                    "dim": settings.large_dim,
                }
                found = measure(__name__, (sizes, batch_size), settings, 4 * number, allocator)
                rows += [common | row for row in found]
                done(f"blocks {settings.blocks}, batch of {batch_size}, {name}")
        return rows


BlocksPart()
