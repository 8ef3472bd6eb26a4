"""A keyed permutation of any number of rows in which no row takes longer than another.

:class:`~subspan.philox.Permutation` sends an index that leaves [0, n) through its rounds again, so
that the lanes of a processor wait for each other. Here the rows are cut into blocks of 2^k rows,
one for each binary digit of their number, and each block is permuted by rounds that are bijections
of k bits: an exclusive or with a key, a product with an odd number, and a shift. Only the tail of
fewer than 2¹⁰ rows has a permutation of the other kind, as so few bits need.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from subspan.philox import Source

LARGEST, SMALLEST = 32, 10  # log₂ of the rows of a block
MULTIPLIERS = (0x85EBCA6B, 0xC2B2AE35, 0x9E3779B1, 0x27D4EB2F)  # one for each round
# Columns of random numbers: round keys of the tail, keys of the blocks, and then the signs of rows,
# SPAN to a column.
TAIL, KEYS, SIGNS = 0, 1, 2
SPAN = 1 << 39


def blocks(size: int) -> Iterator[tuple[int, int]]:
    """First row and log₂ of the rows of every block of [0, size), in order.

    They are as many as there are of 2³² rows, and one for every binary digit of the rest from 2³¹
    down to 2¹⁰. The tail of size mod 2¹⁰ rows is not among them.
    """
    start = 0
    for _ in range(size >> LARGEST):
        yield start, LARGEST
        start += 1 << LARGEST
    for bits in range(LARGEST - 1, SMALLEST - 1, -1):
        if size >> bits & 1:
            yield start, bits
            start += 1 << bits


def shuffled(
    source: Source, size: int, start: int, stop: int, *, step: Tensor, device: torch.device
) -> Tensor:
    """Images of start … stop−1 under the permutation of [0, size): int64 (stop − start,)."""
    parts = []
    for number, (first, bits) in enumerate(blocks(size)):
        low, high = max(start, first), min(stop, first + (1 << bits))
        if low < high:
            x = torch.arange(low - first, high - first, device=device)
            keys = source.words(torch.tensor(number, device=device), KEYS, step)
            for key, multiplier in zip(keys, MULTIPLIERS, strict=True):
                # The product may wrap; its low bits are right all the same.
                x = (x ^ key) * multiplier & (1 << bits) - 1
                x = x ^ x >> (bits + 1) // 2
            parts.append(x + first)
    tail = size % (1 << SMALLEST)
    first = size - tail
    if stop > first:
        rows = torch.arange(max(start, first) - first, stop - first, device=device)
        parts.append(source.permutation(tail, column=TAIL, step=step)(rows) + first)
    return torch.cat(parts)
