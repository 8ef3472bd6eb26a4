"""Estimators of coordinates: how fast the loss changes along each vector of a basis.

gradient    backpropagation, then Pᵀ g (Gressmann 2020)
forward     a forward-mode derivative along each vector: no backward pass (Baydin 2022)
evolution   (L(θ + σ p) − L(θ − σ p))/2σ for each vector p: no derivative at all. With many vectors
            the antithetic evolution strategy that Gressmann compares with ("NES"), with one MeZO
            (Malladi 2023)

The last two evaluate the closure once or twice for every coordinate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from subspan.errors import SubspanError
from subspan.optim.compartment import CompartmentWeights
from subspan.optim.optimizer import evaluate
from subspan.registry import Registry

Closure = Callable[[], Any]


@dataclass(frozen=True)
class Estimator:
    """One way to the coordinates of a step; a subclass registers itself by its name.

    Args:
        compartments: the weights of all compartments.
        basis: which basis of a step is this process's.
        sigma: σ, the distance in weight space of evaluations, for estimators that have it.
    """

    compartments: tuple[CompartmentWeights, ...]
    basis: int
    sigma: float

    name: ClassVar[str]
    """The name that users type."""
    needs_closure: ClassVar[bool] = True
    """Whether the loss is evaluated here, by a closure that does not call ``backward()``."""

    def __init_subclass__(cls, *, name: str) -> None:
        ESTIMATORS.add(name, cls)
        cls.name = name

    def estimate(self, out: Tensor, redraw: Tensor, closure: Closure | None) -> Any:
        """Add coordinates to ``out``.

        Args:
            out: (d,) zeros.
            redraw: the number of the basis, 0-D int64.
            closure: evaluates the loss; given where it is needed.

        Returns:
            The loss, if there is a closure.

        Raises:
            SubspanError: if gradients, or a loss of one value that depends on the parameters, are
                missing.
        """
        raise NotImplementedError


ESTIMATORS: Registry[type[Estimator]] = Registry("estimator")


class Gradient(Estimator, name="gradient"):
    """Project the gradient that backpropagation leaves: Pᵀ g."""

    needs_closure = False

    def estimate(self, out: Tensor, redraw: Tensor, closure: Closure | None) -> Any:
        """Add Pᵀ g for the gradients that are there after the closure, if there is one."""
        loss = evaluate(closure)
        missing = True
        for weights in self.compartments:
            gradients: dict[str, Tensor | None] = {}
            for name, tensor in weights.tensors.items():
                grad = gradients[name] = tensor.grad
                missing = missing and grad is None
            weights.add_projected(out, gradients, self.basis, redraw)
        if missing:
            raise SubspanError("no parameter has a gradient: call backward() before step()")
        return loss


class Forward(Estimator, name="forward"):
    """Differentiate the loss along each vector by forward mode."""

    def estimate(self, out: Tensor, redraw: Tensor, closure: Closure | None) -> Tensor:
        """Add the derivatives, all of one function: evaluations draw the same random numbers."""
        assert closure is not None
        loss, generators = out.new_zeros(()), Generators(self.compartments)
        depends = False
        for weights in self.compartments:
            for j in range(weights.place.start, weights.place.stop):
                along = weights.vectors(_unit(out, j), self.basis, redraw)
                generators.restore()
                with forward_ad.dual_level():
                    for name, tangent in along.items():
                        # Subtracting zero changes no bit (adding would, of −0); the dual number
                        # brings the tangent.
                        zero = torch.zeros_like(tangent)
                        weights.tensors[name].sub_(forward_ad.make_dual(zero, -tangent))
                    loss, slope = forward_ad.unpack_dual(value(closure))
                    if slope is not None:
                        out[j] += slope
                        depends = True
        if not depends:
            raise SubspanError(
                "the loss has no derivative along any vector: the closure must compute it from "
                "the parameters, without detach() and inference_mode()"
            )
        return loss.detach()


class Evolution(Estimator, name="evolution"):
    """Take central differences of length σ along each vector."""

    def estimate(self, out: Tensor, redraw: Tensor, closure: Closure | None) -> Tensor:
        """Add the differences; the loss is the mean of all evaluations.

        Both evaluations of a pair draw the same random numbers (dropout masks, say), or the
        difference would be one of noise divided by 2σ; the next pair draws others.
        """
        probe = Probe(self, redraw, closure)
        total = out.new_zeros(())
        for weights in self.compartments:
            for j in range(weights.place.start, weights.place.stop):
                generators = Generators(self.compartments)
                above = probe.loss(weights, j, self.sigma, out)
                generators.restore()
                below = probe.loss(weights, j, -self.sigma, out)
                out[j] += (above - below) / (2 * self.sigma)
                total += above + below
        return total / (2 * out.numel())


class Probe:
    """Evaluates the loss at some distance from the weights, which come back to the last bit.

    A copy of them takes the memory that gradients would.

    Args:
        estimator: whose weights and basis these are.
        redraw: the number of the basis, 0-D int64.
        closure: evaluates the loss.
    """

    def __init__(self, estimator: Estimator, redraw: Tensor, closure: Closure | None) -> None:
        assert closure is not None
        self._basis, self._redraw, self._closure = estimator.basis, redraw, closure
        tensors = [t for weights in estimator.compartments for t in weights.tensors.values()]
        self._copies = {id(t): t.detach().clone() for t in tensors}

    def loss(self, weights: CompartmentWeights, j: int, length: float, like: Tensor) -> Tensor:
        """Return the loss at θ + length · P e_j, in the precision of coordinates ``like``."""
        weights.add_weights(_unit(like, j), self._basis, self._redraw, length)
        try:
            return value(self._closure).detach().to(like)
        finally:
            for tensor in weights.tensors.values():
                tensor.detach().copy_(self._copies[id(tensor)])


class Generators:
    """The states of PyTorch's random generators, of the CPU and of the devices of the weights."""

    def __init__(self, compartments: Sequence[CompartmentWeights]) -> None:
        devices = {tensor.device for weights in compartments for tensor in weights.tensors.values()}
        self._cpu = torch.get_rng_state()
        self._others: Mapping[torch.device, Tensor] = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in devices
            if device.type != "cpu"
        }

    def restore(self) -> None:
        """Have the generators go on from here again."""
        torch.set_rng_state(self._cpu)
        for device, state in self._others.items():
            torch.get_device_module(device).set_rng_state(state, device)


def _unit(like: Tensor, j: int) -> Tensor:
    """Return the coordinates of vector j alone."""
    unit = torch.zeros_like(like)
    unit[j] = 1
    return unit


def value(closure: Closure) -> Tensor:
    """Return the loss of a closure, a tensor without dimensions."""
    try:
        loss = closure()
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise SubspanError(
            "the closure calls backward(), and this estimator needs no gradient: it must return "
            "the loss alone"
        ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise SubspanError(f"the closure must return the loss, a tensor of one value, got {loss!r}")
    return loss.reshape(())
