"""Exactly orthonormal columns of any length without QR: a subsampled randomised Hartley transform.

Source: Ailon and Chazelle, "The fast Johnson–Lindenstrauss transform", SIAM J. Comput. 2009
(signs, transform, subset); the Hartley transform (Bracewell 1983) is real, symmetric, orthonormal
and its own inverse at every length, which the Hadamard transform is not.

    P = S H R,   S = diag(random signs) (D×D),   H_jk = cas(2πjk/D)/√D,   R = d random columns of I
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.cache import cache
from subspan.families.base import Projection


def hartley(x: Tensor) -> Tensor:
    """Orthonormal discrete Hartley transform of a real vector (n,): its own inverse and adjoint.

    With F = rfft(x): H_k = Re F_k − Im F_k for k ≤ n/2, and H_{n−k} = Re F_k + Im F_k.
    """
    n = x.numel()
    spectrum = torch.fft.rfft(x, norm="ortho")
    re, im = spectrum.real, spectrum.imag
    mirrored = (re + im)[1 : (n + 1) // 2].flip(0)
    return torch.cat((re - im, mirrored))


@dataclass(frozen=True)
class Orthogonal(Projection, family="orthogonal"):
    """Random columns of a sign-randomised Hartley transform: PᵀP = I exactly, in O(D log D).

    Sequence 0 of the source holds the signs of S; R keeps the images of 0 … d−1 under the
    permutation whose keys are sequence 1.
    """

    domain = 4
    norm = "exact"
    orthonormal = True
    local = False

    def _draws(self, x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Signs (D,) and chosen frequencies (d,)."""

        def build() -> tuple[Tensor, Tensor]:
            place = self.source.permutation(self.out_dim, column=1, step=step)
            signs = self.source.signs(0, self.out_dim, step=step, device=x.device, dtype=x.dtype)
            return signs, place(torch.arange(self.in_dim, device=x.device))

        signs, places = cache.get(("orthogonal", self, int(step), x.device, x.dtype), build)
        return signs, places

    def _matvec(self, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        signs, places = self._draws(w, step)
        spectrum = w.new_zeros(self.out_dim).index_copy_(0, places, w)
        return hartley(spectrum)[start:stop] * signs[start:stop]

    def _rmatvec(self, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        signs, places = self._draws(g, step)
        full = g.new_zeros(self.out_dim)
        full[start:stop] = g * signs[start:stop]
        return hartley(full)[places]
