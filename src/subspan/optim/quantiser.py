"""Training that ends with rounded coordinates: they are fixed on a grid, a part at a time.

Source: Zhou, Yao, Guo, Xu and Chen, "Incremental network quantization", ICLR 2017. Whatever is
rounded stays, and what is still free goes on training and makes up for it. (With the
straight-through estimator all coordinates are rounded at every step, and go to and fro between two
levels for as long as the rate lets them: Nagel, Fournarakis, Bondarenko and Blankevoort,
"Overcoming oscillations in quantization-aware training", ICML 2022.)
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from subspan.coding import choose_step, coded_bits, round_to_levels
from subspan.coding.steps import from_levels
from subspan.errors import SubspanError
from subspan.subspace.model import SubspaceModel

STEP = "quantiser_step"  # Δ, in the optimizer's state of each coordinate
FIXED = "quantiser_fixed"  # likewise: the coordinates that are rounded, NaN where they are free
DONE = "quantiser_done"  # steps, in its first group, so that a training that is resumed knows it
ROOM = 0.98  # of the bits are used by Δ, so that it lasts while coordinates grow
_USED: WeakSet[Optimizer] = WeakSet()  # by quantisers: two would undo each other's grid


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

    Args:
        model: whose coordinates are trained. What is trained fully is left alone.
        optimizer: any of PyTorch's, of these coordinates, whose ``step()`` is called without a
            closure.
        bits: for each coordinate on average, as in :func:`subspan.save`.
        steps: in which the coordinates are fixed. Let the rate fall in them, slowly.
        after: the steps from now on that are made before.

    Raises:
        SubspanError: if ``bits`` or ``steps`` are not positive, ``after`` is negative, or the
            optimizer does not train all coordinates or has a quantiser already.
    """

    def __init__(
        self, model: SubspaceModel, optimizer: Optimizer, bits: float, steps: int, after: int = 0
    ) -> None:
        if not 0 < bits < math.inf:
            raise SubspanError(f"bits must be a positive number of bits a coordinate, got {bits}")
        if steps < 1:
            raise SubspanError(f"steps must be at least 1, got {steps}")
        if after < 0:
            raise SubspanError(f"after must not be negative, got {after}")
        self.model, self.optimizer = model, optimizer
        self.bits, self.steps, self.after = bits, steps, after
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not all(id(w) in held for w in self.coordinates):
            raise SubspanError("the optimizer does not train all coordinates of this model")
        if optimizer in _USED:
            raise SubspanError("the optimizer has a quantiser already: remove() that first")
        _USED.add(optimizer)
        optimizer.param_groups[0].setdefault(DONE, 0)  # it may go on from a state that was loaded
        self._hooks = (
            optimizer.register_step_pre_hook(_refuse_closure),
            optimizer.register_step_post_hook(self._fix),
        )

    @property
    def coordinates(self) -> list[Tensor]:
        """The model's coordinates as they are now: it may have grown."""
        return list(self.model.coordinates.values())

    @property
    def step(self) -> float | None:
        """Δ; None before the first rounding."""
        return self.optimizer.state[self.coordinates[0]].get(STEP)

    def remove(self) -> None:
        """Round no more, and let all coordinates move again from where they are."""
        for hook in self._hooks:
            hook.remove()
        _USED.discard(self.optimizer)
        self.optimizer.param_groups[0].pop(DONE, None)
        for state in self.optimizer.state.values():
            state.pop(STEP, None)
            state.pop(FIXED, None)

    @torch.no_grad()
    def _fix(self, optimizer: Optimizer, *_: Any) -> None:
        """Put fixed coordinates back to where they were, and fix some more."""
        first = optimizer.param_groups[0]
        first[DONE] += 1
        if (done := first[DONE] - self.after) < 1:
            return
        own = self.coordinates
        w, step = torch.cat([part.detach().cpu() for part in own]), self.step
        free = torch.ones_like(w, dtype=torch.bool)
        if step:
            fixed = torch.cat([optimizer.state[part][FIXED].cpu() for part in own])
            free = fixed.isnan()
            w = torch.where(free, w, fixed)
        if not step or coded_bits(round_to_levels(w, step)) > self.bits * w.numel():
            step, free = choose_step(w, self.bits * ROOM), torch.ones_like(free)
        rounded = from_levels(round_to_levels(w, step), step, w.dtype)
        left = 1 - min(done / self.steps, 1.0)
        due = math.ceil((1 - left**2) * w.numel()) - int((~free).sum())
        distance = (w - rounded).abs().where(free, math.inf)
        free[distance.argsort(stable=True)[: max(due, 0)]] = False
        w = torch.where(free, w, rounded)  # what was fixed before is rounded already
        sizes = [part.numel() for part in own]
        fixed = w.masked_fill(free, math.nan)
        for part, value, held in zip(own, w.split(sizes), fixed.split(sizes), strict=True):
            optimizer.state[part] |= {STEP: step, FIXED: held.to(part.device, copy=True)}
            part.copy_(value)


def _refuse_closure(optimizer: Optimizer, args: tuple[Any, ...], kwargs: Any) -> None:
    if any(value is not None for value in (*args[1:], *kwargs.values())):
        raise SubspanError(
            "a step with a closure may evaluate the loss where fixed coordinates have moved: call "
            "backward() first and step() without arguments"
        )


def all_fixed(optimizer: Optimizer) -> bool:
    """Return whether a quantiser has rounded all that this optimizer trains."""
    found = [state[FIXED] for state in optimizer.state.values() if FIXED in state]
    return bool(found) and not any(bool(held.isnan().any()) for held in found)
