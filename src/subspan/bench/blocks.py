"""Measures what it costs to train a large network through few numbers: memory and steps.

The network is a row of residual blocks n → h → n. Memory is in units of all weights: 3 is what
training them with Adam takes (a gradient, two moments). Everything is measured twice, with a
malloc that gives back what is freed and with glibc's as it comes, which keeps freed blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from subspan.bench import variants
from subspan.bench.apart import ALLOCATOR
from subspan.bench.variants import CHECKPOINTED, FROZEN, FULL, LORA, SUBSPAN, Problem
from subspan.errors import SubspanError

VARIANTS = (FULL, FROZEN, SUBSPAN, CHECKPOINTED, LORA)
ALLOCATORS: dict[str, dict[str, str]] = {"given back at once": ALLOCATOR, "as glibc keeps it": {}}
SMALL = (1, 32, 64)


class Block(nn.Module):
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
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(number))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        """(B, n) → (B, n)."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def parsed(size: str) -> tuple[int, int, int]:
    """The number of blocks, their width and their hidden width: 24x1024x4096.

    Raises:
        SubspanError: for anything else.
    """
    words = size.replace("_", "").split("x")
    if len(words) != 3 or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise SubspanError(
            "blocks are a number, a width and a hidden width, as in 24x1024x4096 (24 blocks "
            f"1024 → 4096 → 1024), got {size!r}"
        )
    number, width, hidden = map(int, words)
    return number, width, hidden


def weights(size: str) -> int:
    """How many weights such a network has."""
    number, width, hidden = parsed(size)
    return number * (2 * width * hidden + width + hidden)


def steps(
    variant: str, size: str, batch_size: int, dim: int, device: str
) -> Iterator[dict[str, Any]]:
    """Train in this process, see :func:`subspan.bench.variants.steps`."""
    place = torch.device(device)

    def make(large: bool) -> Problem:
        number, width, hidden = parsed(size) if large else SMALL
        net = Blocks(number, width, hidden, variant == CHECKPOINTED).to(place)
        x = torch.randn(batch_size, width, device=place)

        def loss(net: nn.Module, to_input: bool) -> Tensor:
            return net(x.detach().requires_grad_(to_input)).square().mean()

        return Problem(net, loss)

    return variants.steps(make, variant, dim, place)


def measure(
    size: str,
    batches: Sequence[int],
    dim: int,
    seconds: float,
    device: torch.device,
    done: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row for every batch, allocator and variant.

    Args:
        size: as :func:`parsed` reads it.
        batches: vectors in a step.
        dim: d of the subspace.
        seconds: to spend on each; five steps at least.
        device: where.
        done: is told about every batch and allocator.

    Returns:
        Rows with ``blocks``, ``weights``, ``batch_size``, ``allocator``, ``dim`` and what
        :func:`subspan.bench.variants.measure` says.
    """
    rows = []
    for batch in batches:
        for name, variables in allocators(device).items():
            of_all = {
                "blocks": size,
                "weights": weights(size),
                "batch_size": batch,
                "allocator": name,
                "dim": dim,
            }
            arguments = (size, batch, dim, str(device))
            rows += [
                of_all | row
                for row in variants.measure(
                    steps, arguments, VARIANTS, 4 * weights(size), seconds, variables
                )
            ]
            done(f"blocks {size}, batch of {batch}, {name}")
    return rows


def allocators(device: torch.device) -> dict[str, dict[str, str]]:
    """Name what is compared: on a GPU glibc has no part in it."""
    return {"PyTorch's": {}} if device.type == "cuda" else ALLOCATORS
