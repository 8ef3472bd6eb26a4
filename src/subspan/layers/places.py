"""Where in a network a layer of ours can stand, and how it gets there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from subspan.errors import SubspanError
from subspan.layers.attention import PROJECTIONS, Attention
from subspan.layers.handover import hand_over, obstacle, refuse_hooks, used_elsewhere
from subspan.subspace.compartments import Patterns, matches, select

# The second is what nn.MultiheadAttention has for its output: a Linear in all but name.
LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
ATTENTION = (  # parameters of nn.MultiheadAttention
    "in_proj_weight",
    "q_proj_weight",
    "k_proj_weight",
    "v_proj_weight",
    "in_proj_bias",
)


@dataclass(frozen=True)
class Place:
    """A layer that could be replaced, and the attention that it would be part of.

    Attributes:
        owner: the module that stands in the network now.
        layer: its type and weight; of an attention, one of the four layers that it would become.
        attention: made of those four.
        projection: the layer's name there.
        obstacle: why it cannot be replaced, or None.
    """

    owner: nn.Module
    layer: nn.Linear | nn.Conv2d | None
    attention: Attention | None = None
    projection: str = ""
    obstacle: str | None = None

    @property
    def plain(self) -> nn.Linear | nn.Conv2d:
        """The layer, where there is no obstacle."""
        assert self.layer is not None, self.obstacle
        return self.layer


def places(net: nn.Module) -> dict[str, Place]:
    """Find every layer of the kinds that can be replaced, by its first name."""
    found: dict[str, Place] = {}
    inside: set[int] = set()
    used = used_elsewhere(net)
    for name, module in net.named_modules():
        dot = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            inside |= {id(part) for part in module.modules()}
            why = _obstacle_of_attention(module, used)
            split = None if why else Attention(module)
            for part in PROJECTIONS:
                layer = None if split is None else getattr(split, part)
                found[dot + part] = Place(module, layer, split, part, why)
        elif isinstance(module, nn.Linear | nn.Conv2d) and id(module) not in inside:
            why = _obstacle(module, used)
            found[name] = Place(module, None if why else module, obstacle=why)
    return found


def _obstacle(layer: nn.Module, used: Mapping[int, str]) -> str | None:
    """Say why a linear or convolutional layer cannot be replaced; or None."""
    if type(layer) not in (*LINEAR, nn.Conv2d):
        return f"its class, {named(layer)}, is no ordinary one and may compute anything"
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    why = obstacle(layer, ("weight", "bias")) or used.get(id(layer))
    if why is not None:
        return why
    if layer._parameters.get("weight") is None:
        return "it has no weight"
    if isinstance(layer, nn.Linear):
        expected: tuple[int, ...] = (layer.out_features, layer.in_features)
    elif layer.groups > 1:
        return f"it is a convolution with groups={layer.groups}"
    else:
        expected = (layer.out_channels, layer.in_channels, *layer.kernel_size)
    if layer.weight.shape != expected:
        return f"its weight has shape {tuple(layer.weight.shape)}, expected {expected}"
    if not layer.weight.numel():
        return "its weight is empty"
    return None


def named(module: nn.Module) -> str:
    """Return the full name of a module's class: a derived one may share its parent's last name."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _obstacle_of_attention(module: nn.MultiheadAttention, used: Mapping[int, str]) -> str | None:
    """Say why an attention cannot be split into four layers; or None."""
    if type(module) is not nn.MultiheadAttention:
        return f"the class of its attention, {named(module)}, may compute anything"
    if module.bias_k is not None or module.add_zero_attn:
        return "it is part of an attention with add_bias_kv or add_zero_attn"
    return (
        obstacle(module, ATTENTION, modules=("out_proj",))
        or used.get(id(module))
        or _obstacle(module.out_proj, used)
    )


def chosen(
    net: nn.Module, found: Mapping[str, Place], targets: Patterns, exclude: Patterns
) -> list[str]:
    """Select layers by patterns; by default all that nothing stands against.

    Raises:
        SubspanError: for a pattern that selects nothing, or a layer that cannot be replaced; for a
            hook that no other layer could have; and if no layer is left.
    """
    paths: dict[int, list[str]] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    names = {
        name: [name] if place.projection else paths[id(place.owner)]
        for name, place in found.items()
    }
    if targets is None:
        wanted = {name for name, place in found.items() if place.obstacle is None}
    else:
        _refuse_other_kinds(net, names, targets)
        wanted = select(names, targets, "targets", "layer")
    wanted -= select(names, exclude, "exclude", "layer")
    if not wanted:
        why = next((f"; {n}: {p.obstacle}" for n, p in found.items() if p.obstacle), "")
        raise SubspanError(
            "there is no layer to factorise: expected an nn.Linear, an nn.Conv2d without groups or "
            f"an nn.MultiheadAttention, the network has {', '.join(found) or 'none'}{why}"
        )
    ordered = [name for name in found if name in wanted]
    check(found, ordered)
    return ordered


def _refuse_other_kinds(
    net: nn.Module, names: Mapping[str, Sequence[str]], targets: Patterns
) -> None:
    """Say what a pattern names, if that is no layer of the kinds that can be replaced."""
    every = [name for aliases in names.values() for name in aliases]
    for pattern in [targets] if isinstance(targets, str) else targets or ():
        if any(matches(pattern, name) for name in every):
            continue
        for name, module in net.named_modules():
            if name and matches(pattern, name):
                raise SubspanError(
                    f"layer {name!r} in targets is a {type(module).__name__}: expected an "
                    "nn.Linear, an nn.Conv2d or an nn.MultiheadAttention; leave it out"
                )


def check(found: Mapping[str, Place], names: Sequence[str]) -> None:
    """Refuse layers that cannot be replaced, or have what a new one could not have.

    Raises:
        SubspanError: naming the layer, and the reason.
    """
    for name in names:
        place = found[name]
        if place.obstacle is not None:
            raise SubspanError(
                f"layer {name!r} cannot be replaced, since {place.obstacle}: leave it out"
            )
        if isinstance(place.owner, nn.MultiheadAttention):
            whole = name.removesuffix(place.projection)
            refuse_hooks(whole.removesuffix("."), place.owner)
            refuse_hooks(whole + "out_proj", place.owner.out_proj, called=False)
        else:
            refuse_hooks(name, place.owner)


MADE: dict[type[nn.Module], Callable[[], nn.Module]] = {
    **{kind: functools.partial(kind, 1, 1) for kind in LINEAR},
    nn.Conv2d: lambda: nn.Conv2d(1, 1, 1),
    nn.MultiheadAttention: lambda: nn.MultiheadAttention(1, 1),
}


def fresh(kind: type[nn.Module]) -> nn.Module:
    """Make a layer of a class, as it is before anybody touches it."""
    with torch.random.fork_rng(devices=[]):
        return MADE[kind]()


def put(net: nn.Module, found: Mapping[str, Place], layers: Mapping[str, nn.Module]) -> nn.Module:
    """Exchange layers, which take over the hooks, attributes and flags of the old ones.

    Returns:
        The network, or the new layer if the network itself was one.

    Raises:
        SubspanError: as :func:`~subspan.layers.handover.hand_over`; the network is then untouched.
    """
    new: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        place = found[name]
        hand_over(name, place.plain, layer, fresh(type(place.plain)))
        if place.attention is None:
            new[id(place.owner)] = layer
            continue
        setattr(place.attention, place.projection, layer)
        if id(place.owner) not in new:
            whole, like = name.rpartition(".")[0], fresh(nn.MultiheadAttention)
            hand_over(whole, place.owner, place.attention, like, parts=True)
            new[id(place.owner)] = place.attention
    for module in net.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            id(m) in new for m in module.modules()
        ):
            module.use_nested_tensor = False  # a fused path that reads weights around `forward`
    return replaced(net, new)


def replaced(net: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
    """Exchange modules wherever they are used, and nothing else; the keys are their ``id``."""
    for parent in list(net.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in new:
                parent._modules[name] = new[id(child)]
    return new.get(id(net), net)
