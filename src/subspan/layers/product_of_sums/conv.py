"""``nn.Conv2d`` with a product of sums for its kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from subspan.errors import SubspanError
from subspan.layers.computed import guard
from subspan.layers.plain import Convolution, autocast_type
from subspan.layers.product_of_sums.layer import ProductOfSums
from subspan.layers.product_of_sums.order import Plan, example_size, plan_product


class ProductOfSumsConv2d(ProductOfSums, Convolution, replaces=nn.Conv2d):
    """``nn.Conv2d`` with a product of sums for its kernel, out × (in·k²).

    The last factors make filters, and the first ones a 1×1 convolution of what these give, or all
    of them one kernel, whatever is cheapest for the number of places.

    Args:
        in_channels: of the input.
        out_channels: n.
        kernel_size: of the filters.
        factors: as of :class:`ProductOfSumsLinear`, with m = in_channels·k².
        stride: as in ``nn.Conv2d``.
        padding: as there.
        dilation: as there.
        bias: as of :class:`ProductOfSumsLinear`.
        padding_mode: as in ``nn.Conv2d``.
        seed: of the fixed matrices, in [0, 2⁶⁴).
        stream: in [0, 2¹⁸).
        init: "he", "glorot" or "lecun".
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        SubspanError: for factors that do not chain, or that cannot be.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        factors: Sequence[Any],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool | int = True,
        padding_mode: str = "zeros",
        *,
        seed: int = 0,
        stream: int = 0,
        init: str = "he",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.set_geometry(
            in_channels, out_channels, kernel_size, stride, padding, dilation, padding_mode
        )
        m = in_channels * math.prod(self.kernel_size)
        super().__init__(out_channels, m, factors, bias, seed, stream, init, device, dtype)

    def cost(self, places: int) -> tuple[Plan | None, Plan]:
        """Say how so many places (batch × height × width of the output) are computed.

        The plan of the 1×1 convolution, or None, is followed by that of the filters.
        """
        places = example_size(places)
        if places not in self._plans:
            self._plans[places] = self._cheapest(places)
        return self._plans[places]

    def _cheapest(self, places: int) -> tuple[Plan | None, Plan]:
        """Try every factor as the first of the filters."""
        least, best = math.inf, None
        for cut in range(len(self.sums)):
            filters = plan_product(self.sums[cut:], None, cut)
            after = plan_product(self.sums[:cut], places) if cut else None
            cost = filters.cost + places * self.sums[cut].n * self.shape[1]
            cost += after.cost if after else 0
            if cost < least:
                least, best = cost, (after, filters)
        assert best is not None
        return best

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H', W'), also of one image without B."""
        if x.dim() == 3:
            return self._images(x.unsqueeze(0)).squeeze(0)
        if x.dim() != 4:
            raise SubspanError(f"expected images (B, in, H, W) or (in, H, W), got {tuple(x.shape)}")
        return self._images(x)

    def _images(self, x: Tensor) -> Tensor:
        x, padding = self.pad(x)
        if isinstance(padding, str):  # zeros that are as many on both sides
            raise AssertionError(padding)
        places = x.shape[0]
        geometry = (x.shape[-2:], padding, self.dilation, self.kernel_size, self.stride)
        for side, p, d, k, s in zip(*geometry, strict=True):
            places *= (side + 2 * p - d * (k - 1) - 1) // s + 1
        after, filters = self.cost(places)
        kernel = self._kernel(self._form(filters, None))
        bias = self.full_bias()
        h = F.conv2d(
            x, kernel, bias if after is None else None, self.stride, padding, self.dilation
        )
        if after is None:
            return h
        rows = h.movedim(1, -1)
        y = self._form(after, rows.reshape(-1, h.shape[1])).view(*rows.shape[:-1], self.shape[0])
        y = y if bias is None else y + bias
        y = y.to(autocast_type(y)).movedim(-1, 1)
        # Channels last now: as it came out of the convolution, for somebody may take a view of it.
        return y.contiguous() if h.is_contiguous() else y

    def _kernel(self, flat: Tensor) -> Tensor:
        return flat.reshape(-1, self.in_channels, *self.kernel_size)

    @property
    def weight(self) -> Tensor:
        """(out, in, k, k)."""
        return guard(self._kernel(self.matrix))

    def dense(self) -> nn.Conv2d:
        """``nn.Conv2d`` with this kernel."""
        return self.ordinary(self.weight, self.full_bias())

    def extra_repr(self) -> str:
        """Sizes, and the factors."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, {self.describe_factors()}"
        )
