"""Ordinary layers with given weights, and the geometry of a convolution of ours."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from subspan.precision import autocast_dtype

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def fill(layer: Layer, weight: Tensor, bias: Tensor | None) -> Layer:
    """Give a layer without values copies of these."""
    contiguous = torch.contiguous_format
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=contiguous))
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """``nn.Linear`` with copies of a weight (n, m) and a bias (n,)."""
    n, m = weight.shape
    return fill(nn.Linear(m, n, bias=bias is not None, device="meta"), weight, bias)


def autocast_type(x: Tensor) -> torch.dtype:
    """Give the type of what an ordinary layer makes of x: autocast's, where it is on."""
    return x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device) or x.dtype


class Convolution(nn.Module):
    """A layer that makes its kernel itself, with the arguments of ``nn.Conv2d``."""

    def set_geometry(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int], padding: str | int | tuple[int, int],
        dilation: int | tuple[int, int], padding_mode: str,
    ) -> None:  # fmt: skip
        """Take the arguments of ``nn.Conv2d``."""
        # PyTorch's own reading of them, on a layer without values.
        plain = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation,
            bias=False, padding_mode=padding_mode, device="meta",  # type: ignore[arg-type]
        )  # fmt: skip
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = plain.kernel_size, plain.stride
        self.dilation, self.padding, self.padding_mode = plain.dilation, plain.padding, padding_mode
        # Whatever is not the same number of zeros on both sides is added before the convolution.
        uneven = padding_mode != "zeros" or isinstance(plain.padding, str)
        self._before = tuple(plain._reversed_padding_repeated_twice) if uneven else ()

    def pad(self, x: Tensor) -> tuple[Tensor, str | tuple[int, ...]]:
        """Return the input, and the padding that ``F.conv2d`` is still to add."""
        if not self._before:
            return x, self.padding
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._before, mode), (0, 0)

    def ordinary(self, kernel: Tensor, bias: Tensor | None) -> nn.Conv2d:
        """``nn.Conv2d`` with copies of a kernel (out, in, k, k) and a bias."""
        plain = nn.Conv2d(
            self.in_channels, len(kernel), self.kernel_size, self.stride, self.padding,  # type: ignore[arg-type]
            self.dilation, bias=bias is not None, padding_mode=self.padding_mode, device="meta",  # type: ignore[arg-type]
        )  # fmt: skip
        return fill(plain, kernel, bias)
