"""The gradients that make a step of DLRT: of this process or of all workers, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from subspan.errors import SubspanError
from subspan.layers.lowrank import LowRank
from subspan.optim.factored import all_finite, dense, parameters, tensors
from subspan.optim.integrators import USV
from subspan.optim.optimizer import NonFiniteError
from subspan.optim.tangents import CHANGED, Watch
from subspan.optim.workers import Workers
from subspan.subspace.functions import ordinary_tensors


class Gradients:
    """Collects what ``backward()`` has left for an optimizer of factored layers.

    Where gradients of U and V are wanted ``watch`` has tangents of no layers. Without workers this
    process is alone, or DDP averages its gradients.
    """

    def __init__(
        self, layers: Mapping[str, LowRank], watch: Watch, workers: Workers | None
    ) -> None:
        self._layers, self._watch, self._workers = layers, watch, workers

    def collect(
        self, at: Mapping[str, USV], others: Sequence[Tensor], step: int, core: bool = False
    ) -> dict[str, USV]:
        """Return ∂K, ∂S and ∂L of the layers that have gradients, averaged over workers.

        Without tangents they are ∂U, ∂S and ∂V; if the ``core`` alone counts, ∂S is in all three
        places. The factors ``at`` are those of all layers that may have gradients; the gradients of
        ``others``, the other parameters, are averaged where they are. Errors name the step.

        Raises:
            NonFiniteError: if a number of them is not finite.
            SubspanError: if there are none at all, or if they have been changed so that tangents
                are not known; with workers, in all of them.
        """
        refusal = None
        with ordinary_tensors():
            try:
                gradients = self._of_this_process(at, core)
            except SubspanError as error:
                if self._workers is None:
                    raise
                gradients, refusal = {}, error  # the others wait for this process
            if self._workers:
                gradients = self._average(self._workers, gradients, at, others, step, core, refusal)
            grads = [dense(p.grad) for p in others if p.grad is not None]
            grads += [t for slope in gradients.values() for t in tensors(slope, core)]
            if not grads:
                raise SubspanError(
                    "no parameter has a gradient: call loss.backward() before step(), or in its "
                    "closure"
                )
            if not all(all_finite([g] for g in grads if g.numel())):
                raise NonFiniteError(f"a gradient of step {step} is not finite")
        return gradients

    def _of_this_process(self, at: Mapping[str, USV], core: bool) -> dict[str, USV]:
        """Return the gradients in the precision of the factors, with tangents if watched."""
        gradients: dict[str, USV] = {}
        for name, factors in at.items():
            grads = [p.grad for p in parameters(self._layers[name])]
            if core:
                grads = [grads[1]] * 3
            given = [grad.to(factors.S.dtype) for grad in grads if grad is not None]
            if len(given) == 3:
                gradients[name] = USV(*given)
            elif given:
                raise SubspanError(CHANGED.format(f"layer {name!r}"))
        if core or not self._watch.layers:
            return gradients
        return self._watch.tangents(gradients, at, alone=self._workers is not None)

    def _average(
        self,
        workers: Workers,
        own: Mapping[str, USV],
        at: Mapping[str, USV],
        others: Sequence[Tensor],
        step: int,
        core: bool,
        refusal: SubspanError | None,
    ) -> dict[str, USV]:
        """Return means over all workers, by one message; a gradient that is missing counts as zero.

        The means of parameters that are no factors take the place of this worker's own gradients.
        If one worker refuses its gradients all do.
        """
        zeros = {n: USV(*map(torch.zeros_like, tensors(f))) for n, f in at.items() if n not in own}
        sent = [t for name in at for t in tensors({**own, **zeros}[name], core)]
        grads = [torch.zeros_like(p) if p.grad is None else dense(p.grad) for p in others]
        sent += [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in grads]
        given = [name in own for name in at] + [p.grad is not None for p in others]
        wide = torch.float64 if any(t.dtype == torch.float64 for t in sent) else torch.float32
        flags = torch.tensor([*given, refusal is not None], dtype=wide, device=sent[0].device)
        flat = torch.cat([*(t.reshape(-1).to(wide) for t in sent), flags])
        mean = workers.combine(flat, step)[0]
        *received, flags = mean.split([*(t.numel() for t in sent), len(flags)])
        *given_anywhere, refused = (flags > 0).tolist()
        if refusal:
            raise refusal
        if refused:
            raise SubspanError(CHANGED.format("a layer of another worker"))
        means = iter(m.view_as(t).to(t.dtype) for m, t in zip(received, sent, strict=True))
        anywhere = iter(given_anywhere)
        averaged: dict[str, USV] = {}
        for name in at:
            of_layer = [next(means) for _ in range(1 if core else 3)]
            if next(anywhere):
                averaged[name] = USV(*(of_layer * 3 if core else of_layer))
        for p in others:
            mean = next(means)
            if next(anywhere):
                p.grad = torch.complex(*mean.unbind(-1)) if p.is_complex() else mean
        return averaged
