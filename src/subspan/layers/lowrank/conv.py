"""``nn.Conv2d`` with the kernel U S Vᵀ."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from subspan.layers.computed import guard
from subspan.layers.lowrank.layer import LowRank
from subspan.layers.plain import Convolution, fill
from subspan.layers.watched import filters
from subspan.precision import full_precision
from subspan.subspace.functions import ordinary_tensors


class LowRankConv2d(LowRank, Convolution, replaces=nn.Conv2d):
    """``nn.Conv2d`` with the kernel U S Vᵀ, out × (in·k²): r filters, then a 1×1 convolution.

    Args:
        in_channels: of the input.
        out_channels: n.
        kernel_size: of the filters.
        rank: r, at most min(n, in_channels·k²).
        stride: as in ``nn.Conv2d``.
        padding: as there.
        dilation: as there.
        bias: whether there is one.
        padding_mode: as there.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        SubspanError: for a rank that is not in [1, min(n, in_channels·k²)].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        rank: int,
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.set_geometry(
            in_channels, out_channels, kernel_size, stride, padding, dilation, padding_mode
        )
        m = in_channels * math.prod(self.kernel_size)
        super().__init__(out_channels, m, rank, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H', W'), or the same without B."""
        images, padding = self.pad(x.unsqueeze(0) if x.dim() == 3 else x)
        y = self._output(images, (self.kernel_size, self.stride, padding, self.dilation))
        return y.squeeze(0) if x.dim() == 3 else y

    @property
    def weight(self) -> Tensor:
        """(out, in, k, k)."""
        return guard(self._matrix().view(-1, self.in_channels, *self.kernel_size))

    def dense(self) -> nn.Conv2d:
        """``nn.Conv2d`` with this kernel."""
        return self.ordinary(self.weight, self.bias)

    def two_factors(self) -> nn.Sequential:
        """Vᵀ as r filters without a bias, then a 1×1 convolution."""
        with ordinary_tensors(), full_precision(self.U.device):
            K, first = self.U @ self.S, filters(self.V, self.kernel_size)
            last = nn.Conv2d(K.shape[1], K.shape[0], 1, bias=self.bias is not None, device="meta")
            return nn.Sequential(
                self.ordinary(first, None), fill(last, K[..., None, None], self.bias)
            )

    def extra_repr(self) -> str:
        """Describe the layer in the words of ``nn.Conv2d``, and its rank."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"rank={self.rank}, stride={self.stride}, padding={self.padding}, "
            f"bias={self.bias is not None}"
        )
