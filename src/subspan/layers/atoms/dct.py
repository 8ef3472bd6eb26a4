"""The cosine transform, of one axis or two."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from subspan.errors import SubspanError
from subspan.layers.atoms.fixed import Fixed


class DCT(Fixed, kind="dct"):
    """The first n two-dimensional cosines of a square image in zig-zag order, orthonormal.

    DCT-II; the image has m pixels, or ``channels`` of them: then every channel has n / channels.
    """

    def setup(self, channels: int = 1) -> None:
        """``channels`` of the image."""
        if not isinstance(channels, int) or channels < 1 or self.n % channels or self.m % channels:
            raise SubspanError(
                f"{self.kind} needs channels that divide {self.n} and {self.m}, got {channels!r}"
            )
        self.channels, self.side = channels, math.isqrt(self.m // channels)
        if self.side**2 * channels != self.m:
            raise SubspanError(
                f"{self.kind} is of square images: {self.m // channels} pixels are none"
            )
        if self.n > self.m:
            raise SubspanError(
                f"{self.kind} of an image of {self.m} pixels has no {self.n} components"
            )
        self.energy = float(self.n)
        each = self.n // channels
        self.apply_cost = channels * each * (self.m // channels)
        self.matrix_cost = self.n * self.m

    def constants(self) -> tuple[Tensor, ...]:
        one = cosines(self.side)
        order = zigzag(self.side)[: self.n // self.channels]
        rows = [(one[i][:, None] * one[j]).flatten() for i, j in order]
        return (torch.stack(rows).float(),)

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        return F.linear(x.unflatten(-1, (self.channels, -1)), constants[0]).flatten(-2)

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        return (y.unflatten(-1, (self.channels, -1)) @ constants[0]).flatten(-2)


def cosines(size: int) -> Tensor:
    """Return the orthonormal DCT-II, (size, size) in float64: row k has frequency k."""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * k[:, None] * (k + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def zigzag(side: int) -> list[tuple[int, int]]:
    """Frequencies (row, column) of a square in JPEG's order: (0, 0), (0, 1), (1, 0), (2, 0)."""
    frequencies = []
    for diagonal in range(2 * side - 1):
        low, high = max(0, diagonal - side + 1), min(diagonal, side - 1)
        rows = range(low, high + 1) if diagonal % 2 else range(high, low - 1, -1)
        frequencies += [(row, diagonal - row) for row in rows]
    return frequencies
