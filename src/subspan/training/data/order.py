"""In which order samples come: a pure function of the seed and the epoch.

Permutations are those of `subspan.philox`, so that splits and batches outlive the versions of
every library.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from subspan.errors import SubspanError
from subspan.philox import Source

# The generator's domain of everything about data (the families of projections count from 0), and
# its streams: which samples are held out for the test, which for validation, the batches, and where
# shuffled labels go.
DOMAIN = 200
TEST, VALIDATION, BATCHES, LABELS = range(4)


class Samples(Protocol):
    """Samples that can be chosen from by their numbers."""

    def __len__(self) -> int: ...

    def select(self, index: Tensor) -> Self:
        """Return the samples at ``index`` (int64), in that order."""


Chosen = TypeVar("Chosen", bound=Samples)


def permutation(
    size: int, *, seed: int, stream: int, epoch: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Return a permutation of [0, size): int64 (size,)."""
    shuffle = Source(seed, DOMAIN, stream).permutation(size, step=epoch)
    return shuffle(torch.arange(size, device=device))


def hold_out(split: Chosen, fraction: float, *, seed: int, stream: int) -> tuple[Chosen, Chosen]:
    """Divide a split at random into a rest and ``fraction`` of it; both keep their order.

    Raises:
        SubspanError: ``fraction`` is not in [0, 1), or one of the two parts would be empty
            although the other is asked for.
    """
    held = round(fraction * len(split)) if 0 <= fraction < 1 else -1
    if held < 0 or held == len(split) or (held == 0 and fraction > 0):
        share = "validation" if stream == VALIDATION else "the test part"
        remedy = "give another share, or " * (stream == VALIDATION) + "have more samples"
        raise SubspanError(
            f"{share} must be a share in [0, 1) that leaves a sample on both sides, got {fraction} "
            f"of {len(split)} samples: {remedy}"
        )
    order = permutation(len(split), seed=seed, stream=stream)
    return split.select(order[held:].sort().values), split.select(order[:held].sort().values)


def steps_per_epoch(size: int, batch_size: int) -> int:
    """Count the batches in an epoch of ``size`` samples."""
    return -(-size // batch_size)


def batches(
    size: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, float]]:
    """Yield one epoch of batches: the indices of their samples, and their mean's weight.

    The global batches do not depend on the number of processes: rank r of ``world`` gets the r-th
    of equal parts of each; ``batch_size`` is of all together, a multiple of ``world``. Only the
    last, smaller batch may not be divisible: some parts then have one sample less, and their means
    weigh less, so that the average over the ranks of weight times mean is the mean of the joint
    batch.

    Indices are int64 (n,) with n at least 1. The weight is the share of the batch that this part
    is, times ``world``: 1 but for a last, smaller batch, and 0 for the sample of a rank to which
    none is left.
    """
    order = permutation(size, seed=seed, stream=BATCHES, epoch=epoch, device=device)
    return (_part(whole, rank, world) for whole in order.split(batch_size))


def _part(whole: Tensor, rank: int, world: int) -> tuple[Tensor, float]:
    size = len(whole)
    own = whole[size * rank // world : size * (rank + 1) // world]
    # Everyone takes part in a step, if only by a sample that weighs nothing.
    return own if len(own) else whole[:1], len(own) * world / size
