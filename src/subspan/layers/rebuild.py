"""Compressed layers from their recipes, to be filled from a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from subspan.errors import SubspanError
from subspan.layers.handover import hand_over, refuse_hooks
from subspan.layers.protocol import Compressed, Counterpart, Device, comes_back
from subspan.layers.replace import check_replaceable, exchange, find_replaceable, put_layers

Layer = TypeVar("Layer", bound=Compressed)


def rebuild_layers(
    net: nn.Module, types: Mapping[type[Compressed], Mapping[str, Any]], *, resize: bool = True
) -> nn.Module:
    """Give exactly these layers these recipes, by type and full name, with any values.

    The layers of ``net``, which is changed in place, are ordinary or of the same type. The new
    layer is returned if ``net`` itself is one that was replaced. Layers that can take another
    recipe in place, and lose their values by it, do so only with ``resize``.

    Raises:
        SubspanError: if the network is another one. It is then untouched.
    """
    modules, candidates = dict(net.named_modules()), find_replaceable(net)
    wanted = {name: (kind, recipe) for kind, of in types.items() for name, recipe in of.items()}
    present = {
        name: layer
        for name, (kind, _) in wanted.items()
        if isinstance(layer := modules.get(name), kind) and comes_back(layer, kind)
    }
    for name, (kind, _) in wanted.items():
        if name not in present and name not in candidates:
            raise SubspanError(
                f"the network has no layer {name!r} that could be of the type {kind.type_name!r}"
            )
    check_replaceable(candidates, [name for name in wanted if name not in present])
    placed: dict[str, nn.Module] = {}
    successors: dict[int, nn.Module] = {}
    resized: dict[str, Compressed] = {}
    for name, (kind, recipe) in wanted.items():
        layer = present.get(name)
        if layer is None:
            placed[name] = _make(name, kind, candidates[name].plain, recipe)
        elif kind.resizes:
            _make(name, kind, layer, recipe, device="meta")  # refuses what cannot be
            resized[name] = layer
        elif layer.recipe != recipe:
            new = _make(name, kind, layer, recipe)
            successors[id(layer)] = succeed(name, layer, new)
    net = exchange(put_layers(net, candidates, placed), successors)
    for name, layer in resized.items():
        if resize and layer.recipe != (recipe := wanted[name][1]):
            layer.resize(recipe)
    return net


def _make(
    name: str, kind: type[Compressed], like: Counterpart, recipe: Any, device: Device = None
) -> Compressed:
    """Make the layer of a recipe, or refuse by its name a recipe that cannot be, from a file."""
    try:
        return kind.rebuild(like, recipe, device)
    except SubspanError as error:
        raise SubspanError(f"layer {name!r}: {error}") from None
    except (TypeError, ValueError, KeyError) as error:
        raise SubspanError(
            f"layer {name!r}: {recipe!r} is no recipe of the type {kind.type_name!r}: {error}"
        ) from error


def succeed(name: str, layer: Layer, new: Layer) -> Layer:
    """Give a layer the hooks, attributes and flags of the one whose place it will take.

    Both are of one type. A hook that the new one could not have is refused.
    """
    refuse_hooks(name, layer)
    hand_over(name, layer, new, layer.rebuild(layer, layer.recipe, device="meta"))
    before = dict(layer.named_parameters())
    for key, parameter in new.named_parameters():
        if key in before:
            parameter.requires_grad_(before[key].requires_grad)
    return new
