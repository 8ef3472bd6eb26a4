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
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from subspan.linalg import complement, orthonormalize, polish, svd


@dataclass(frozen=True)
class Factors:
    """W = U S Vᵀ: (n, r), (r, r), (m, r), or in between another core than square.

    In the same shapes slopes: of K in the place of U, of S, and of L in the place of V.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    @property
    def rank(self) -> int:
        """The size of the core."""
        return self.S.shape[0]

    def dense(self) -> Tensor:
        """W itself, (n, m)."""
        return self.U @ self.S @ self.V.T


def kls_bases(at: Factors, slope: Factors, h: float) -> Factors:
    """New bases from K- and L-step, and the old weight seen in them: U₁ (U₁ᵀ W V₁) V₁ᵀ.

    K₁ = U S − h G V   = U₁ R        L₁ = V Sᵀ − h Gᵀ U = V₁ R'        S̃ = (U₁ᵀ U) S (Vᵀ V₁)
    """
    U, _ = orthonormalize(at.U @ at.S - h * slope.U)
    V, _ = orthonormalize(at.V @ at.S.T - h * slope.V)
    return Factors(U, (U.T @ at.U) @ at.S @ (at.V.T @ V), V)


def kls_core(at: Factors, slope_of_core: Tensor, h: float) -> Factors:
    """The S-step, S₁ = S̃ − h U₁ᵀ G(U₁ S̃ V₁ᵀ) V₁."""
    return Factors(at.U, at.S - h * slope_of_core, at.V)


def augmented(at: Factors, slope: Factors) -> Factors:
    """W unchanged in bases of old and new directions, [U, Ũ] and [V, Ṽ], of up to twice the rank.

    K₁ = U S − h G V adds to the span of U what G V does, whatever h is; likewise L₁.
    """
    U, V = complement(at.U, slope.U), complement(at.V, slope.V)
    S = at.S.new_zeros(at.rank + U.shape[1], at.rank + V.shape[1])
    S[: at.rank, : at.rank] = at.S
    return Factors(torch.cat([at.U, U], dim=1), S, torch.cat([at.V, V], dim=1))


def parallel(at: Factors, slope: Factors, h: float) -> Factors:
    """All three steps from one gradient, at up to twice the rank; `truncated` is to follow.

             ⎡ S − h Uᵀ G V    −h Uᵀ G Ṽ ⎤
    [U, Ũ]   ⎢                           ⎥   [V, Ṽ]ᵀ
             ⎣ −h Ũᵀ G V        0        ⎦
    """
    wide, r = augmented(at, slope), at.rank
    wide.S[:r, :r] -= h * slope.S
    wide.S[:r, r:] = -h * slope.V.T @ wide.V[:, r:]
    wide.S[r:, :r] = -h * wide.U[:, r:].T @ slope.U
    return wide


def retracted(at: Factors, slope: Factors, h: float, first: Literal["U", "V"]) -> Factors:
    """`parallel`, then the projection of its result Ŵ onto the range of Ŵ V (or of Ŵᵀ U).

    Half a step of subspace iteration from the old basis: optimal up to second order in h as long
    as the singular values stay apart; small ones lose no more than what is as small.
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
    U, R = orthonormalize(at.U @ (S + h * (at.U.T @ slope.U)) - h * slope.U)
    kept = at.U.T @ U
    # − h (G V)ᵀ (1 − U Uᵀ) U₁ = (Ŵ V − U S)ᵀ U₁ = Rᵀ − Sᵀ kept
    V, core = orthonormalize(at.V @ (R.T + h * (at.V.T @ slope.V) @ kept) - h * slope.V @ kept)
    return Factors(U, core.T, V)


def spectrum(at: Factors) -> Factors:
    """The SVD of the core: U, the diagonal of S, and V (not Vᴴ)."""
    # `torch.linalg.svd` gives Vᴴ, whose ROWS are the right singular vectors, and published codes
    # take its columns; ours gives V.
    return Factors(*svd(at.S))


def truncated(at: Factors, core: Factors, rank: int) -> Factors:
    """The best approximation of a rank, with a diagonal S.

    Args:
        at: with orthonormal bases.
        core: :func:`spectrum` of it.
        rank: r. With `rank_of(core.S, τ)` the error is at most τ ‖W‖ (Frobenius).
    """
    U, V = at.U @ core.U[:, :rank], at.V @ core.V[:, :rank]
    return Factors(polish(U), core.S[:rank].diag(), polish(V))


def vanilla(at: Factors, slope: Factors, h: float) -> Factors:
    """Gradient descent on the factors; slopes are those of U, S and V, which stay no bases."""
    return Factors(at.U - h * slope.U, at.S - h * slope.S, at.V - h * slope.V)


def _turned(at: Factors) -> Factors:
    """Wᵀ."""
    return Factors(at.V, at.S.T, at.U)
