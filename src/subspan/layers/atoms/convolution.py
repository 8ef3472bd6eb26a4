"""The matrix of a convolution."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from subspan.errors import SubspanError
from subspan.layers.atoms.base import Sum


class ConvolutionMatrix(Sum, kind="convolution"):
    """A convolution of images as a matrix: the atoms of a kernel's entry are shifts of a channel.

    Rows are (channel, row, column) of the output, columns of the input, of the same height and
    width; what lies outside the image is zero.
    """

    def setup(self, height: int, width: int, kernel: int = 3) -> None:  # type: ignore[override]
        """``height`` and ``width`` of the image, and the side of the ``kernel``, odd."""
        pixels = height * width
        if min(height, width, kernel) < 1 or self.n % pixels or self.m % pixels or kernel % 2 == 0:
            raise SubspanError(
                f"{self.kind} needs images that divide {self.n} and {self.m}, and an odd kernel, "
                f"got {height} × {width} pixels and {kernel}"
            )
        self.image, self.kernel = (height, width), kernel
        self.out, self.inside = self.n // pixels, self.m // pixels
        self.p = self.out * self.inside * kernel**2
        half = kernel // 2
        seen = [
            sum(0 <= i + s < side for i in range(side) for s in range(-half, half + 1))
            for side in self.image
        ]
        self.energy = float(self.out * self.inside * math.prod(seen))
        self.matrix_cost = self.n * self.m
        self.apply_cost = self.p * pixels

    def _kernel(self, a: Tensor) -> Tensor:
        return a.view(self.out, self.inside, self.kernel, self.kernel)

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        images = x.reshape(-1, self.inside, *self.image)
        y = F.conv2d(images, self._kernel(a), padding=self.kernel // 2)
        return y.reshape(*x.shape[:-1], self.n)

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        images = y.reshape(-1, self.out, *self.image)
        x = F.conv_transpose2d(images, self._kernel(a), padding=self.kernel // 2)
        return x.reshape(*y.shape[:-1], self.m)
