"""Products of sums in the places of a network's layers, and layers from their recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from subspan.errors import SubspanError
from subspan.layers.handover import hand_over, refuse_hooks
from subspan.layers.places import check, chosen, places, put, replaced
from subspan.layers.product_of_sums.layer import (
    ProductOfSums,
    ProductOfSumsConv2d,
    ProductOfSumsLinear,
)
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
    found = places(net)
    names = chosen(net, found, list(rules), exclude)
    new: dict[str, nn.Module] = {}
    for stream, name in enumerate(names):
        factors = next(value for pattern, value in rules.items() if matches(pattern, name))
        layer = found[name].plain
        n, m = layer.weight.flatten(1).shape
        has_bias = layer.bias is not None if bias is None else bias
        try:
            factors = factors(n, m) if callable(factors) else factors
            new[name] = remade(
                layer, {"factors": factors, "bias": has_bias, "seed": seed, "stream": stream,
                        "init": init},
            )  # fmt: skip
        except SubspanError as error:
            raise SubspanError(f"layer {name!r}: {error}") from None
    return put(net, found, new)


def product_of_sums_like(net: nn.Module, recipes: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Give exactly these layers these recipes, with any values: to be filled from a checkpoint.

    Args:
        net: changed in place; its layers are ordinary, or products of sums.
        recipes: of :attr:`ProductOfSums.recipe`, by the layers' full names.

    Raises:
        SubspanError: if the network is another one. It is then untouched.
    """
    found, modules = places(net), dict(net.named_modules())
    new: dict[str, nn.Module] = {}
    others: dict[int, nn.Module] = {}
    for name in recipes:
        if name not in found and not isinstance(modules.get(name), ProductOfSums):
            raise SubspanError(
                f"the network has no layer {name!r} that could be this product of sums"
            )
    check(found, [name for name in recipes if name in found])
    for name, recipe in recipes.items():
        there = modules.get(name)
        if name in found:
            new[name] = remade(found[name].plain, recipe)
        elif isinstance(there, ProductOfSums) and there.recipe != recipe:
            others[id(there)] = succeeded(name, there, remade(there, recipe))
    return replaced(put(net, found, new), others)


def succeeded(name: str, layer: ProductOfSums, new: ProductOfSums) -> ProductOfSums:
    """Give a product of sums the hooks, attributes and flags of the one whose place it will take.

    Raises:
        SubspanError: for a hook that it could not have.
    """
    refuse_hooks(name, layer)
    fresh = remade(layer, layer.recipe, device="meta")
    hand_over(name, layer, new, fresh)
    for i, trained in enumerate(layer.trained):
        if trained and i < len(new.trained) and new.trained[i]:
            new.get_parameter(f"a{i}").requires_grad_(layer.get_parameter(f"a{i}").requires_grad)
    return new


def registry(layer: ProductOfSums) -> tuple[list[str], list[str]]:
    """Name the parameters and the buffers that a product of sums registers by itself."""
    own = [f"a{i}" for i in range(len(layer.sums))]
    parameters = [name for name, trained in zip(own, layer.trained, strict=True) if trained]
    constants = [name for names in layer._constants for name in names]
    return [*parameters, "bias"], [*own, *constants]


def remade(
    layer: nn.Linear | nn.Conv2d | ProductOfSums, recipe: Mapping[str, Any],
    device: torch.device | str | None = None,
) -> ProductOfSums:  # fmt: skip
    """Make a recipe's product of sums, on its input as a layer lies, with first values."""
    like = layer.values(0) if isinstance(layer, ProductOfSums) else layer.weight
    options = dict(recipe) | {"device": device or like.device, "dtype": like.dtype}
    new: ProductOfSums
    if isinstance(layer, nn.Conv2d | ProductOfSumsConv2d):
        new = ProductOfSumsConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, stride=layer.stride,  # type: ignore[arg-type]
            padding=layer.padding, dilation=layer.dilation, padding_mode=layer.padding_mode,  # type: ignore[arg-type]
            **options,
        )  # fmt: skip
    else:
        new = ProductOfSumsLinear(layer.in_features, layer.out_features, **options)  # type: ignore[arg-type]
    return new.train(layer.training)
