"""DLRT: training on the manifold of low-rank weights, with ranks that adapt.

Source: Schotthöfer, Zangrando, Kusch, Ceruti and Tudisco, "Low-rank lottery tickets: finding
efficient low-rank neural networks via matrix differential equations", NeurIPS 2022; with one
gradient a step: Schotthöfer et al., "GeoLoRA", 2024. The steps are those of
:mod:`subspan.optim.integrators`, the layers those of :func:`subspan.layers.factorize`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from subspan import distributed
from subspan.errors import SubspanError
from subspan.layers.lowrank import LowRank
from subspan.optim import integrators, moments
from subspan.optim.factored import all_finite, dense, find_layers, parameters, read, wide, write
from subspan.optim.gradients import Gradients
from subspan.optim.integrators import INTEGRATORS, USV
from subspan.optim.optimizer import BaseOptimizer, Nonfinite, NonFiniteError, evaluate
from subspan.optim.parameters import named_pairs
from subspan.optim.ranks import RankRule
from subspan.optim.tangents import Watch
from subspan.subspace.functions import ordinary_tensors


class DLRT(BaseOptimizer):
    r"""Gradient descent on the low-rank manifold; what is not factored takes the base's steps.

    ==============  =========  ==================================================================
    integrator      gradients  step
    ==============  =========  ==================================================================
    "parallel"      1          K, L and S from one backward pass; needs no closure
    "kls"           2          K and L, then S with a gradient at the new bases; ranks stay
    "kls-adaptive"  2          the same in old and new bases together, then truncation
    "vanilla"       1          U, S and V by plain gradient, for comparison; ranks stay
    ==============  =========  ==================================================================

    - *Moments* of the base are transported with the bases (:mod:`subspan.optim.moments`).
    - *Weight decay* λ is decoupled: W ← (1 − ηλ) W, which is S ← (1 − ηλ) S.
    - *Gradients* of U, S and V are what they always are. Those of K = U S and L = V Sᵀ are left
      beside them while this object lives (:class:`~subspan.layers.watched.Tangents`). A number by
      which all gradients of a layer are scaled (clipping by norm, gradient scalers) scales these,
      too; any other change of gradients is refused.
    - *A layer without a gradient*, which the batch did not use, stays as it is, and so does a
      frozen one. Where there is a target for the whole network, its rank falls with the others.

    Args:
        net: with factored layers. Its other parameters that require a gradient are trained, too;
            what is unfrozen later needs a new optimizer, or a group of its own if it is no factor.
        lr: η.
        tolerance: τ in [0, 1): where ranks may change, singular values are left out as long as
            their norm is at most τ times that of all, layer by layer.
        target_ratio: in place of τ, the share in (0, 1) of the factored layers' dense numbers that
            is to be gone after ``freeze_after`` steps. At each step τ, the same for all layers, is
            chosen so that the sum of r (n + m) falls to the rest along a cubic (Zhu and Gupta
            2017): fast at first, while the spectrum forms, and slowly at the end.
        integrator: one of the table, or of your own (``docs/add-an-optimizer.md``).
        base: "sgd" or "adam".
        momentum: μ, of "sgd" alone.
        betas: of "adam" alone.
        eps: of "adam" alone.
        weight_decay: λ.
        min_rank: least rank.
        max_rank: greatest rank; None for no bound.
        tolerance_warmup: steps over which τ rises from 0. The first spectra say little, and a
            direction that was cut off returns only if one step makes it larger than τ ‖W‖.
        adapt_from: step from which ranks may change. At full rank until then, this is training all
            weights and pruning them.
        rank_every: steps between those at which ranks may change.
        freeze_after: steps after which they stay; None for never.
        workers: in a process group, "shared": gradients are averaged over all processes, those of
            the factors and not of W. Do not wrap the network in DDP then, whose buckets have fixed
            shapes. None: this process alone, or DDP with ranks that stay.
        check_every: steps between comparisons of all workers' weights; 0: never.
        nonfinite: a step with a number that is not finite, in a gradient or in the factors that
            it leads to: "error", or "skip" to leave everything as it is (:attr:`skipped` counts).

    Raises:
        SubspanError: for anything that cannot be trained as asked.
    """

    def __init__(
        self,
        net: nn.Module,
        lr: float = 0.05,
        *,
        tolerance: float | None = None,
        target_ratio: float | None = None,
        integrator: str = "parallel",
        base: Literal["sgd", "adam"] = "sgd",
        momentum: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        min_rank: int = 1,
        max_rank: int | None = None,
        tolerance_warmup: int = 0,
        adapt_from: int = 0,
        rank_every: int = 1,
        freeze_after: int | None = None,
        workers: Literal["shared"] | None = None,
        check_every: int = 100,
        nonfinite: Nonfinite = "error",
    ) -> None:
        steps = INTEGRATORS.find(integrator)
        settings = moments.settings_of(base, momentum=momentum, betas=betas, eps=eps)
        self.rule = RankRule(
            tolerance=tolerance,
            target_ratio=target_ratio,
            min_rank=min_rank,
            max_rank=max_rank,
            tolerance_warmup=tolerance_warmup,
            adapt_from=adapt_from,
            rank_every=rank_every,
            freeze_after=freeze_after,
        )
        if self.rule.adapts and not steps.wider_step:
            others = [name for name, other in INTEGRATORS.items() if other.wider_step]
            raise SubspanError(
                f"integrator {integrator!r} keeps ranks as they are: leave out tolerance and "
                f"target_ratio, or use {' or '.join(others)}"
            )
        if steps.adaptive and not self.rule.adapts:
            raise SubspanError(f"integrator {integrator!r} needs a tolerance or a target_ratio")
        self._layers = find_layers(net, min_rank)
        self._base = moments.BASES[base]
        factors = {id(p) for layer in self._layers.values() for p in parameters(layer)}
        named = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
        groups = [
            [(n, p) for n, p in named if (id(p) in factors) is inside] for inside in (True, False)
        ]
        super().__init__(
            [{"params": group} for group in groups if group],
            {"lr": lr, **settings, "weight_decay": weight_decay, "begun_with": None},
            workers=workers,
            check_every=check_every,
            nonfinite=nonfinite,
            needs_closure=steps.second_step is not None,
        )
        self.integrator = integrator
        self._tensors = dict(named)
        self._left_out = [(n, p) for n, p in net.named_parameters() if not p.requires_grad]
        self._begin()

    def _begin(self) -> None:
        """Have autograd leave tangents from now on, if the integrator needs them."""
        self._watch = Watch(self._layers if INTEGRATORS[self.integrator].tangents else {})
        self._gradients = Gradients(self._layers, self._watch, self._workers)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, and the tangents.

        Args:
            set_to_none: whether gradients become None, or zeros.
        """
        with ordinary_tensors():
            super().zero_grad(set_to_none)
        self._watch.clear()

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every factored layer that it trains."""
        return {name: layer.rank for name, layer in self._layers.items()}

    @property
    def cores(self) -> dict[str, Tensor]:
        """S of every factored layer that it trains, with the singular values of its weight."""
        return {name: layer.S for name, layer in self._layers.items()}

    @property
    def ranks_may_change(self) -> bool:
        """Whether they may in the next step."""
        return self.rule.may_change(self.steps)

    # ---- a step ----------------------------------------------------------------------------------

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if self._workers is None and self.ranks_may_change and distributed.world() > 1:
            raise SubspanError(
                "ranks cannot change under DDP, nor without a word between processes: give "
                "workers='shared' and do not wrap the network, or leave out tolerance"
            )
        self._watch.check()
        moments.refuse_other_shapes(self.state.items(), "make a new optimizer")
        moments.widen(self.state)
        before = read(self._layers, self.param_groups[0]["params"], copy=self.needs_closure)
        # No function changes a tensor of the state in place: these are the tensors of before.
        state = {p: dict(values) for p, values in self.state.items()}
        loss = None
        try:
            loss = self._evaluate(closure)
            gradients = self._gradients.collect(before, self._others, self.steps)
            after = self._move_factors(before, gradients, closure)
        except BaseException as error:
            self.state.clear()
            self.state.update(state)
            if self.needs_closure:
                write(self._layers, before)
            if isinstance(error, NonFiniteError):
                error.loss = loss
                if self.nonfinite == "skip":
                    self._watch.clear()
            raise
        with ordinary_tensors():
            write(self._layers, after)
            self._move_others()
        self._watch.clear()
        return loss

    def _missing_closure(self) -> str:
        return (
            f"integrator {self.integrator!r} evaluates the gradient twice: it needs "
            "step(closure); 'parallel' does without"
        )

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        """Return the loss of a closure, which leaves gradients."""
        loss = evaluate(closure)
        if closure is not None and loss is None:
            raise SubspanError("the closure returned no loss: it must return it")
        return loss

    def _move_factors(
        self,
        before: Mapping[str, USV],
        gradients: Mapping[str, USV],
        closure: Callable[[], Any] | None,
    ) -> dict[str, USV]:
        """Return the factors after the step; a second evaluation changes the layers on the way."""
        group, integrator = self.param_groups[0], INTEGRATORS[self.integrator]
        first, wider, second = integrator.first_step, integrator.wider_step, integrator.second_step
        h, widening = float(group["lr"]), self.ranks_may_change
        decay = 1 - h * group["weight_decay"]
        after: dict[str, USV] = {}
        for name, gradient in gradients.items():
            at = before[name]
            slope = self._slopes(self._layers[name], gradient)
            if not second:  # else W stays until its second gradient is known
                at = USV(at.U, at.S * decay, at.V)
            if wider and widening:
                after[name] = wider(at, slope, h)
            else:
                after[name] = first(at, slope, h, self.steps)
        middle = before
        if second:
            middle = {**before, **after}
            slopes = self._slopes_of_cores(before, after, closure)
            for name, at in after.items():
                shrunk = USV(at.U, at.S * decay, at.V)
                after[name] = second(shrunk, slopes[name], h)
        if widening:
            after = self._truncate(before, after)
        finite = all_finite((at.U, at.S, at.V) for at in after.values())
        for name, is_finite in zip(after, finite, strict=True):
            if not is_finite:
                raise NonFiniteError(
                    f"the factors of layer {name!r} would not be finite after step {self.steps}"
                )
        if integrator.tangents:
            for name, new in after.items():
                layer = self._layers[name]
                states = self.state[layer.U], self.state[layer.S], self.state[layer.V]
                moments.turn_core(states[1], middle[name], new)
                moments.transport(states, before[name], new)
        return after

    def _slopes(self, layer: LowRank, gradient: USV) -> USV:
        """Return the base's slopes for the gradients of K, S and L."""
        group, (U, S, V) = self.param_groups[0], parameters(layer)
        # With a closure the core has its slope at the new bases.
        return USV(
            self._base(self.state[U], gradient.U, group),
            gradient.S if self.needs_closure else self._base(self.state[S], gradient.S, group),
            self._base(self.state[V], gradient.V, group),
        )

    def _slopes_of_cores(
        self, before: Mapping[str, USV], at: Mapping[str, USV], closure: Callable[[], Any] | None
    ) -> dict[str, Tensor]:
        """Evaluate the gradients of the cores at new bases, and return the base's slopes."""
        write(self._layers, at)
        for p in (*(layer.S for layer in self._layers.values()), *self._others):
            p.grad = None  # whether the closure clears it or not
        with self._watch.asleep():
            self._evaluate(closure)
        gradients = self._gradients.collect(at, self._others, self.steps, core=True)
        if missing := at.keys() - gradients.keys():
            raise SubspanError(
                f"the second evaluation of step {self.steps} does not use layer "
                f"{min(missing)!r}, which the first one used: the closure must evaluate one loss "
                "twice; 'parallel' evaluates it once"
            )
        slopes: dict[str, Tensor] = {}
        for name, new in at.items():
            state = self.state[self._layers[name].S]
            moments.turn_core(state, before[name], new)
            slopes[name] = self._base(state, gradients[name].S, self.param_groups[0])
        return slopes

    def _truncate(self, before: Mapping[str, USV], moved: Mapping[str, USV]) -> dict[str, USV]:
        """Return the factors at the ranks that the tolerance, or the target, leaves."""
        # A target is one for all layers, those that have no gradient in this step among them.
        wide = dict(moved) if self.rule.target_ratio is None else {**before, **moved}
        try:
            cores = {name: integrators.spectrum(at) for name, at in wide.items()}
        except RuntimeError as error:  # of LAPACK, on numbers that are not finite
            raise NonFiniteError(
                f"step {self.steps} makes a factor singular or not finite ({error})"
            ) from None
        group = self.param_groups[0]
        if group["begun_with"] is None:
            numbers = (layer.rank * sum(layer.shape) for layer in self._layers.values())
            group["begun_with"] = sum(numbers)
        shapes = {name: self._layers[name].shape for name in wide}
        values = {name: core.S for name, core in cores.items()}
        ranks = self.rule.ranks(self.steps, values, shapes, group["begun_with"])
        return {
            name: integrators.truncated(wide[name], core, ranks[name])
            for name, core in cores.items()
            if name in moved or ranks[name] < wide[name].rank
        }

    def _move_others(self) -> None:
        """Move biases, norms and layers that are not factored."""
        others = set(self._others)
        for group in self.param_groups:
            h = float(group["lr"])
            for p in group["params"]:
                if p in others and p.grad is not None:
                    slope = self._base(self.state[p], dense(p.grad).to(wide(p)), group)
                    p.mul_(1 - h * group["weight_decay"]).add_(slope, alpha=-h)

    @property
    def _others(self) -> list[Tensor]:
        """The parameters that are no factors and have not been frozen."""
        factors = {id(p) for layer in self._layers.values() for p in parameters(layer)}
        every = (p for group in self.param_groups for p in group["params"])
        return [p for p in every if id(p) not in factors and p.requires_grad]

    # ---- workers, state --------------------------------------------------------------------------

    def _agreement(self) -> dict[str, Any]:
        return {
            "the network or its ranks": [[n, list(t.shape)] for n, t in self._tensors.items()],
            "the settings": [
                self.integrator,
                self._base.__name__,
                *dataclasses.astuple(self.rule),
                self._workers.check_every if self._workers else None,
                self.nonfinite,
            ],
        }

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but tangents."""
        made = ("_watch", "_gradients")
        return {name: v for name, v in super().__getstate__().items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Watch the layers that have been copied with it."""
        super().__setstate__(state)
        self._begin()

    def _check_state(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse a state of other ranks than the network has, whose own state comes first."""
        super()._check_state(state_dict)
        moments.refuse_other_shapes(self._moments_in(state_dict), "load the network's state first")

    def _take(self, state_dict: Mapping[str, Any]) -> None:
        for p, values in self._moments_in(state_dict):  # PyTorch has rounded them to p's type
            self.state[p].update(moments.as_wide(p, values))

    def _moments_in(self, state_dict: Mapping[str, Any]) -> Iterator[tuple[Tensor, Any]]:
        """Yield the parameters and what a state has of them."""
        places = [p for group in self.param_groups for p in group["params"]]
        yield from ((places[index], values) for index, values in state_dict["state"].items())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters that are no factors, with or without names.

        Raises:
            SubspanError: for factors; for a group that is added while workers average gradients,
                of which the others would know nothing; and for values that make no sense.
        """
        if self._tensors:
            if self._workers:
                raise SubspanError("workers know of no later parameters: make a new optimizer")
            param_group = param_group | {"params": named_pairs(param_group["params"])}
        super().add_param_group(param_group)
