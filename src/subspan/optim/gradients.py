"""The gradients that a step of DLRT is made of: of this process or of all, checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subspan.distributed import Workers
from subspan.errors import SubspanError
from subspan.layers.factors import plain
from subspan.layers.lowrank import LowRank
from subspan.optim.integrators import Factors
from subspan.optim.tangents import CHANGED, Watch


class Gradients:
    """Holds what ``backward()`` has left for an optimizer of factored layers.

    Args:
        layers: by name.
        watch: their tangents; None where gradients of U and V are wanted.
        workers: processes that average what each has found; None for this one alone, or DDP.
    """

    def __init__(
        self, layers: Mapping[str, LowRank], watch: Watch | None, workers: Workers | None
    ) -> None:
        self._layers, self._watch, self._workers = layers, watch, workers

    def clear(self) -> None:
        """Forget all tangents."""
        if self._watch:
            self._watch.clear()

    def check(self) -> None:
        """Refuse layers that somebody else watches now, see :meth:`Watch.check`."""
        if self._watch:
            self._watch.check()

    def of_cores(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which gradients are evaluated of which only those of S are wanted."""
        return self._watch.asleep() if self._watch else contextlib.nullcontext()

    def found(
        self, at: Mapping[str, Factors], others: Sequence[Tensor], step: int, core: bool = False
    ) -> dict[str, Factors]:
        """The gradients of the layers that have some, averaged over workers.

        Args:
            at: the factors of all layers that they may belong to.
            others: the other parameters, whose gradients are averaged where they are.
            step: which one is made, for errors.
            core: whether only those of S are wanted.

        Returns:
            ∂K, ∂S and ∂L by layer, without a watch ∂U, ∂S and ∂V; with ``core`` ∂S in all places.

        Raises:
            SubspanError: if there are none at all, if they have been changed so that tangents are
                not known, or if they are not finite; with workers, in all of them.
        """
        with plain():
            return self._found(at, others, step, core)

    def _found(
        self, at: Mapping[str, Factors], others: Sequence[Tensor], step: int, core: bool
    ) -> dict[str, Factors]:
        refusal = None
        try:
            found = self._own(at, core)
        except SubspanError as error:
            if self._workers is None:
                raise
            found, refusal = {}, error  # the others wait for this process
        if self._workers:
            found = self._averaged(self._workers, found, at, others, step, core, refusal)
        grads = [dense(p.grad) for p in others if p.grad is not None]
        if not found and not grads:
            raise SubspanError(
                "no parameter has a gradient: call loss.backward() before step(), or in its closure"
            )
        grads += [t for slope in found.values() for t in tensors(slope, core)]
        if not all(all_finite([g] for g in grads if g.numel())):
            raise SubspanError(f"a gradient of step {step} is not finite: lower the learning rate")
        return found

    def _own(self, at: Mapping[str, Factors], core: bool) -> dict[str, Factors]:
        """The gradients that this process has found."""
        found: dict[str, Factors] = {}
        for name, factors in at.items():
            grads = [p.grad for p in parameters(self._layers[name])]
            if core:
                grads = [grads[1]] * 3
            there = [grad.to(factors.S.dtype) for grad in grads if grad is not None]
            if len(there) == 3:
                found[name] = Factors(*there)
            elif there:
                raise SubspanError(CHANGED.format(f"layer {name!r}"))
        if core or self._watch is None:
            return found
        return self._watch.tangents(found, at, alone=self._workers is not None)

    def _averaged(
        self,
        workers: Workers,
        own: dict[str, Factors],
        at: Mapping[str, Factors],
        others: Sequence[Tensor],
        step: int,
        core: bool,
        refusal: SubspanError | None,
    ) -> dict[str, Factors]:
        """Means over all workers, by one message; where a worker has no gradient, zeros count.

        Those of the parameters that are no factors take the place of this worker's own.

        Raises:
            SubspanError: on all workers, if one of them refuses its gradients.
        """
        none = {
            n: Factors(*map(torch.zeros_like, tensors(f))) for n, f in at.items() if n not in own
        }
        found = [t for name in at for t in tensors((own | none)[name], core)]
        found += [torch.zeros_like(p) if p.grad is None else dense(p.grad) for p in others]
        there = [name in own for name in at] + [p.grad is not None for p in others]
        wide = torch.float64 if any(t.dtype == torch.float64 for t in found) else torch.float32
        flags = torch.tensor([*there, refusal is not None], dtype=wide, device=found[0].device)
        flat = torch.cat([*(t.reshape(-1).to(wide) for t in found), flags])
        mean = workers.combine(flat, step)[0]
        *parts, flags = mean.split([*(t.numel() for t in found), len(flags)])
        *anywhere, refused = (flags > 0).tolist()
        if refusal:
            raise refusal
        if refused:
            raise SubspanError(CHANGED.format("a layer of another worker"))
        means = iter(p.view_as(t).to(t.dtype) for p, t in zip(parts, found, strict=True))
        some = iter(anywhere)
        averaged: dict[str, Factors] = {}
        for name in at:
            own_means = [next(means) for _ in range(1 if core else 3)]
            if next(some):
                averaged[name] = Factors(*(own_means * 3 if core else own_means))
        for p in others:
            mean = next(means)
            if next(some):
                p.grad = mean
        return averaged


def parameters(layer: LowRank) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """U, S and V."""
    return layer.U, layer.S, layer.V


def all_finite(groups: Iterable[Iterable[Tensor]]) -> list[bool]:
    """Whether all numbers of each group of tensors are finite; the host is told once."""
    norms = [
        torch.stack(
            [
                torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32))
                for t in tensors
            ]
        ).sum()
        for tensors in groups
    ]
    return torch.stack([t.to(norms[0].device) for t in norms]).isfinite().tolist() if norms else []


def tensors(at: Factors, core: bool = False) -> list[Tensor]:
    """All three, or S alone."""
    return [at.S] if core else [at.U, at.S, at.V]


def dense(grad: Tensor) -> Tensor:
    """A gradient in its parameter's shape; that of a sparse embedding is not."""
    return grad.to_dense() if grad.is_sparse else grad
