"""The pass through a factored layer that leaves tangents beside its gradients.

Source: Zangrando et al. 2023 and GeoLoRA 2024 (all gradients from one backward pass).

The integrators of :mod:`subspan.optim` need more than the gradients of U, S and V. With G = ∂W:

    gradients                    tangents                     h = Vᵀ x,  q = Uᵀ ∂y
    ∂U = G V Sᵀ = ∂K Sᵀ          ∂K = ∂y hᵀ = G V             of K = U S
    ∂S = Uᵀ G V = Uᵀ ∂K
    ∂V = Gᵀ U S = ∂L S           ∂L = x qᵀ  = Gᵀ U            of L = V Sᵀ

Tangents do not contain S, whose small singular values are what makes plain gradient descent on the
factors stall; they cannot be had from the gradients without dividing by these values. They are
gradients themselves, of two matrices k (n, r) and l (m, r) that are always zero:

    W = U S Vᵀ + k Vᵀ + U lᵀ

While something watches a layer (:class:`Tangents`), its weight has these two terms. They cost
nothing, and autograd leaves ∂K and ∂L in ``k.grad`` and ``l.grad`` by the rules that it has for all
gradients: accumulation, several uses of one layer, second derivatives. All five together cost
O(B (n + m) r) for B samples, and O((n + m) r²) for the products with S.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn import grad as conv_grad

from subspan.precision import full_precision
from subspan.subspace.functions import ordinary_tensors

if TYPE_CHECKING:
    from subspan.layers.lowrank import LowRank


class Tangents:
    """The matrices k and l of a watched layer, in whose ``grad`` autograd leaves ∂K and ∂L.

    A layer is watched as long as somebody holds this object, and no other one is made for it.
    Both are zeros that require a gradient, and transposed, for gradients are formed in this order.
    """

    k: Tensor  # kᵀ, (r, n)
    l: Tensor  # noqa: E741 (lᵀ, (r, m))

    def __init__(self, layer: LowRank) -> None:
        self.awake = True  # passes through the layer have tangents
        self.renew(layer)
        layer._watcher = weakref.ref(self)

    def renew(self, layer: LowRank) -> None:
        """Begin again without gradients, with the shapes, type and device that the factors have."""
        # An integrator may pass through a core that is not square.
        (n, m), (left, right) = layer.shape, layer.S.shape
        zero = layer.S.detach().new_zeros(())
        self.k, self.l = (zero.expand(s).requires_grad_() for s in ((right, n), (left, m)))

    @property
    def of_k(self) -> Tensor | None:
        """∂K (n, r), if there is one."""
        return None if self.k.grad is None else self.k.grad.T

    @property
    def of_l(self) -> Tensor | None:
        """∂L (m, r), if there is one."""
        return None if self.l.grad is None else self.l.grad.T

    def clear(self) -> None:
        """Forget ∂K and ∂L."""
        self.k.grad = self.l.grad = None


# ---- the products of a layer, linear (``how`` is None) or a convolution --------------------------

Geometry = tuple[tuple[int, ...], Any, Any, Any]  # kernel size, stride, padding, dilation


def down(x: Tensor, A: Tensor, how: Geometry | None) -> Tensor:
    """Compute Aᵀ x for A (m, r)."""
    if how is None:
        return x @ A
    kernel, *geometry = how
    return F.conv2d(x, filters(A, kernel), None, *geometry)


def _up(h: Tensor, A: Tensor, how: Geometry | None, bias: Tensor | None = None) -> Tensor:
    """Compute A h + b for A (n, r)."""
    return F.linear(h, A, bias) if how is None else F.conv2d(h, A[..., None, None], bias)


def out(h: Tensor, S: Tensor, U: Tensor, how: Geometry | None, bias: Tensor | None) -> Tensor:
    """U S h + b. A convolution has more places than U has rows: the two matrices come first."""
    return F.linear(h @ S.T, U, bias) if how is None else _up(h, U @ S, how, bias)


def _down_adjoint(q: Tensor, A: Tensor, like: Tensor, how: Geometry | None) -> Tensor:
    """Compute A q in the shape of the input, the adjoint of :func:`down`."""
    if how is None:
        return q @ A.T
    kernel, *geometry = how
    return conv_grad.conv2d_input(like.shape, filters(A, kernel), q, *geometry)


def _inner(x: Tensor, q: Tensor, how: Geometry | None) -> Tensor:
    """Return the sum of x qᵀ over samples and places, (m, r)."""
    if how is None:
        return _outer(x, q, None)
    (kernel, *geometry), r = how, q.shape[1]
    shape = (r, x.shape[1], *kernel)
    return conv_grad.conv2d_weight(x, shape, q, *geometry).flatten(1).T


def _outer(gy: Tensor, h: Tensor, how: Geometry | None) -> Tensor:
    """Return the sum of ∂y hᵀ over samples and places, (n, r)."""
    if how is None:
        return (h.reshape(-1, h.shape[-1]).T @ gy.reshape(-1, gy.shape[-1])).T  # the faster order
    return torch.einsum("bnhw,brhw->nr", gy, h)


def filters(A: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Return the columns of A (in · k², r) as filters (r, in, k, k)."""
    return A.T.reshape(A.shape[1], -1, *kernel)


class Watched(torch.autograd.Function):
    """y = (U S Vᵀ + k Vᵀ + U lᵀ) x + b for k = l = 0, with all gradients (this file's head).

    Factors come in their own precision and are rounded to that of x here, so that ∂U = ∂K Sᵀ holds
    in theirs: an optimizer tells by it whether somebody has changed a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None, k: Tensor,
        l: Tensor, how: Geometry | None,  # noqa: E741
    ) -> Tensor:  # fmt: skip
        """Return the layer's output in the type of x; ``how`` is None for a linear layer."""
        kind = x.dtype
        h = down(x, V.to(kind), how)
        ctx.save_for_backward(x, h, U, S, V, k, l)
        ctx.how = how
        return out(h, S.to(kind), U.to(kind), how, bias)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, U, S, V, b, k and l."""
        with ordinary_tensors(), full_precision(gy.device):
            x, h, U, S, V, k, l = ctx.saved_tensors  # noqa: E741
            if not torch.compiler.is_compiling() and U.is_leaf and U.grad is None:
                # Somebody has cleared the gradients, and could not know of these.
                k.grad = l.grad = None
            how, kind = ctx.how, x.dtype
            u, s, v = U.to(kind), S.to(kind), V.to(kind)
            twice = torch.is_grad_enabled()  # a second derivative follows
            if twice:
                h = down(x, v, how)
            q = _up(gy, u.T, how)
            gK, gL = _outer(gy, h, how).to(S.dtype), _inner(x, q, how).to(S.dtype)
            gU, gS, gV = gK @ S.T, U.T @ gK, gL @ S
            gx = bias = None
            if ctx.needs_input_grad[0]:
                p = _up(q, s.T, how)
                if twice:  # the terms of k and l are zero, and their derivatives are not
                    p = p + _up(gy, k.to(kind), how)
                gx = _down_adjoint(p, v, x, how)
                if twice:
                    gx = gx + _down_adjoint(q, l.to(kind).T, x, how)
            if ctx.needs_input_grad[4]:
                bias = gy.sum(dim=(0, 2, 3)) if how else gy.reshape(-1, gy.shape[-1]).sum(dim=0)
            return gx, gU, gS, gV, bias, gK.T, gL.T, None
