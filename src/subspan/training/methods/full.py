"""Ordinary training of all weights: what every other method is held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from subspan.training.methods import RATE_OF_HEAD, Method
from subspan.training.methods.head import find_head


class Full(Method):
    """All weights, trained and stored as they are."""

    options = (RATE_OF_HEAD,)

    def wrap(self, net: nn.Module, seed: int, options: Mapping[str, Any]) -> nn.Module:
        """Return the network as it is."""
        return net

    def head(self, model: nn.Module, options: Mapping[str, Any]) -> list[nn.Parameter]:
        """Return the head if it is to have a rate of its own."""
        return find_head(model) if "head_lr" in options else []

    def rates(self, options: Mapping[str, Any]) -> tuple[float, ...]:
        """Return rates around Adam's usual 1e-3."""
        return (3e-4, 1e-3, 3e-3)


Full("full", "ordinary training of all weights")
