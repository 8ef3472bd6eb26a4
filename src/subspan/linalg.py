"""Orthonormal bases and truncation, for the low-rank manifold; least squares without a matrix.

The former in float32 or float64 (a half-precision basis is orthonormal to two digits), on matrices
that are tall (n × r, r ≪ n) or small (2r × 2r). QR decompositions are PyTorch's, by Householder
reflections: Cholesky-QR, which must be done twice and fails where the condition is beyond 10⁴ in
float32, takes as long on a CPU (0.9 to 1.1 times for 5120 × 80 to 640).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


@functools.lru_cache(maxsize=256)
def fixed_vector(n: int) -> Tensor:
    """Return normal numbers (n,), always the same: no matrix is made to evade them."""
    return torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def complement(u: Tensor, a: Tensor) -> Tensor:
    """New directions: an orthonormal basis of what A (n, k) adds to the span of U (n, r).

    The columns of U are orthonormal. Those of the result, (n, min(k, n − r)), are so too, and
    orthogonal to U, with A in the span of both. Where A adds fewer directions than that, the others
    are any.
    """
    n, r = u.shape
    k = min(a.shape[1], n - r)
    if k < a.shape[1]:  # all that is left
        return torch.linalg.qr(u, mode="complete").Q[:, r:]
    # Of a difference of nearly equal vectors one projection leaves rounding; two are enough.
    q, _ = torch.linalg.qr(a - u @ (u.T @ a))
    overlap = u.T @ q
    if overlap.abs().max() <= 8 * torch.finfo(a.dtype).eps:
        return q
    q, _ = torch.linalg.qr(q - u @ overlap)
    if (u.T @ q).abs().max() <= 64 * torch.finfo(a.dtype).eps:
        return q
    # A lies in the span of U up to rounding: QR of both gives directions outside it all the same.
    return torch.linalg.qr(torch.cat([u, a], dim=1)).Q[:, r : r + k]


def polish(u: Tensor) -> Tensor:
    """U with its columns orthonormal again where rounding had moved them a little.

    One Newton–Schulz step towards the polar factor, U (3 − UᵀU) / 2: an error ε becomes 3/4 ε².
    """
    gram = u.T @ u
    return u @ (1.5 * torch.eye(len(gram), dtype=u.dtype, device=u.device) - 0.5 * gram)


def svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin singular value decomposition A = U diag(σ) Vᵀ, of float32 or float64.

    With k = min(n, m) U is (n, k), σ (k,), in descending order, and V (m, k), not its transpose.
    LAPACK's divide and conquer gives up on harmless matrices with many equal singular values, or
    returns what is not finite (in float32, once in some hundred cores at the start of a training).
    Double precision of the transpose then does. What is not finite itself is a RuntimeError.
    """
    try:
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        found = bool(torch.isfinite(u.sum() + s.sum() + vh.sum()))
    except RuntimeError:
        if not bool(torch.isfinite(a).all()):
            raise
        found = False
    if not found:
        v, s, uh = torch.linalg.svd(a.double().mT, full_matrices=False)
        u, vh = uh.mT, v.mT
    return u.to(a), s.to(a), vh.mT.to(a)


def rank_of(singular_values: Tensor, tolerance: float) -> int:
    """Return the least rank r at which ‖Σ_{>r}‖ ≤ τ ‖Σ‖ (Frobenius), for Σ in descending order."""
    tails = singular_values.double().square().flip(0).cumsum(0).flip(0).sqrt()  # ‖Σ_{≥i}‖
    return int((tails > tolerance * tails[0]).sum()) if len(tails) else 0


def conjugate_gradients(
    image: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    x: Tensor,
    target: Tensor,
    *,
    tolerance: float,
    steps: int,
) -> Tensor:
    """Minimise ‖A x − b‖ by CGLS (Hestenes and Stiefel 1952), without a matrix.

    ``image`` is x ↦ A x, ``adjoint`` y ↦ Aᵀ y, and b, the target, has the shape of A x. From ``x``
    (p,) on, it makes so many steps at most, and stops where ‖Aᵀ(A x − b)‖ / ‖Aᵀ b‖ is below the
    tolerance. Return the nearest x to the first one among those of the least error.
    """
    residual = target - image(x)
    slope = adjoint(residual)
    along, size = slope, slope.square().sum()
    least = tolerance**2 * float(adjoint(target).square().sum())
    for _ in range(steps):
        if float(size) <= least:
            break
        moved = image(along)
        step = size / moved.square().sum()
        x, residual = x + step * along, residual - step * moved
        slope = adjoint(residual)
        last, size = size, slope.square().sum()
        along = slope + size / last * along
    return x
