"""Filters that multiply the cosine spectrum of an image: a network without convolutions.

Source: Wu, "ProdSumNet", arXiv 1809.02209, 2018, section 6. A filter bank is diagonal in the
spectrum, so that its weight is a product of sums with few numbers:

    Y_o = Cᵀ R (Σ_c H_oc ⊙ (C X_c Cᵀ)) Rᵀ C,        H_o = Σⱼ a_oj D_j

C is the orthonormal DCT-II, D_j a tuple of random diagonals, one for each channel, shared by all
filters, and R cuts off high frequencies: a reduction of the image without aliasing.

Independent random numbers on a diagonal are a filter as wide as the image. A diagonal that is
smooth, D = Gᵀ Z G with cosines G of the frequency and random Z, is one of a small support, around
each pixel and even in both directions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from subspan.errors import SubspanError
from subspan.families import projection
from subspan.layers.atoms import cosines
from subspan.layers.derived import DerivedBuffers
from subspan.layers.plain import autocast_type
from subspan.precision import full_precision


class SpectralFilters(DerivedBuffers):
    """A bank of filters in the cosine spectrum, each a sum of p random diagonal tuples.

    Args:
        in_channels: of the input.
        out_channels: filters.
        size: height and width of the images, one number if they are equal.
        p: coefficients of a filter.
        out_size: of the output: lower than ``size``, the lowest frequencies only.
        support: s of filters that reach s − 1 pixels to each side: their diagonals are made of
            s × s random numbers; None for independent ones, and filters as wide as the image.
        bias: whether there is one, a number for each filter.
        family: of :func:`subspan.projections`, of which the D_j are columns.
        seed: of the D_j, in [0, 2⁶⁴).
        stream: in [0, 2²⁴); tells layers of one seed apart.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        SubspanError: for sizes that do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int | tuple[int, int],
        p: int,
        out_size: int | tuple[int, int] | None = None,
        bias: bool = True,
        *,
        support: int | None = None,
        family: str = "rademacher",
        seed: int = 0,
        stream: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        size = (size, size) if isinstance(size, int) else size
        out_size = size if out_size is None else out_size
        out_size = (out_size, out_size) if isinstance(out_size, int) else out_size
        if not all(1 <= out <= side for out, side in zip(out_size, size, strict=True)):
            raise SubspanError(f"out_size must be at most {size}, the image's, got {out_size}")
        if support is not None and not 1 <= support <= min(size):
            raise SubspanError(f"support must be in [1, {min(size)}], got {support}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.size, self.out_size, self.p, self.support = size, out_size, p, support
        self.drawn = out_size if support is None else (support, support)
        numbers = in_channels * math.prod(self.drawn)
        self.atoms = projection(family, out_dim=numbers, in_dim=p, seed=seed, stream=stream)
        like = {"device": device, "dtype": dtype}
        # A vector, so that nobody takes it for a weight with fans.
        self.a = nn.Parameter(torch.empty(out_channels * p, **like))  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.empty(out_channels, **like)) if bias else None  # type: ignore[arg-type]
        energy = 1.0  # of H at a frequency, of random numbers of variance 1
        for name, table in self.register_derived(self.a).items():
            if name.startswith("_smooth"):
                energy *= float(table.square().sum(dim=1).mean())
        # Columns of P have norm 1, coefficients a variance of 1/p: variance is kept twofold (He).
        self.scale = math.sqrt(2 * numbers / in_channels / energy)
        self.reset_parameters()

    def derive(self) -> dict[str, Tensor]:
        """Make the cosines, in float64."""
        tables = {}
        for i, (side, out) in enumerate(zip(self.size, self.out_size, strict=True)):
            tables[f"_analysis{i}"] = cosines(side)[:out]
            tables[f"_synthesis{i}"] = cosines(out)
            if self.support is not None:
                tables[f"_smooth{i}"] = _smooth(side, self.support)[:out]
        return tables

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal coefficients, as large as the weights of other layers; a bias of zero."""
        self.a.normal_(std=1 / math.sqrt(self.p))
        if self.bias is not None:
            self.bias.zero_()

    @property
    def filters(self) -> Tensor:
        """H, (out, in, height, width) of the output's size."""
        rows = [self.atoms.matvec(a) for a in self.a.view(-1, self.p)]
        drawn = torch.stack(rows).view(self.out_channels, self.in_channels, *self.drawn)
        if self.support is not None:
            with full_precision(drawn.device):
                drawn = self.derived("_smooth0") @ drawn @ self.derived("_smooth1").T
        return self.scale * drawn

    def forward(self, x: Tensor) -> Tensor:
        """(…, in, height, width) → (…, out, height', width') of ``out_size``."""
        if x.shape[-3:] != (self.in_channels, *self.size):
            raise SubspanError(
                f"expected images of {self.in_channels} × {self.size[0]} × {self.size[1]}, got "
                f"{' × '.join(map(str, x.shape[-3:]))}"
            )
        spectrum = self.derived("_analysis0") @ x @ self.derived("_analysis1").T
        # For every frequency a small matrix: filters × channels.
        y = torch.einsum("...cuv,ocuv->...ouv", spectrum, self.filters)
        # A spectrum of fewer pixels is that of an image so many times as dark.
        y = self.derived("_synthesis0").T @ y @ self.derived("_synthesis1")
        y = y * math.sqrt(math.prod(self.out_size) / math.prod(self.size))
        y = y if self.bias is None else y + self.bias[:, None, None]
        return y.to(autocast_type(y))

    def extra_repr(self) -> str:
        """Sizes."""
        return (
            f"{self.in_channels}, {self.out_channels}, size={self.size}, p={self.p}, "
            f"out_size={self.out_size}, support={self.support}, {self.atoms.family}"
        )


def _smooth(side: int, support: int) -> Tensor:
    """Return G, (side, support): cos(π u k / side), times √2 for k > 0.

    Multiplying a spectrum by column k adds the pixels at a distance of k to both sides.
    """
    u, k = torch.arange(side, dtype=torch.float64), torch.arange(support, dtype=torch.float64)
    root = torch.tensor(math.sqrt(2), dtype=torch.float32)
    return torch.cos(math.pi / side * u[:, None] * k) * torch.where(k > 0, root, 1.0)
