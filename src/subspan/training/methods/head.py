"""A few parameters trained as they are: the head alone, or a head beside adapters.

The head alone is the floor of fine-tuning: what a linear classifier makes of the features that a
pretrained network has already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from subspan.checkpoint.part import base_of, hold_base, trained_tensors
from subspan.counts import count
from subspan.subspace.compartments import Patterns, select
from subspan.subspace.parameters import find_aliases, find_quantised, find_slots
from subspan.subspace.targets import Presets
from subspan.training.config import Run
from subspan.training.methods import RATE_OF_HEAD, TRAIN_FULLY, Method, Option


def name_head(net: nn.Module, patterns: Patterns = "head") -> list[str]:
    """Return the names of the parameters of a network's head, or of those that patterns select."""
    places = find_slots(net)
    names = find_aliases(places)
    packed = find_quantised(net, places)
    shapes = {name: packed.get(name, net.get_parameter(name)).shape for name in names}
    chosen = select(names, patterns, "train_fully", presets=Presets(net, names, shapes))
    return [name for name in names if name in chosen]


def find_head(net: nn.Module, patterns: Patterns = "head") -> list[nn.Parameter]:
    """Return the parameters themselves."""
    return [net.get_parameter(name) for name in name_head(net, patterns)]


class FineTuning(Method):
    """A method that trains a head and adapters, and leaves the weights as they are.

    A checkpoint holds what is trained; a network that the same method has wrapped takes it.
    """

    options: tuple[Option, ...] = (TRAIN_FULLY, RATE_OF_HEAD)

    def wrap(self, net: nn.Module, seed: int, options: Mapping[str, Any]) -> nn.Module:
        """Freeze the network, put adapters into it, and let the head be trained."""
        weights, head = count(net).dense, self.head(net, options)
        net.requires_grad_(False)
        self.adapt(net, seed, options, head)
        for parameter in head:
            parameter.requires_grad_(True)
        hold_base(net, weights)
        return net

    def adapt(
        self, net: nn.Module, seed: int, options: Mapping[str, Any], head: list[nn.Parameter]
    ) -> None:
        """Put adapters into a frozen network; by default none.

        Raises:
            SubspanError: for options that do not fit the network.
        """

    def head(self, model: nn.Module, options: Mapping[str, Any]) -> list[nn.Parameter]:
        """Return the head."""
        return find_head(model, options.get("train_fully", "head"))

    def rates(self, options: Mapping[str, Any]) -> tuple[float, ...]:
        """Return rates for the head alone."""
        return (1e-3, 3e-3, 1e-2)

    def counts(self, model: nn.Module) -> dict[str, Any]:
        """Count what is trained and what a file holds; weights are those without adapters."""
        base = base_of(model)
        assert base is not None
        return {
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "stored_parameters": sum(t.numel() for t in trained_tensors(model, base).values()),
            "weights": base.weights,
        }


class Head(FineTuning):
    """The head alone."""

    options = (TRAIN_FULLY,)

    def head_lr(self, run: Run) -> float:
        """Return the run's rate: there is no other."""
        return run.lr


Head("head", "only the head, on what the network computes already")
