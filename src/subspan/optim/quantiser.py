"""Training that ends with rounded coordinates: they are fixed on a grid, a part at a time.

Source: Zhou, Yao, Guo, Xu and Chen, "Incremental network quantization", ICLR 2017. Whatever is
rounded stays, and what is still free goes on training and makes up for it. (With the
straight-through estimator all coordinates are rounded at every step, and go to and fro between two
levels for as long as the rate lets them: Nagel, Fournarakis, Bondarenko and Blankevoort,
"Overcoming oscillations in quantization-aware training", ICML 2022.)
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from subspan.coding import check_bits, choose_step, coded_bits, fits, round_to_levels
from subspan.coding.steps import from_levels
from subspan.errors import SubspanError
from subspan.subspace.growing import FIXED
from subspan.subspace.model import SubspaceModel

# Beside FIXED (the coordinates that are rounded, NaN where they are free) in the optimizer's first
# group, so that a training that is resumed knows them. A parameter's state is the optimizer's own:
# Adam takes one that is not empty for its moments.
STEP = "quantiser_step"  # Δ
DONE = "quantiser_done"  # steps
PLAN = "quantiser_plan"  # bits, steps and after
ROOM = 0.98  # of the bits are used by Δ, so that it lasts while coordinates grow
_ALL: WeakSet[Quantiser] = WeakSet()  # that are at work


class Quantiser:
    """Rounds a model's coordinates in the course of a training, in any loop.

    When a share u of its steps is done, a share 1 - (1 - u)² of the coordinates is fixed, those
    nearest to a level first. A level is Δq with an integer q; Δ is the finest with which all
    coordinates take no more than ``bits`` each when they are coded. If they outgrow that, Δ is
    chosen anew and so is what is fixed. After the last step all coordinates lie on the grid, and
    move no more::

        optimizer = torch.optim.Adam(model.parameters(), lr)
        subspan.optim.Quantiser(model, optimizer, bits=3, after=1000, steps=2000)
        ...  # the loop as it is, of 3,000 steps
        subspan.save(model, "model.subspan", bits=3)

    All that it knows is in the optimizer's state. Copies of model and optimizer need one of their
    own: copy it with them, or make one with the same arguments, which goes on where that was. Of a
    step that a GradScaler leaves out it is told by :meth:`skipped`.

    Args:
        model: whose coordinates are trained, or its network. What is trained fully is left alone.
        optimizer: any of PyTorch's, of these coordinates, or accelerate's around it, whose
            ``step()`` is called without a closure.
        bits: for each coordinate on average, as in :func:`subspan.save`.
        steps: in which the coordinates are fixed. Let the rate fall in them, slowly.
        after: the steps from now on that are made before.

    Raises:
        SubspanError: if ``bits`` or ``steps`` are not positive, ``bits`` hold no coordinate but 0,
            ``after`` is negative, there is no such model or optimizer, or the optimizer does not
            train all coordinates or has a quantiser already.
    """

    def __init__(
        self,
        model: SubspaceModel,
        optimizer: Optimizer,
        bits: float,
        steps: float,
        after: float = 0,
    ) -> None:
        check_bits(bits)
        for name, value, lowest in (("steps", steps, 1), ("after", after, 0)):
            if not isinstance(value, Real) or not lowest <= value < math.inf:
                raise SubspanError(f"{name} must be a number of at least {lowest}, got {value!r}")
        found = SubspaceModel.of(model)
        if found is None:
            raise SubspanError(
                "only a SubspaceModel, or its network, has coordinates to round, got "
                f"{type(model).__name__}: give what DDP or torch.compile has wrapped itself"
            )
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner  # of accelerate's, which has no hooks
        if not isinstance(optimizer, Optimizer):
            raise SubspanError(f"optimizer must be one of PyTorch's, got {optimizer!r}")
        self.model, self.optimizer = found, optimizer
        self.bits, self.steps, self.after = bits, steps, after
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not all(id(w) in held for w in self.coordinates):
            raise SubspanError("the optimizer does not train all coordinates of this model")
        d = sum(w.numel() for w in self.coordinates)
        ones = ((np.arange(d) < k).astype(np.int64) for k in (1, d))
        if (least := min(map(coded_bits, ones)) / (ROOM * d)) > bits:
            raise SubspanError(
                f"with {bits:g} bits each, all of {d} coordinates would be 0: give at least "
                f"{math.ceil(1000 * least) / 1000:g}"
            )
        self._attach()

    def _attach(self) -> None:
        """Have steps noticed, by this quantiser alone: two would undo each other's grid."""
        if any(other.optimizer is self.optimizer for other in _ALL):
            raise SubspanError("the optimizer has a quantiser already: remove() that first")
        _ALL.add(self)
        self._hooks = (
            self.optimizer.register_step_pre_hook(self._check),
            self.optimizer.register_step_post_hook(self._fix),
        )
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the hooks, which PyTorch does not copy with an optimizer either."""
        return vars(self) | {"_hooks": self in _ALL}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be the quantiser of the optimizer that was copied with it."""
        vars(self).update(state)
        if self._hooks:
            self._attach()

    @property
    def coordinates(self) -> list[Tensor]:
        """The model's coordinates as they are now: it may have grown."""
        return list(self.model.coordinates.values())

    @property
    def step(self) -> float | None:
        """Δ; None before the first rounding."""
        return self.optimizer.param_groups[0].get(STEP)

    def remove(self) -> None:
        """Round no more, and let all coordinates move again from where they are."""
        if self not in _ALL:
            return  # it is another's turn
        _ALL.remove(self)
        for hook in self._hooks:
            hook.remove()
        for name in (PLAN, DONE, STEP, FIXED):
            self.optimizer.param_groups[0].pop(name, None)

    def skipped(self) -> None:
        """Count a step that was left out, as a GradScaler does where gradients are not finite."""
        if self in _ALL:
            self._check(self.optimizer, (), {})
            self._fix()

    def _begin(self) -> dict[str, Any]:
        """Return the group that all is kept in, by a state that was loaded or from the start."""
        group = self.optimizer.param_groups[0]
        if DONE not in group:
            group |= {DONE: 0, PLAN: self._plan}
        return group

    @property
    def _plan(self) -> tuple[float, float, float]:
        return float(self.bits), float(self.steps), float(self.after)

    def _joined(self) -> Tensor:
        return torch.cat([part.detach().cpu() for part in self.coordinates])

    def _check(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Any) -> None:
        """Refuse a step that would not go on from the last one, before anything moves."""
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            raise SubspanError(
                "a step with a closure may evaluate the loss where fixed coordinates have moved: "
                "call backward() first and step() without arguments"
            )
        group = self._begin()
        if tuple(plan := group.get(PLAN, self._plan)) != self._plan:
            raise SubspanError(
                "the optimizer's state is that of a Quantiser with bits={:g}, steps={:g} and "
                "after={:g}: make one like that to go on, or remove() this one and make it "
                "again to begin anew".format(*plan)
            )
        if FIXED not in group:
            return
        w, fixed = self._joined(), group[FIXED].cpu()
        if len(w) != len(fixed) or not bool(((w == fixed) | fixed.isnan()).all()):
            raise SubspanError(
                "coordinates that are fixed are not where the last step left them: load the states "
                "of model and optimizer together, or remove() the Quantiser to train on from here"
            )

    @torch.no_grad()
    def _fix(self, *_: Any) -> None:
        """Put fixed coordinates back to where they were, and fix some more."""
        group = self._begin()
        group[DONE] += 1
        if (done := group[DONE] - self.after) < 1:
            return
        w, step = self._joined(), self.step
        free = torch.ones_like(w, dtype=torch.bool)
        if step:
            fixed = group[FIXED].cpu()
            free = fixed.isnan()
            w = torch.where(free, w, fixed)
        if not step or not fits(w, step, self.bits):
            step, free = choose_step(w, self.bits * ROOM), torch.ones_like(free)
        rounded = from_levels(round_to_levels(w, step), step, w.dtype)
        left = 1 - min(done / self.steps, 1.0)
        due = math.ceil((1 - left**2) * w.numel()) - int((~free).sum())
        distance = (w - rounded).abs().where(free, math.inf)
        free[distance.argsort(stable=True)[: max(due, 0)]] = False
        w = torch.where(free, w, rounded)  # what was fixed before is rounded already
        group |= {STEP: step, FIXED: w.masked_fill(free, math.nan)}
        own = self.coordinates
        for part, value in zip(own, w.split([part.numel() for part in own]), strict=True):
            part.copy_(value)


def quantiser_of(optimizer: Optimizer) -> Quantiser | None:
    """Return the quantiser at work on an optimizer's coordinates, if there is one."""
    for found in _ALL:
        if found.optimizer is optimizer:
            return found
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}  # of a wrapper
    return next((q for q in _ALL if any(id(w) in given for w in q.coordinates)), None)


def _refuse_without(optimizer: Optimizer, *_: Any) -> None:
    """Refuse a step that would move what is fixed, of a copy or where a state was loaded."""
    begun = any(DONE in group for group in optimizer.param_groups[:1])
    if begun and quantiser_of(optimizer) is None:
        raise SubspanError(
            "the optimizer has the state of a Quantiser but none at work, since it is a copy or "
            "has loaded that state: make one with the same arguments to go on, and remove() it to "
            "round no more"
        )


register_optimizer_step_pre_hook(_refuse_without)


def all_fixed(optimizer: Optimizer) -> bool:
    """Return whether a quantiser has rounded all that this optimizer trains."""
    group = optimizer.param_groups[0]
    return FIXED in group and not bool(group[FIXED].isnan().any())
