"""Three ways to the same coordinates: how fast the loss changes along each vector of a basis.

gradient    backpropagation, then Pᵀ g (Gressmann 2020)
forward     a forward-mode derivative along each vector: no backward pass (Baydin 2022)
evolution   (L(θ + σ p) − L(θ − σ p))/2σ for each vector p: no derivative at all. With many vectors
            the antithetic evolution strategy that Gressmann compares with ("NES"), with one MeZO
            (Malladi 2023)

The last two evaluate the closure once or twice for every coordinate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from subspan.errors import SubspanError
from subspan.optim.parts import Part

Closure = Callable[[], Tensor]


def gradient(parts: Sequence[Part], out: Tensor, basis: int, step: int | Tensor) -> None:
    """Coordinates of the gradients that are there, added to ``out``.

    Raises:
        SubspanError: if no tensor has a gradient.
    """
    grads = [{name: tensor.grad for name, tensor in part.tensors.items()} for part in parts]
    if all(grad is None for found in grads for grad in found.values()):
        raise SubspanError("no parameter has a gradient: call backward() before step()")
    for part, found in zip(parts, grads, strict=True):
        part.add_projected(out, found, basis=basis, step=step)


def forward(
    parts: Sequence[Part], out: Tensor, basis: int, step: int | Tensor, closure: Closure
) -> Tensor:
    """Derivatives along each vector, added to ``out``; returns the loss.

    All are derivatives of one function: every evaluation draws the same random numbers.
    """
    loss, random = out.new_zeros(()), Random(parts)
    for part in parts:
        for j in range(part.place.start, part.place.stop):
            along = part.vectors(_unit(out, j), basis=basis, step=step)
            random.restore()
            with forward_ad.dual_level():
                for name, tangent in along.items():
                    # Subtracting zero changes no bit (adding would, of −0), and brings the tangent.
                    zero = torch.zeros_like(tangent)
                    part.tensors[name].sub_(forward_ad.make_dual(zero, -tangent))
                loss, slope = forward_ad.unpack_dual(_value(closure))
                if slope is not None:
                    out[j] += slope
    return loss.detach()


def evolution(
    parts: Sequence[Part],
    out: Tensor,
    basis: int,
    step: int | Tensor,
    closure: Closure,
    sigma: float,
) -> Tensor:
    """Central differences of length σ along each vector, added to ``out``; returns the mean loss.

    The weights come back to the last bit: a copy takes the memory that gradients would. Both
    evaluations of a pair draw the same random numbers (dropout masks, say), or the difference would
    be one of noise divided by 2σ; the next pair draws others.
    """
    total = out.new_zeros(())
    copies = {id(t): t.detach().clone() for part in parts for t in part.tensors.values()}
    for part in parts:
        for j in range(part.place.start, part.place.stop):
            unit, random = _unit(out, j), Random(parts)
            ends = []
            for sign in (1.0, -1.0):
                part.add_weights(unit, basis=basis, step=step, alpha=sign * sigma)
                random.restore()
                try:
                    ends.append(_value(closure).detach().to(out))
                finally:
                    for tensor in part.tensors.values():
                        tensor.detach().copy_(copies[id(tensor)])
            out[j] += (ends[0] - ends[1]) / (2 * sigma)
            total += ends[0] + ends[1]
    return total / (2 * out.numel())


class Random:
    """The states of PyTorch's generators, of the CPU and of the devices that weights are on."""

    def __init__(self, parts: Sequence[Part]) -> None:
        devices = {tensor.device for part in parts for tensor in part.tensors.values()}
        self._cpu = torch.get_rng_state()
        self._others = {
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
    unit = torch.zeros_like(like)
    unit[j] = 1
    return unit


def _value(closure: Closure) -> Tensor:
    loss = closure()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise SubspanError(f"the closure must return the loss, a tensor of one value, got {loss!r}")
    return loss.reshape(())
