"""In which order samples come: a pure function of the seed and the epoch.

Permutations are those of `subspan.philox`, so that splits and batches outlive the versions of
every library.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from subspan.errors import SubspanError
from subspan.lab.data.images import Split
from subspan.philox import Source

# The generator's domain of everything about data (the families of projections count from 0), and
# its streams: which samples are held out for the test, which for validation, and the batches.
DOMAIN = 200
TEST, VALIDATION, BATCHES = range(3)
FILL = -100  # a label that counts for nothing: ``cross_entropy`` ignores it


def permutation(
    size: int, *, seed: int, stream: int, epoch: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """A permutation of [0, size): int64 (size,)."""
    shuffle = Source(seed, DOMAIN, stream).permutation(size, step=epoch)
    return shuffle(torch.arange(size, device=device))


def hold_out(split: Split, fraction: float, *, seed: int, stream: int) -> tuple[Split, Split]:
    """Divide a split at random into a rest and ``fraction`` of it; both keep their order.

    Raises:
        SubspanError: ``fraction`` is not in [0, 1), or one of the two parts would be empty
            although the other is asked for.
    """
    held = round(fraction * len(split)) if 0 <= fraction < 1 else -1
    if held < 0 or held == len(split) or (held == 0 and fraction > 0):
        raise SubspanError(
            "the part to hold out must be a fraction in [0, 1) that leaves a sample on both "
            f"sides, got {fraction} of {len(split)} samples"
        )
    order = permutation(len(split), seed=seed, stream=stream)
    return split.select(order[held:].sort().values), split.select(order[:held].sort().values)


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """How many batches `batches` yields.

    Raises:
        SubspanError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise SubspanError(f"batch size must be at least 1, got {batch_size}")
    return -(-len(split) // batch_size)


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of batches, each gathered on the split's device by one ``index_select``.

    The global batches do not depend on the number of processes: rank r of ``world`` gets the r-th
    of equal parts of each. Only the last, smaller batch may not be divisible: some parts then have
    one sample less, and are filled up by one that other ranks have, with the label `FILL`. So every
    sample counts exactly once, and every rank computes as much as the others.

    Args:
        split: what to draw from.
        batch_size: samples of one step over all ranks, a multiple of ``world``.
        seed: of the order, in [0, 2⁶⁴).
        epoch: of the order, in [0, 2³²).
        shuffle: whether to permute the samples; otherwise they come as they are stored.
        rank: this process, in [0, world).
        world: number of processes.

    Returns:
        An iterator over ``(images, labels)``: uint8 (n, C, H, W) and int64 (n,).

    Raises:
        SubspanError: at the call, not at the first batch: a size or rank out of its range.
    """
    steps = steps_per_epoch(split, batch_size)
    if batch_size % world:
        raise SubspanError(
            f"batch size must be a multiple of the number of processes, got {batch_size} for "
            f"{world} processes: use {batch_size + -batch_size % world}"
        )
    if not 0 <= rank < world:
        raise SubspanError(f"rank must be in [0, {world}), got {rank}")
    device = split.labels.device
    order = (
        permutation(len(split), seed=seed, stream=BATCHES, epoch=epoch, device=device)
        if shuffle
        else torch.arange(len(split), device=device)
    )
    wholes = (order[step * batch_size :][:batch_size] for step in range(steps))
    return (_part(split, whole, rank, world) for whole in wholes)


def _part(split: Split, whole: Tensor, rank: int, world: int) -> tuple[Tensor, Tensor]:
    size = len(whole)
    own = whole[size * rank // world : size * (rank + 1) // world]
    missing = -(-size // world) - len(own)
    mine = split.select(torch.cat([own, whole[:missing]]) if missing else own)
    mine.labels[len(own) :] = FILL
    return mine.images, mine.labels
