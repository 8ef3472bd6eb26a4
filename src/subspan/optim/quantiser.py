"""Training with the quantiser in the loop: the loss sees coordinates that are multiples of a step.

Source: Courbariaux, Bengio and David, "BinaryConnect", NeurIPS 2015. The gradient at Δ round(w/Δ)
moves w itself (the straight-through estimator of Bengio, Léonard and Courville, 2013).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from subspan.coding import choose_step, coded_bits, round_to_levels
from subspan.coding.steps import from_levels
from subspan.errors import SubspanError
from subspan.subspace.model import SubspaceModel

STEP, EXACT = "quantiser_step", "exact"  # in the optimizer's state of each coordinate
LEFT = "quantiser_left"  # in its first group, so that a training that is resumed knows it
ROOM = 0.98  # of the bits are used by a new step, so that it lasts while coordinates grow


class Quantiser:
    """Rounds a model's coordinates after every step of an optimizer, in any loop of training.

    Between two steps the coordinates are Δq, with integers q: those are what is evaluated, merged
    and saved. The optimizer itself moves the exact ones, which are in its ``state_dict``. Δ is the
    finest with which the coded coordinates take no more than ``bits`` each, and is chosen anew
    where they do::

        optimizer = torch.optim.Adam(model.parameters(), lr)
        subspan.optim.Quantiser(model, optimizer, bits=2, after=2000)
        ...  # the loop as it is, 3,000 steps, say
        subspan.save(model, "model.subspan", bits=2)

    Args:
        model: whose coordinates are trained. What is trained fully is left alone.
        optimizer: any of PyTorch's, of these coordinates, whose ``step()`` is called without a
            closure.
        bits: for each coordinate on average, as in :func:`subspan.save`.
        after: the steps from now on that are made without rounding.

    Raises:
        SubspanError: if ``bits`` is not positive, ``after`` is negative, or the optimizer does not
            train all coordinates.
    """

    def __init__(
        self, model: SubspaceModel, optimizer: Optimizer, bits: float, after: int = 0
    ) -> None:
        if not 0 < bits < float("inf"):
            raise SubspanError(f"bits must be a positive number of bits a coordinate, got {bits}")
        if after < 0:
            raise SubspanError(f"after must not be negative, got {after}")
        self.bits, self.model, self.optimizer = bits, model, optimizer
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not all(id(w) in held for w in self.coordinates):
            raise SubspanError("the optimizer does not train all coordinates of this model")
        optimizer.param_groups[0][LEFT] = after
        self._hooks = (
            optimizer.register_step_pre_hook(self._restore),
            optimizer.register_step_post_hook(self._round),
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
        """Round no more; the coordinates stay as they are."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _restore(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Any) -> None:
        """Let the optimizer move the exact coordinates."""
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            raise SubspanError(
                "a step with a closure evaluates the loss at coordinates that are not quantised: "
                "call backward() first and step() without arguments"
            )
        for w in self.coordinates:
            if (exact := optimizer.state[w].get(EXACT)) is not None:
                w.copy_(exact)

    @torch.no_grad()
    def _round(self, optimizer: Optimizer, *_: Any) -> None:
        """Keep the exact coordinates, and leave their nearest multiples of Δ in their place."""
        first = optimizer.param_groups[0]
        if first[LEFT]:
            first[LEFT] -= 1
            return
        step = self.step
        exact = torch.cat([w.detach().cpu() for w in self.coordinates])
        fits = step and coded_bits(round_to_levels(exact, step)) <= self.bits * exact.numel()
        if not step or not fits:
            step = choose_step(exact, self.bits * (ROOM if step else 1.0))
        rounded = from_levels(round_to_levels(exact, step), step, exact.dtype)
        parts = rounded.split([w.numel() for w in self.coordinates])
        for w, part in zip(self.coordinates, parts, strict=True):
            optimizer.state[w] |= {STEP: step, EXACT: w.detach().clone()}
            w.copy_(part)


def is_rounding(optimizer: Optimizer) -> bool:
    """Return whether a quantiser has begun to round what this optimizer trains."""
    return any(STEP in state for state in optimizer.state.values())
