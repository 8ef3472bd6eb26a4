"""Tangents ∂K and ∂L of layers, and whether they still belong to the gradients of the factors.

Autograd leaves tangents ∂K and ∂L beside the gradients of U, S and V while a layer is watched
(:mod:`subspan.layers.watched`). Between ``backward()`` and ``step()`` people clip, scale and
average gradients, and know nothing of tangents. What autograd left obeys

    (U.grad, S.grad, V.grad) = c (∂K Sᵀ, Uᵀ ∂K, ∂L S)        with c = 1,

and after clipping by norm, or after a gradient scaler, with another number c, which belongs to the
tangents, too. Any other change breaks this. Freivalds' test finds out at O((n + m) r): both sides
are multiplied by a vector (R. Freivalds, "Probabilistic machines can use less running time", 1977).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from subspan import distributed
from subspan.errors import SubspanError
from subspan.layers.lowrank import LowRank
from subspan.layers.watched import Tangents
from subspan.linalg import fixed_vector
from subspan.optim.factored import wide_factors
from subspan.optim.integrators import USV
from subspan.subspace.functions import ordinary_tensors

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative: what rounding may do
COARSE = 0.05  # of 16-bit gradients, and where float32 products are rounded like those

CHANGED = (
    "the gradients of {} are not what the last backward() left there times one number, so that "
    "those of K and L cannot be known: clear all of them before backward() by "
    "optimizer.zero_grad(), scale those of a layer together (clip_grad_norm_, not "
    "clip_grad_value_), leave averages to DDP or workers='shared', put penalties on layer.weight "
    "and not on its factors, and choose no parameters by backward(inputs=…)"
)


class Watch:
    """Tangents of all layers that an optimizer trains.

    Steps along them are those of orthonormal bases, which other optimizers and conversions do not
    keep: layers get such bases here, and the same weights with them.

    Args:
        layers: by name; none for an integrator that takes the gradients of U, S and V.
    """

    def __init__(self, layers: Mapping[str, LowRank]) -> None:
        self.layers = layers
        with ordinary_tensors(), torch.no_grad():
            factors = {name: wide_factors(layer, copy=False) for name, layer in layers.items()}
            for name in self._skew(factors):
                at = factors[name]
                (U, of_u), (V, of_v) = torch.linalg.qr(at.U), torch.linalg.qr(at.V)
                layers[name].set_factors(U, of_u @ at.S @ of_v.T, V)
        self._tangents = {name: Tangents(layer) for name, layer in layers.items()}
        self._ddp: bool | None = None  # not known yet

    def clear(self) -> None:
        """Forget all tangents."""
        for tangents in self._tangents.values():
            tangents.clear()

    def check(self) -> None:
        """Refuse to go on where another object watches a layer now."""
        for name, tangents in self._tangents.items():
            if self.layers[name].tangents is not tangents:
                raise SubspanError(
                    f"another DLRT has been made for layer {name!r} since this one: go on with "
                    "that one, or make a new one"
                )

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """Evaluate gradients without tangents inside."""
        try:
            for tangents in self._tangents.values():
                tangents.awake = False
            yield
        finally:
            for tangents in self._tangents.values():
                tangents.awake = True

    def tangents(
        self, gradients: Mapping[str, USV], at: Mapping[str, USV], alone: bool
    ) -> dict[str, USV]:
        """Return ∂K, ∂S and ∂L, scaled as the gradients may have been scaled.

        DDP averages gradients and no tangents: all processes then average these, and decide
        together, unless this process is ``alone`` with its gradients. Those given are of U, S and V
        of some layers, in the precision of their factors; ``at`` has all that are not frozen.

        Raises:
            SubspanError: for gradients that have been changed otherwise, and for bases that are not
                orthonormal any more.
        """
        for name in self._skew(at):
            raise SubspanError(
                f"the bases of layer {name!r} are not orthonormal, as a step needs them, since "
                "something else than DLRT has moved or set U or V: make a new DLRT of the network, "
                "which gives the layer such bases and leaves its weight as it is"
            )
        left = {name: self._left(name, gradient) for name, gradient in gradients.items()}
        scales, changed = self._compare(gradients, left, at)
        if not alone and self._under_ddp(changed):
            device = next(iter(self.layers.values())).S.device
            if distributed.anywhere(changed is not None, device):
                # Of all layers: processes may have used different ones.
                mine = [self._left(name, factors) for name, factors in at.items()]
                means = iter(distributed.means([t for m in mine for t in (m.U, m.V)]))
                pairs = {name: (next(means), next(means)) for name in at}
                left = {n: USV(pairs[n][0], g.S, pairs[n][1]) for n, g in gradients.items()}
                scales, changed = self._compare(gradients, left, at)
                if distributed.anywhere(changed is not None, device) and changed is None:
                    raise SubspanError(CHANGED.format("a layer in another process"))
        if changed is not None:
            raise SubspanError(CHANGED.format(f"layer {changed!r}"))
        # Gradients of S have been scaled already.
        return {
            name: t if (c := scales[name]) == 1 else USV(c * t.U, t.S, c * t.V)
            for name, t in left.items()
        }

    def _left(self, name: str, like: USV) -> USV:
        """Return ∂K and ∂L as autograd has left them, or zeros, beside the S of ``like``."""
        K, L = self._tangents[name].of_k, self._tangents[name].of_l
        return USV(
            torch.zeros_like(like.U) if K is None else K.to(like.U.dtype),
            like.S,
            torch.zeros_like(like.V) if L is None else L.to(like.V.dtype),
        )

    def _compare(
        self, gradients: Mapping[str, USV], tangents: Mapping[str, USV], at: Mapping[str, USV]
    ) -> tuple[dict[str, float], str | None]:
        """Return each layer's scale, and the name of a layer whose gradients do not fit."""
        if not gradients:
            return {}, None
        layers = [(gradients[name], tangents[name], at[name]) for name in gradients]
        scales, changed = {}, None
        for name, (scale, error) in zip(gradients, compare(layers).tolist(), strict=True):
            scales[name] = scale
            if error > tolerance(self.layers[name].U):
                changed = changed or name
        return scales, changed

    def _skew(self, at: Mapping[str, USV]) -> list[str]:
        """Return the names of layers whose bases are not orthonormal: AᵀA z is not z.

        Those of a network that was converted to more digits have as many as they had.
        """
        errors: list[Tensor] = []
        for factors in at.values():
            z = fixed_vector(factors.rank).to(factors.S)
            both = [torch.linalg.vector_norm(A.T @ (A @ z) - z) for A in (factors.U, factors.V)]
            errors.append(torch.stack(both).max() / torch.linalg.vector_norm(z))
        found = torch.stack([error.to(errors[0]) for error in errors]).tolist() if errors else []
        pairs = zip(at, found, strict=True)
        least = TOLERANCE[torch.float32]
        return [n for n, error in pairs if error > max(tolerance(self.layers[n].U), least)]

    def _under_ddp(self, changed: str | None) -> bool:
        """Return whether DDP averages the gradients; look again if that would explain a change."""
        if distributed.world() == 1:
            return False
        if self._ddp is None or (changed and not self._ddp):
            self._ddp = bool(distributed.find_ddp(*(layer.U for layer in self.layers.values())))
        return self._ddp


def compare(layers: Sequence[tuple[USV, USV, USV]]) -> Tensor:
    """Return the number c of each layer, and how far the gradients are from it: (layers, 2).

    Of a layer are given the gradients of U, S and V; the tangents, ∂K in the place of U and ∂L in
    that of V (S does not count); and the factors that backward() saw. The distance is the largest
    of the three errors, relative to c and to the norms of what is multiplied. Gradients that are
    not finite may make both NaN.
    """
    products, expected, norms, lengths = [], [], [], []
    for gradient, tangent, at in layers:
        z, K, L = fixed_vector(at.rank).to(at.S), tangent.U, tangent.V
        products += [gradient.U @ z, gradient.S @ z, gradient.V @ z]
        expected += [K @ (at.S.T @ z), at.U.T @ (K @ z), L @ (at.S @ z)]
        of_k, of_l, of_s = (torch.linalg.vector_norm(t) for t in (K, L, at.S))
        norms += [of_k * of_s, of_k, of_l * of_s]
        lengths += [len(part) for part in products[-3:]]
    # The rest is arithmetic of a few numbers for each layer: done for all of them together.
    device = products[0].device
    kind = functools.reduce(torch.promote_types, (t.dtype for t in products))
    part = torch.repeat_interleave(torch.tensor(lengths, device=device))
    least = torch.finfo(kind).tiny
    size = torch.stack([norm.to(device, kind) for norm in norms]).clamp(min=least)[part]
    f, e = (torch.cat([t.to(device, kind) for t in side]) / size for side in (products, expected))

    def sums(terms: Tensor, of: Tensor, count: int) -> Tensor:
        return terms.new_zeros(count).index_add_(0, of, terms)

    layer = part // 3
    square = sums(e * e, layer, len(layers))
    # Where all products are zero the gradients must be, too.
    c = torch.where(square > 0, sums(e * f, layer, len(layers)) / square.clamp(min=least), 1.0)
    # One that is 1 but for rounding is 1.
    c = torch.where((c - 1).abs() < 16 * torch.finfo(kind).eps, 1.0, c)
    errors = sums((f - c[layer] * e).square(), part, len(lengths)).view(-1, 3).amax(dim=1).sqrt()
    return torch.stack([c, errors / c.abs().clamp(min=least)], dim=1)


def tolerance(factor: Tensor) -> float:
    """Return the greatest error of :func:`compare` that rounding explains."""
    rounded = factor.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return COARSE if rounded else TOLERANCE.get(factor.dtype, COARSE)
