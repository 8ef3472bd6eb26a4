"""Products of sums in the places of a network's layers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch import nn

from subspan.errors import SubspanError
from subspan.layers.product_of_sums.layer import ProductOfSums
from subspan.layers.protocol import Compressed
from subspan.layers.replace import replace_layers
from subspan.subspace.compartments import Patterns, matches


def product_of_sums(
    net: nn.Module, rules: Mapping[str, Any], *, bias: bool | int | None = None, seed: int = 0,
    init: str = "he", exclude: Patterns = None,
) -> nn.Module:  # fmt: skip
    """Put products of sums in place of a network's linear and convolutional layers.

    Their weights begin anew, at random: what the layers had learnt is gone
    (:func:`subspan.layers.fit` goes the other way). Hooks, attributes, ``training`` and
    ``requires_grad`` stay.

    Args:
        net: changed in place.
        rules: {pattern: factors}, patterns of layers as of :class:`~subspan.SubspaceModel`; the
            first that fits a layer counts, and a layer that none fits stays. Factors are a list as
            of :class:`ProductOfSums`, or a function of n and m that gives one.
        bias: as of :class:`ProductOfSumsLinear`; None for what each layer has.
        seed: of the fixed matrices; every layer draws its own.
        init: "he", "glorot" or "lecun".
        exclude: patterns of layers to leave as they are.

    Returns:
        ``net``; or the new layer, if ``net`` itself is one that was replaced.

    Raises:
        SubspanError: for factors that do not fit a layer, which it names; for a layer that cannot
            be replaced, as of :func:`~subspan.layers.factorize`. The network is then untouched.
    """
    streams = itertools.count()

    def make(name: str, layer: nn.Linear | nn.Conv2d) -> Compressed:
        factors = next(value for pattern, value in rules.items() if matches(pattern, name))
        n, m = layer.weight.flatten(1).shape
        recipe = {
            "bias": layer.bias is not None if bias is None else bias,
            "seed": seed,
            "stream": next(streams),
            "init": init,
        }
        try:
            factors = factors(n, m) if callable(factors) else factors
            return ProductOfSums.rebuild(layer, recipe | {"factors": factors})
        except SubspanError as error:
            raise SubspanError(f"layer {name!r}: {error}") from None

    return replace_layers(net, make, targets=list(rules), exclude=exclude)
