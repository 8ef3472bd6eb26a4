"""One step along a gradient flow Ẇ = −G(W) on the manifold of matrices U S Vᵀ of rank r.

Pure functions of factors, slopes and a step size h. A step of plain gradient descent on U, S and V
contains S and its inverse, so that small singular values make it crawl or burst; these do not. In
all of them K = U S, L = V Sᵀ, and the slopes are K: G V, L: Gᵀ U, S: Uᵀ G V, or what an optimizer
makes of them (momentum, Adam).

=================  ===============================================================================
`kls_bases`        fixed rank, step 1 (K and L) of the unconventional integrator: Ceruti and
                   Lubich, "An unconventional robust integrator for dynamical low-rank
                   approximation", BIT 2022, section 3.1; as training: Schotthöfer et al.,
                   "Low-rank lottery tickets", NeurIPS 2022, algorithm 1
`kls_core`         step 2 (S) of the same, with a gradient at the new bases
`augmented`        step 1 of the rank-adaptive one, old and new bases together: Ceruti, Kusch and
                   Lubich, "A rank-adaptive robust integrator …", BIT 2022
`parallel`         K, L and S from one gradient: Ceruti, Kusch and Lubich, "A parallel rank-adaptive
                   integrator …", SISC 2024; as training: Schotthöfer et al., GeoLoRA, 2024
`retracted`        the same, back at rank r without an SVD
`truncated`        the last step of the rank-adaptive ones
`vanilla`          gradient descent on U, S and V, for comparison
=================  ===============================================================================

With explicit Euler steps and exact slopes `parallel` is W − h P(G), P the projection to the tangent
space at W: its core has the blocks that P leaves, and zero where P has none.

An :class:`Integrator` says which of these make a step of DLRT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from subspan.linalg import complement, polish, svd
from subspan.registry import Registry


@dataclass(frozen=True)
class USV:
    """W = U S Vᵀ with U (n, r), S (r, r) and V (m, r); inside a step S may not be square.

    Slopes have the same shapes: that of K in the place of U, that of S, and that of L in the place
    of V.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    @property
    def rank(self) -> int:
        """Return the size of the core."""
        return self.S.shape[0]

    def dense(self) -> Tensor:
        """Return W itself, (n, m)."""
        return self.U @ self.S @ self.V.T


def kls_bases(at: USV, slope: USV, h: float) -> USV:
    """Make the K- and L-step and see the old weight in the new bases: U₁ (U₁ᵀ W V₁) V₁ᵀ.

    K₁ = U S − h G V   = U₁ R        L₁ = V Sᵀ − h Gᵀ U = V₁ R'        S̃ = (U₁ᵀ U) S (Vᵀ V₁)
    """
    U, _ = torch.linalg.qr(at.U @ at.S - h * slope.U)
    V, _ = torch.linalg.qr(at.V @ at.S.T - h * slope.V)
    return USV(U, (U.T @ at.U) @ at.S @ (at.V.T @ V), V)


def kls_core(at: USV, slope_of_core: Tensor, h: float) -> USV:
    """Make the S-step, S₁ = S̃ − h U₁ᵀ G(U₁ S̃ V₁ᵀ) V₁."""
    return USV(at.U, at.S - h * slope_of_core, at.V)


def augmented(at: USV, slope: USV) -> USV:
    """Add new directions to the bases, [U, Ũ] and [V, Ṽ], up to twice the rank; W stays.

    K₁ = U S − h G V adds to the span of U what G V does, whatever h is; likewise L₁.
    """
    U, V = complement(at.U, slope.U), complement(at.V, slope.V)
    S = at.S.new_zeros(at.rank + U.shape[1], at.rank + V.shape[1])
    S[: at.rank, : at.rank] = at.S
    return USV(torch.cat([at.U, U], dim=1), S, torch.cat([at.V, V], dim=1))


def parallel(at: USV, slope: USV, h: float) -> USV:
    """Make all three steps from one gradient, at up to twice the rank; `truncated` is to follow.

             ⎡ S − h Uᵀ G V    −h Uᵀ G Ṽ ⎤
    [U, Ũ]   ⎢                           ⎥   [V, Ṽ]ᵀ
             ⎣ −h Ũᵀ G V        0        ⎦
    """
    wide, r = augmented(at, slope), at.rank
    wide.S[:r, :r] -= h * slope.S
    wide.S[:r, r:] = -h * slope.V.T @ wide.V[:, r:]
    wide.S[r:, :r] = -h * wide.U[:, r:].T @ slope.U
    return wide


def retracted(at: USV, slope: USV, h: float, first: Literal["U", "V"]) -> USV:
    """Make the step of `parallel` and project its result Ŵ onto the range of Ŵ V (or of Ŵᵀ U).

    This is half a step of subspace iteration from the old basis: optimal up to second order in h as
    long as the singular values stay apart; small ones lose no more than what is as small.
    Nothing here is larger than n × r.

        Ŵ V = U (S − h Uᵀ G V) − h (1 − U Uᵀ) G V = U₁ R
        Ŵᵀ U₁ = V (S − h Uᵀ G V)ᵀ (Uᵀ U₁) − h (1 − V Vᵀ) Gᵀ U (Uᵀ U₁) − h V (G V)ᵀ (1 − U Uᵀ) U₁

    Args:
        at: W.
        slope: of K, S and L.
        h: step size.
        first: which basis comes from W alone; taking turns treats both alike.
    """
    if first == "V":
        turned = retracted(_turned(at), _turned(slope), h, "U")
        return _turned(turned)
    S = at.S - h * slope.S
    # Ŵ V and Ŵᵀ U₁ with the products by U, and those by V, put together.
    U, R = torch.linalg.qr(at.U @ (S + h * (at.U.T @ slope.U)) - h * slope.U)
    kept = at.U.T @ U
    # − h (G V)ᵀ (1 − U Uᵀ) U₁ = (Ŵ V − U S)ᵀ U₁ = Rᵀ − Sᵀ kept
    V, core = torch.linalg.qr(at.V @ (R.T + h * (at.V.T @ slope.V) @ kept) - h * slope.V @ kept)
    return USV(U, core.T, V)


def spectrum(at: USV) -> USV:
    """Return the SVD of the core: U, the diagonal of S, and V (not Vᴴ)."""
    # `torch.linalg.svd` gives Vᴴ, whose ROWS are the right singular vectors, and published codes
    # take its columns; ours gives V.
    return USV(*svd(at.S))


def truncated(at: USV, core: USV, rank: int) -> USV:
    """Return the best approximation of a rank, with a diagonal S, from orthonormal bases.

    The core is the :func:`spectrum`. With the rank `rank_of(core.S, τ)` the error is at most τ ‖W‖
    (Frobenius).
    """
    U, V = at.U @ core.U[:, :rank], at.V @ core.V[:, :rank]
    return USV(polish(U), core.S[:rank].diag(), polish(V))


def vanilla(at: USV, slope: USV, h: float) -> USV:
    """Descend on the factors: slopes are those of U, S and V, which do not stay orthonormal."""
    return USV(at.U - h * slope.U, at.S - h * slope.S, at.V - h * slope.V)


def _turned(at: USV) -> USV:
    """Return Wᵀ."""
    return USV(at.V, at.S.T, at.U)


# ---- integrators by name -------------------------------------------------------------------------


@dataclass(frozen=True)
class Integrator:
    """One way to move the factors of a layer, in steps that DLRT makes.

    Args:
        first_step: moves W along slopes by h at the same rank, given the number of steps made
            before. If there is a second step, it moves the bases alone.
        wider_step: moves W along slopes by h at up to twice the rank, and `truncated` follows; None
            if ranks never change.
        second_step: moves the core along its slope at the new bases by h; None if one gradient is
            enough.
        adaptive: whether it needs a rule by which ranks change.
        tangents: whether slopes are those of K, S and L, and bases stay orthonormal; else slopes
            are those of U, S and V.
    """

    first_step: Callable[[USV, USV, float, int], USV]
    wider_step: Callable[[USV, USV, float], USV] | None = None
    second_step: Callable[[USV, Tensor, float], USV] | None = None
    adaptive: bool = False
    tangents: bool = True


INTEGRATORS: Registry[Integrator] = Registry("integrator")


def _parallel(at: USV, slope: USV, h: float, step: int) -> USV:
    """Let the bases come first in turns, which treats both alike."""
    return retracted(at, slope, h, "V" if step % 2 else "U")


def _kls(at: USV, slope: USV, h: float, step: int) -> USV:
    return kls_bases(at, slope, h)


def _widened(at: USV, slope: USV, h: float) -> USV:
    return augmented(at, slope)


def _vanilla(at: USV, slope: USV, h: float, step: int) -> USV:
    return vanilla(at, slope, h)


INTEGRATORS.add("parallel", Integrator(_parallel, parallel))
INTEGRATORS.add("kls", Integrator(_kls, second_step=kls_core))
INTEGRATORS.add("kls-adaptive", Integrator(_kls, _widened, kls_core, adaptive=True))
INTEGRATORS.add("vanilla", Integrator(_vanilla, tangents=False))
