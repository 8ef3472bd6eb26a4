"""DLRT: training on the manifold of low-rank weights, with ranks that adapt.

Source: Schotthöfer, Zangrando, Kusch, Ceruti and Tudisco, "Low-rank lottery tickets: finding
efficient low-rank neural networks via matrix differential equations", NeurIPS 2022; with one
gradient a step: Schotthöfer et al., "GeoLoRA", 2024. The steps are those of
:mod:`subspan.optim.integrators`, the layers those of :func:`subspan.layers.factorize`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from subspan import distributed, slots
from subspan.errors import SubspanError, unknown
from subspan.layers.lowrank import LowRank
from subspan.optim import integrators
from subspan.optim.base import BASES, transport, turn_core
from subspan.optim.integrators import Factors
from subspan.optim.ranks import RankRule

Integrator = Literal["parallel", "kls", "kls-adaptive", "vanilla"]
TWO_EVALUATIONS = ("kls", "kls-adaptive")
FIXED_RANKS = ("kls", "vanilla")


class DLRT(Optimizer):
    r"""Descent on the low-rank manifold for factored layers, the base's update for all else.

    ==============  =========  ==================================================================
    integrator      gradients  step
    ==============  =========  ==================================================================
    "parallel"      1          K, L and S from one backward pass; needs no closure
    "kls"           2          K and L, then S with a gradient at the new bases; ranks stay
    "kls-adaptive"  2          the same in old and new bases together, then truncation
    "vanilla"       1          U, S and V by plain gradient, for comparison; ranks stay
    ==============  =========  ==================================================================

    - *Moments* of the base are transported with the bases (:mod:`subspan.optim.base`).
    - *Weight decay* λ is decoupled: W ← (1 − ηλ) W, which is S ← (1 − ηλ) S.
    - While it trains, ``U.grad`` and ``V.grad`` hold the gradients of K = U S and L = V Sᵀ.

    Args:
        net: with factored layers. Its other parameters that require a gradient are trained, too.
        lr: η.
        tolerance: τ in [0, 1): where ranks may change, singular values are left out as long as
            their norm is at most τ times that of all, layer by layer.
        target_ratio: in place of τ, share in (0, 1) of the factored layers' dense numbers that
            shall be gone after ``freeze_after`` steps: τ, the same for all layers, is then chosen
            anew each time so that r (n + m) in all falls to the rest along a cubic (Zhu and
            Gupta 2017): fast at first, while the spectrum forms, and slowly at the end.
        integrator: see above.
        base: "sgd" or "adam".
        momentum: μ of "sgd".
        betas: of "adam".
        eps: of "adam".
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
            the factors and not of W. Do not wrap the network in DDP then: parameters whose shape
            changes are not for its buckets. None: this process alone, or DDP with ranks that stay.
        check_every: steps between comparisons of all workers' weights; 0: never.

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
        integrator: Integrator = "parallel",
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
    ) -> None:
        for name, value, allowed in (
            ("integrator", integrator, get_args(Integrator)), ("base", base, tuple(BASES)),
        ):  # fmt: skip
            if value not in allowed:
                raise unknown(name, value, allowed)
        if workers not in (None, "shared"):
            raise unknown("workers", workers, ["shared"])
        self.rule = RankRule(
            tolerance, target_ratio, min_rank, max_rank, tolerance_warmup, adapt_from, rank_every,
            freeze_after,
        )  # fmt: skip
        if integrator in FIXED_RANKS and self.rule.adapts:
            raise SubspanError(
                f"integrator {integrator!r} keeps ranks as they are: leave out tolerance and "
                "target_ratio, or use parallel or kls-adaptive"
            )
        if integrator == "kls-adaptive" and not self.rule.adapts:
            raise SubspanError("integrator 'kls-adaptive' needs a tolerance or a target_ratio")
        self._layers = {n: m for n, m in net.named_modules() if isinstance(m, LowRank)}
        if not self._layers:
            raise SubspanError(
                "the network has no factored layer: call subspan.layers.factorize(net, …) first"
            )
        for name, layer in self._layers.items():
            if not all(p.requires_grad for p in (layer.U, layer.S, layer.V)):
                raise SubspanError(f"factors of layer {name!r} are frozen: unfreeze all three")
            least = min(layer.shape)
            if min_rank > least:
                raise SubspanError(f"layer {name!r} has no rank {min_rank}, at most {least}")
        self.integrator, self._base = integrator, BASES[base]
        self.check_every = check_every
        factors = {id(p) for layer in self._layers.values() for p in (layer.U, layer.S, layer.V)}
        named = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
        self._tensors = dict(named)
        groups = [
            [(n, p) for n, p in named if (id(p) in factors) is inside] for inside in (True, False)
        ]
        super().__init__(
            [{"params": group} for group in groups if group],
            {
                "lr": lr, "momentum": momentum, "betas": betas, "eps": eps,
                "weight_decay": weight_decay, "steps": 0, "begun_with": None,
            },
        )  # fmt: skip
        for layer in self._layers.values():
            layer.gradients = "tangent"
        self._workers = distributed.Workers("shared") if workers else None
        self._agreed = self._workers is None

    @property
    def steps(self) -> int:
        """Steps made."""
        return int(self.param_groups[0]["steps"])

    @property
    def needs_closure(self) -> bool:
        """Whether :meth:`step` must be given a closure that evaluates loss and gradients."""
        return self.integrator in TWO_EVALUATIONS

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every factored layer."""
        return {name: layer.rank for name, layer in self._layers.items()}

    @property
    def cores(self) -> dict[str, Tensor]:
        """S of every factored layer, with the singular values of its weight."""
        return {name: layer.S for name, layer in self._layers.items()}

    @property
    def ranks_may_change(self) -> bool:
        """Whether they may in the next step."""
        return self.rule.may_change(self.steps)

    # ---- a step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the weights once.

        Args:
            closure: clears gradients, evaluates the loss, calls ``backward()`` and returns the
                loss. The two "kls" integrators call it twice; the others do without.

        Returns:
            The loss of the first evaluation, if there is a closure.

        Raises:
            SubspanError: for a missing closure, a layer that no gradient reaches, and for numbers
                that are not finite. The factors are then those of before.
        """
        if self.needs_closure and closure is None:
            raise SubspanError(
                f"integrator {self.integrator!r} evaluates the gradient twice: it needs "
                "step(closure); 'parallel' does without"
            )
        if not self._agreed:
            self._check_start()
        if self._workers is None and self.ranks_may_change and distributed.world() > 1:
            raise SubspanError(
                "ranks cannot change under DDP, nor without a word between processes: give "
                "workers='shared' and do not wrap the network, or leave out tolerance"
            )
        copy = self.needs_closure  # which changes the layers on the way
        before = {name: _factors(layer, copy) for name, layer in self._layers.items()}
        # No function changes a tensor of the state in place: these are the tensors of before.
        state = {p: dict(values) for p, values in self.state.items()}
        try:
            loss = self._evaluate(closure)
            after = self._moved(before, closure)
        except BaseException:
            self.state.clear()
            self.state.update(state)
            if copy:
                self._put(before)
            raise
        self._put(after)
        self._move_others()
        for group in self.param_groups:
            group["steps"] += 1
        if self._workers and self.check_every and self.steps % self.check_every == 0:
            self._workers.check_same(self._tensors, self.steps)
        return loss

    def _put(self, factors: Mapping[str, Factors]) -> None:
        for name, layer in self._layers.items():
            layer.set_factors(factors[name].U, factors[name].S, factors[name].V)

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        """Loss and gradients, averaged over workers and checked."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if loss is None:
                raise SubspanError("the closure returned no loss: it must return it")
        for name, layer in self._layers.items():
            if layer.S.grad is None:
                why = "the closure does not reach it" if closure else "call loss.backward() first"
                raise SubspanError(f"layer {name!r} has no gradient: {why}")
        grads = [p.grad for p in self._tensors.values() if p.grad is not None]
        if self._workers:
            self._average(grads)
        norms = torch.stack([torch.linalg.vector_norm(g).to(grads[0].device) for g in grads])
        if not bool(torch.isfinite(norms).all()):
            raise SubspanError(
                f"a gradient of step {self.steps} is not finite: lower the learning rate"
            )
        return loss

    def _moved(
        self, before: Mapping[str, Factors], closure: Callable[[], Any] | None
    ) -> dict[str, Factors]:
        """The factors after the step; the "kls" integrators change the layers on the way."""
        group = self.param_groups[0]
        h, changing = float(group["lr"]), self.ranks_may_change
        decay = 1 - h * group["weight_decay"]
        after: dict[str, Factors] = {}
        for name, layer in self._layers.items():
            at = before[name]
            slope = self._slopes(layer, at)
            if not self.needs_closure:  # else after the second gradient, which W must see as it is
                at = Factors(at.U, at.S * decay, at.V)
            if self.integrator == "vanilla":
                after[name] = integrators.vanilla(at, slope, h)
            elif self.integrator == "parallel" and not changing:
                first: Literal["U", "V"] = "V" if self.steps % 2 else "U"
                after[name] = integrators.retracted(at, slope, h, first)
            elif self.integrator == "parallel":
                after[name] = integrators.parallel(at, slope, h)
            elif changing:
                after[name] = integrators.augmented(at, slope)
            else:
                after[name] = integrators.kls_bases(at, slope, h)
        middle = before
        if self.needs_closure:
            middle = after
            after = self._galerkin(before, after, closure, h, decay)
        if changing:
            after = self._truncated(after)
        for name, new in after.items():
            if not all(bool(torch.isfinite(t).all()) for t in (new.U, new.S, new.V)):
                raise SubspanError(
                    f"the factors of layer {name!r} would not be finite after step {self.steps}: "
                    "lower the learning rate"
                )
        if self.integrator != "vanilla":
            for name, layer in self._layers.items():
                states = self.state[layer.U], self.state[layer.S], self.state[layer.V]
                turn_core(states[1], middle[name], after[name])
                transport(states, before[name], after[name])
        return after

    def _slopes(self, layer: LowRank, at: Factors) -> Factors:
        """What the base makes of the gradients of K, S and L."""
        group, (U, S, V) = self.param_groups[0], (layer.U, layer.S, layer.V)
        K, core, L = (p.grad.to(at.S.dtype) for p in (U, S, V))  # type: ignore[union-attr]
        if self.integrator == "vanilla":  # ∂U = ∂K Sᵀ, ∂V = ∂L S
            K, L = K @ at.S.T, L @ at.S
        # With a closure the core's turn comes at the new bases.
        slope = core if self.needs_closure else self._base(self.state[S], core, group)
        return Factors(
            self._base(self.state[U], K, group), slope, self._base(self.state[V], L, group)
        )

    def _galerkin(
        self, before: Mapping[str, Factors], at: Mapping[str, Factors],
        closure: Callable[[], Any] | None, h: float, decay: float,
    ) -> dict[str, Factors]:  # fmt: skip
        """The S-step: a gradient at the new bases, and the core moved along it."""
        self._put(at)
        for layer in self._layers.values():
            layer.gradients = "core"
        try:
            self._evaluate(closure)
        finally:
            for layer in self._layers.values():
                layer.gradients = "tangent"
        after: dict[str, Factors] = {}
        for name, layer in self._layers.items():
            new, state = at[name], self.state[layer.S]
            assert layer.S.grad is not None
            turn_core(state, before[name], new)
            slope = self._base(state, layer.S.grad.to(new.S.dtype), self.param_groups[0])
            shrunk = Factors(new.U, new.S * decay, new.V)
            after[name] = integrators.kls_core(shrunk, slope, h)
        return after

    def _truncated(self, wide: Mapping[str, Factors]) -> dict[str, Factors]:
        """Back to the ranks that the tolerance, or the target, leaves."""
        try:
            cores = {name: integrators.spectrum(at) for name, at in wide.items()}
        except RuntimeError as error:  # of LAPACK, on numbers that are not finite
            raise SubspanError(
                f"step {self.steps} makes a factor singular or not finite: lower the learning "
                f"rate ({error})"
            ) from None
        shapes = {name: layer.shape for name, layer in self._layers.items()}
        group = self.param_groups[0]
        if group["begun_with"] is None:
            group["begun_with"] = sum(
                layer.rank * sum(layer.shape) for layer in self._layers.values()
            )
        values = {name: core.S for name, core in cores.items()}
        ranks = self.rule.ranks(self.steps, values, shapes, group["begun_with"])
        return {n: integrators.truncated(wide[n], core, ranks[n]) for n, core in cores.items()}

    def _move_others(self) -> None:
        """Biases, norms and layers that are not factored."""
        factors = {id(p) for m in self._layers.values() for p in (m.U, m.S, m.V)}
        for group in self.param_groups:
            h = float(group["lr"])
            for p in group["params"]:
                if id(p) not in factors and p.grad is not None:
                    slope = self._base(self.state[p], p.grad, group)
                    p.mul_(1 - h * group["weight_decay"]).add_(slope, alpha=-h)

    # ---- workers, state --------------------------------------------------------------------------

    def _average(self, grads: list[Tensor]) -> None:
        assert self._workers is not None
        wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
        flat = torch.cat([g.reshape(-1).to(wide) for g in grads])
        mean = self._workers.combine(flat, self.steps)[0]
        for grad, own in zip(grads, mean.split([g.numel() for g in grads]), strict=True):
            grad.copy_(own.view_as(grad))

    def _check_start(self) -> None:
        assert self._workers is not None
        settings = [
            self.integrator, self._base.__name__, *dataclasses.astuple(self.rule), self.check_every,
        ]  # fmt: skip
        agreement = {
            "the network or its ranks": [[n, list(t.shape)] for n, t in self._tensors.items()],
            "the settings": settings, "the steps made": self.steps,
            "the weights": slots.digest(self._tensors),
        }  # fmt: skip
        self._workers.check_start(agreement, next(iter(self._tensors.values())).device)
        self._agreed = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another optimizer was, after the network's own state has been loaded.

        Raises:
            SubspanError: if the state belongs to other ranks than the network has.
        """
        places = [p for group in self.param_groups for p in group["params"]]
        for index, values in state_dict["state"].items():
            for value in values.values():
                if isinstance(value, Tensor) and value.shape != places[index].shape:
                    raise SubspanError(
                        f"this state belongs to factors of shape {list(value.shape)}, the network "
                        f"has {list(places[index].shape)}: load the network's state first"
                    )
        super().load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Of the constructor's, with values that make sense.

        Raises:
            SubspanError: for a rate or a decay that is none.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "weight_decay"):
            if not 0 <= float(group[name]) < math.inf:
                raise SubspanError(f"{name} must be a number >= 0, got {group[name]}")
        if not 0 <= group["momentum"] < 1:
            raise SubspanError(f"momentum must be in [0, 1), got {group['momentum']}")


def _factors(layer: LowRank, copy: bool) -> Factors:
    """Of a layer, in a precision that bases can be orthonormal in."""
    wide = torch.float64 if layer.S.dtype == torch.float64 else torch.float32
    return Factors(*(p.detach().to(wide, copy=copy) for p in (layer.U, layer.S, layer.V)))
