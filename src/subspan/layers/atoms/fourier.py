"""Matrices whose products are convolutions: Toeplitz, Hankel, circulant, low displacement rank."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from subspan.errors import SubspanError
from subspan.layers.atoms.base import Sum

Product = Callable[..., Tensor]

# A complex butterfly takes about as long as this many multiply-adds of a matrix product do.
BUTTERFLY = 16
HALF = (torch.bfloat16, torch.float16)


def in_float32(product: Product) -> Product:
    """Compute a product by Fourier transforms in float32 where 16 bits came; they know none."""

    @functools.wraps(product)
    def wide(self: Sum, *tensors: Tensor) -> Tensor:
        x, a, *_ = tensors
        out = product(self, *(t.float() if t.dtype in HALF else t for t in tensors))
        return out.to(torch.promote_types(x.dtype, a.dtype))

    return wide


class Toeplitz(Sum, kind="toeplitz"):
    """M[i, k] = a[i − k + m − 1]: constant along diagonals. Products by FFT."""

    def setup(self) -> None:
        self.p = self.n + self.m - 1
        self.energy = float(self.n * self.m)
        self.matrix_cost = self.n * self.m
        self.apply_cost = _fft_cost(self.p + self.m) * 2

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:
        # Row i is the window of the reversed sequence that begins at n − 1 − i.
        return a.flip(0).unfold(0, self.m, 1).flip(0)

    @in_float32
    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        size = self.p + self.m - 1
        product = torch.fft.rfft(x, size) * torch.fft.rfft(a, size)
        return torch.fft.irfft(product, size)[..., self.m - 1 :][..., : self.n]

    @in_float32
    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        size = self.p + self.n - 1
        product = torch.fft.rfft(y, size) * torch.fft.rfft(a.flip(0), size)
        return torch.fft.irfft(product, size)[..., self.n - 1 :][..., : self.m]


class Hankel(Sum, kind="hankel"):
    """M[i, k] = a[i + k]: constant along anti-diagonals, a Toeplitz matrix with its rows turned."""

    def setup(self) -> None:
        self._toeplitz = Toeplitz(self.n, self.m, self.source.seed, self.source.stream)
        for name in ("p", "energy", "matrix_cost", "apply_cost"):
            setattr(self, name, getattr(self._toeplitz, name))

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:
        return a.unfold(0, self.m, 1)

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        return self._toeplitz.apply(x.flip(-1), a)

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        return self._toeplitz.apply_t(y, a).flip(-1)


class BlockCirculant(Sum, kind="block-circulant"):
    """Blocks of b × b that are circulant, each with b numbers (CirCNN, Ding 2017)."""

    def setup(self, block: int) -> None:  # type: ignore[override]
        """``block``: b, which divides n and m."""
        if not isinstance(block, int) or block < 1 or self.n % block or self.m % block:
            raise SubspanError(
                f"{self.kind} needs a block that divides {self.n} and {self.m}, got {block!r}"
            )
        self.block = block
        self.p = self.n * self.m // block
        self.energy = float(self.n * self.m)
        self.matrix_cost = self.n * self.m
        blocks = self.n // block, self.m // block
        self.apply_cost = _fft_cost(block) * sum(blocks) + 2 * math.prod(blocks) * block

    def _spectra(self, a: Tensor) -> Tensor:
        return torch.fft.rfft(a.view(self.n // self.block, self.m // self.block, self.block))

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:
        b = self.block
        place = torch.arange(b, device=a.device)
        # (N, M, b) → (N, M, b, b): M[i, k] = a[(i − k) mod b]
        blocks = a.view(self.n // b, self.m // b, b)[..., (place[:, None] - place) % b]
        return blocks.transpose(1, 2).reshape(self.n, self.m)

    @in_float32
    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        h = torch.fft.rfft(x.unflatten(-1, (-1, self.block)))
        y = torch.einsum("...mf,nmf->...nf", h, self._spectra(a))
        return torch.fft.irfft(y, self.block).flatten(-2)

    @in_float32
    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        h = torch.fft.rfft(y.unflatten(-1, (-1, self.block)))
        x = torch.einsum("...nf,nmf->...mf", h, self._spectra(a).conj())
        return torch.fft.irfft(x, self.block).flatten(-2)


class Circulant(BlockCirculant, kind="circulant"):
    """M[i, k] = a[(i − k) mod n]; products by FFT."""

    def setup(self) -> None:  # type: ignore[override]
        self._square()
        super().setup(self.n)


class LowDisplacementRank(Sum, kind="displacement"):
    """Low displacement rank r: M(a) = Σₖ Z₁(aₖ) Z₋₁(hₖ), h fixed and random (Sindhwani 2015).

    Z₁(a) is the circulant matrix with the first column a, Z₋₁(h) the skew-circulant one, in which
    what wraps around changes its sign.
    """

    def setup(self, rank: int) -> None:  # type: ignore[override]
        """``rank``: r."""
        self._square()
        if not isinstance(rank, int) or rank < 1:
            raise SubspanError(f"{self.kind} needs a rank >= 1, got {rank!r}")
        self.rank = rank
        self.p = self.n * rank
        self.energy = float(self.n) ** 2 * rank
        self.matrix_cost = self.n**3 * rank
        self.apply_cost = _fft_cost(self.n) * (4 * rank + 2)

    def constants(self) -> tuple[Tensor, ...]:
        # The diagonal that turns a skew-circulant into a circulant matrix: its real numbers.
        angle = torch.arange(self.n, dtype=torch.float64) * (-math.pi / self.n)
        turn = torch.stack([angle.cos(), angle.sin()])
        return self._normals(self.rank, self.n) / math.sqrt(self.n), turn.float()

    def _parts(self, a: Tensor, constants: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        h, turn = constants
        w = torch.complex(turn[0], turn[1])
        return torch.fft.fft(a.view(self.rank, self.n)), torch.fft.fft(h * w), w

    @in_float32
    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        circulant, skew, w = self._parts(a, constants)
        inner = torch.fft.ifft(torch.fft.fft(x * w).unsqueeze(-2) * skew) * w.conj()
        y = torch.fft.ifft(torch.fft.fft(inner.real) * circulant)
        return y.real.sum(dim=-2)

    @in_float32
    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        circulant, skew, w = self._parts(a, constants)
        inner = torch.fft.ifft(torch.fft.fft(y).unsqueeze(-2) * circulant.conj()).real
        x = torch.fft.ifft(torch.fft.fft(inner * w) * skew.conj()) * w.conj()
        return x.real.sum(dim=-2)


def _fft_cost(size: int) -> int:
    """Multiply-adds that a real transform of a size is worth."""
    return BUTTERFLY * size * max(1, size.bit_length()) // 4
