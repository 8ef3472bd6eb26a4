"""The gradients of K, S and L that a step is made of, and whether they are those of the factors.

Autograd leaves tangents ∂K and ∂L beside the gradients of U, S and V while a layer is watched
(:mod:`subspan.layers.watched`). Between ``backward()`` and ``step()`` people clip, scale and
average gradients, and know nothing of tangents. What autograd left obeys

    (U.grad, S.grad, V.grad) = c (∂K Sᵀ, Uᵀ ∂K, ∂L S)        with c = 1,

and after clipping by norm, or after a gradient scaler, with another number c, which belongs to the
tangents, too. Any other change breaks this. Freivalds' test tells at O((n + m) r): both sides are
multiplied by a vector (R. Freivalds, "Probabilistic machines can use less running time", 1977).
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
from subspan.optim.integrators import Factors

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

    Args:
        layers: by name.
    """

    def __init__(self, layers: Mapping[str, LowRank]) -> None:
        self._layers = layers
        self._tangents = {name: Tangents(layer) for name, layer in layers.items()}
        self._ddp: bool | None = None  # not known yet

    def clear(self) -> None:
        """Forget all tangents."""
        for found in self._tangents.values():
            found.clear()

    def check(self) -> None:
        """Refuse to go on where somebody else watches a layer now.

        Raises:
            SubspanError: naming the layer.
        """
        for name, found in self._tangents.items():
            if self._layers[name].tangents is not found:
                raise SubspanError(
                    f"another DLRT has been made for layer {name!r} since this one: go on with "
                    "that one, or make a new one"
                )

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """Evaluate gradients without tangents inside."""
        try:
            for found in self._tangents.values():
                found.awake = False
            yield
        finally:
            for found in self._tangents.values():
                found.awake = True

    def tangents(
        self, gradients: Mapping[str, Factors], at: Mapping[str, Factors], alone: bool
    ) -> dict[str, Factors]:
        """∂K, ∂S and ∂L, scaled as somebody may have scaled the gradients.

        DDP averages gradients and leaves tangents to us: all processes then decide together.

        Args:
            gradients: of U, S and V of some layers, in the precision of their factors.
            at: the factors of all layers that have not been frozen.
            alone: whether this process's gradients are nobody else's affair.

        Raises:
            SubspanError: for gradients that have been changed otherwise.
        """
        found = {name: self._left(name, gradient) for name, gradient in gradients.items()}
        scales, changed = self._compared(gradients, found, at)
        if not alone and self._under_ddp(changed):
            device = next(iter(self._layers.values())).S.device
            if distributed.anywhere(changed is not None, device):
                # Of all layers: which ones it has used is each process's own affair.
                mine = [self._left(name, factors) for name, factors in at.items()]
                means = iter(distributed.means([t for left in mine for t in (left.U, left.V)]))
                pairs = {name: (next(means), next(means)) for name in at}
                found = {n: Factors(pairs[n][0], g.S, pairs[n][1]) for n, g in gradients.items()}
                scales, changed = self._compared(gradients, found, at)
                if distributed.anywhere(changed is not None, device) and changed is None:
                    raise SubspanError(CHANGED.format("a layer in another process"))
        if changed is not None:
            raise SubspanError(CHANGED.format(f"layer {changed!r}"))
        return {name: _scaled(left, scales[name]) for name, left in found.items()}

    def _left(self, name: str, like: Factors) -> Factors:
        """∂K and ∂L as autograd has left them beside another ∂S; zeros where it has not."""
        K, L = self._tangents[name].of_k, self._tangents[name].of_l
        return Factors(
            torch.zeros_like(like.U) if K is None else K.to(like.U.dtype),
            like.S,
            torch.zeros_like(like.V) if L is None else L.to(like.V.dtype),
        )

    def _compared(
        self,
        gradients: Mapping[str, Factors],
        found: Mapping[str, Factors],
        at: Mapping[str, Factors],
    ) -> tuple[dict[str, float], str | None]:
        """Return each layer's scale, and the name of a layer whose gradients do not fit."""
        if not gradients:
            return {}, None
        told = compared([(gradients[name], found[name], at[name]) for name in gradients]).tolist()
        changed = None
        for name, (_, error) in zip(gradients, told, strict=True):
            if error > tolerance(self._layers[name].U):
                changed = changed or name
        return {name: c for name, (c, _) in zip(gradients, told, strict=True)}, changed

    def _under_ddp(self, changed: str | None) -> bool:
        """Whether DDP averages the gradients; looked up once, and again if it would explain all."""
        if distributed.world() == 1:
            return False
        if self._ddp is None or (changed and not self._ddp):
            self._ddp = distributed.averaged_by_ddp(*(layer.U for layer in self._layers.values()))
        return self._ddp


def compared(layers: Sequence[tuple[Factors, Factors, Factors]]) -> Tensor:
    """The number c of each layer, and how far the rest is from it.

    Args:
        layers: gradients of U, S and V; tangents, ∂K in the place of U and ∂L in that of V (S does
            not count); and the factors that backward() saw.

    Returns:
        (layers, 2): c, and the largest of the three errors, relative to c and to the norms of what
        is multiplied. Gradients that are not finite may make them NaN.
    """
    found, expected, norms, lengths = [], [], [], []
    for gradient, tangent, at in layers:
        z, K, L = _vector(at.rank).to(at.S), tangent.U, tangent.V
        found += [gradient.U @ z, gradient.S @ z, gradient.V @ z]
        expected += [K @ (at.S.T @ z), at.U.T @ (K @ z), L @ (at.S @ z)]
        of_k, of_l, of_s = (torch.linalg.vector_norm(t) for t in (K, L, at.S))
        norms += [of_k * of_s, of_k, of_l * of_s]
        lengths += [len(part) for part in found[-3:]]
    # The rest is arithmetic of a few numbers for each layer: done for all of them together.
    device = found[0].device
    kind = functools.reduce(torch.promote_types, (t.dtype for t in found))
    part = torch.repeat_interleave(torch.tensor(lengths)).to(device)
    least = torch.finfo(kind).tiny
    size = torch.stack([norm.to(device, kind) for norm in norms]).clamp(min=least)[part]
    f, e = (torch.cat([t.to(device, kind) for t in side]) / size for side in (found, expected))

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


def _scaled(left: Factors, c: float) -> Factors:
    """Tangents times c, beside a gradient of S that has been scaled already."""
    return left if c == 1 else Factors(c * left.U, left.S, c * left.V)


def tolerance(factor: Tensor) -> float:
    """The greatest error of :func:`compared` that rounding explains."""
    rounded = factor.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return COARSE if rounded else TOLERANCE.get(factor.dtype, COARSE)


@functools.lru_cache(maxsize=256)
def _vector(r: int) -> Tensor:
    """Normal numbers (r,), always the same: nobody changes gradients so as to deceive these."""
    return torch.randn(r, generator=torch.Generator().manual_seed(r), dtype=torch.float64)
