"""Where in a network a layer of ours can stand, and how it gets there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from subspan.compartments import Patterns, select
from subspan.errors import SubspanError
from subspan.layers.attention import PROJECTIONS, Attention
from subspan.slots import slots

# The second is what nn.MultiheadAttention has for its output: a Linear in all but name.
LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


@dataclass(frozen=True)
class Place:
    """A layer that can be replaced, and the attention that it would be part of."""

    layer: nn.Linear | nn.Conv2d
    attention: Attention | None = None
    projection: str = ""
    original: nn.MultiheadAttention | None = None


def places(net: nn.Module) -> dict[str, Place]:
    """Every layer that can be replaced, by its first name."""
    found: dict[str, Place] = {}
    inside: set[int] = set()
    for name, module in net.named_modules():
        dot = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            inside.add(id(module.out_proj))
            if module.bias_k is None and not module.add_zero_attn:
                split = Attention(module)
                for part in PROJECTIONS:
                    found[dot + part] = Place(getattr(split, part), split, part, module)
        elif id(module) not in inside and (
            type(module) in LINEAR or (type(module) is nn.Conv2d and module.groups == 1)
        ):
            found[name] = Place(module)
    return found


def chosen(
    net: nn.Module, found: Mapping[str, Place], targets: Patterns, exclude: Patterns
) -> list[str]:
    """Names of the layers that patterns select; by default all that share their weight with none.

    Raises:
        SubspanError: for a pattern that selects nothing, a shared weight, and if none is left.
    """
    paths: dict[int, list[str]] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    names = {name: paths.get(id(place.layer), [name]) for name, place in found.items()}
    tied = _tied(net)
    if targets is None:
        wanted = {name for name, place in found.items() if id(place.layer.weight) not in tied}
    else:
        wanted = select(names, targets, "targets", "layer")
        for name in sorted(wanted):
            if id(found[name].layer.weight) in tied:
                raise SubspanError(f"{name} shares its weight with another module: leave it out")
    wanted -= select(names, exclude, "exclude", "layer")
    if not wanted:
        raise SubspanError(
            "there is no layer to factorise: expected an nn.Linear, an nn.Conv2d without groups or "
            f"an nn.MultiheadAttention, the network has {', '.join(found) or 'none'}"
        )
    return [name for name in found if name in wanted]


def _tied(net: nn.Module) -> set[int]:
    """Parameters that lie in more than one place."""
    seen: dict[int, int] = {}
    for slot in slots(net):
        module, attribute = slot.find(net)
        seen[id(module._parameters[attribute])] = seen.get(id(module._parameters[attribute]), 0) + 1
    return {key for key, times in seen.items() if times > 1}


def put(net: nn.Module, found: Mapping[str, Place], layers: Mapping[str, nn.Module]) -> nn.Module:
    """The network with new layers in these places."""
    new: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        place = found[name]
        if place.attention is None:
            new[id(place.layer)] = layer
        else:
            setattr(place.attention, place.projection, layer)
            new[id(place.original)] = place.attention
    for module in net.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            id(m) in new for m in module.modules()
        ):
            module.use_nested_tensor = False  # a fused path that reads weights around `forward`
    return replaced(net, new)


def replaced(net: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
    """The network with some modules exchanged, wherever they are used."""
    for parent in list(net.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in new:
                parent._modules[name] = new[id(child)]
    return new.get(id(net), net)
