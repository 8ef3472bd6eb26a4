"""Layers of a network that can be replaced, and how others get into their places."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from subspan.errors import SubspanError
from subspan.layers.attention import PROJECTIONS, Attention
from subspan.layers.handover import hand_over, obstacle, refuse_hooks, used_elsewhere
from subspan.subspace.changes import note_replaced
from subspan.subspace.compartments import EXPLICIT, Patterns, listed, matches, select
from subspan.subspace.targets import PRESETS, Presets

# The second is what nn.MultiheadAttention has for its output: a Linear in all but name.
LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
# Parameters of nn.MultiheadAttention.
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")


@dataclass(frozen=True)
class ReplaceableLayer:
    """A layer that could be replaced, and the attention that it would be part of."""

    owner: nn.Module  # the module that stands in the network now
    # Its type and weight; of an attention, one of the four layers that it would become.
    layer: nn.Linear | nn.Conv2d | None
    attention: Attention | None = None  # made of those four
    projection: str = ""  # the layer's name there
    obstacle: str | None = None  # why it cannot be replaced, or None

    @property
    def plain(self) -> nn.Linear | nn.Conv2d:
        """The layer, where there is no obstacle."""
        assert self.layer is not None, self.obstacle
        return self.layer


def find_replaceable(net: nn.Module) -> dict[str, ReplaceableLayer]:
    """Find every layer of the kinds that can be replaced, by its first name."""
    candidates: dict[str, ReplaceableLayer] = {}
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
                candidates[dot + part] = ReplaceableLayer(module, layer, split, part, why)
        elif isinstance(module, nn.Linear | nn.Conv2d) and id(module) not in inside:
            why = _obstacle(module, used)
            candidates[name] = ReplaceableLayer(module, None if why else module, obstacle=why)
    return candidates


def _obstacle(layer: nn.Module, used: Mapping[int, str]) -> str | None:
    """Say why a linear or convolutional layer cannot be replaced; or None."""
    if type(layer) not in (*LINEAR, nn.Conv2d):
        return f"its class, {full_name(layer)}, is no ordinary one and may compute anything"
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


def full_name(module: nn.Module) -> str:
    """Return the full name of a module's class: a derived one may share its parent's last name."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _obstacle_of_attention(module: nn.MultiheadAttention, used: Mapping[int, str]) -> str | None:
    """Say why an attention cannot be split into four layers; or None."""
    if type(module) is not nn.MultiheadAttention:
        return f"the class of its attention, {full_name(module)}, may compute anything"
    if module.bias_k is not None or module.add_zero_attn:
        return "it is part of an attention with add_bias_kv or add_zero_attn"
    return (
        obstacle(module, ATTENTION, modules=("out_proj",))
        or used.get(id(module))
        or _obstacle(module.out_proj, used)
    )


def select_layers(
    net: nn.Module, candidates: Mapping[str, ReplaceableLayer], targets: Patterns, exclude: Patterns
) -> list[str]:
    """Select layers by patterns; by default all that nothing stands against.

    Raises:
        SubspanError: for a pattern that selects nothing, or a layer that cannot be replaced; for a
            hook that no other layer could have; and if no layer is left.
    """
    targets, exclude = listed(targets), listed(exclude)
    paths: dict[int, list[str]] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    names = {
        name: [name] if candidate.projection else paths[id(candidate.owner)]
        for name, candidate in candidates.items()
    }
    presets = _find_presets(net, candidates)
    if targets is None:
        wanted = {name for name, candidate in candidates.items() if candidate.obstacle is None}
    else:
        _refuse_other_kinds(net, names, targets)
        wanted = select(names, targets, "targets", "layer", presets)
    wanted -= select(names, exclude, "exclude", "layer", presets)
    if not wanted:
        why = next((f"; {n}: {p.obstacle}" for n, p in candidates.items() if p.obstacle), "")
        raise SubspanError(
            "there is no layer to factorise: expected an nn.Linear, an nn.Conv2d without groups or "
            f"an nn.MultiheadAttention, the network has {', '.join(candidates) or 'none'}{why}"
        )
    ordered = [name for name in candidates if name in wanted]
    check_replaceable(candidates, ordered)
    return ordered


def _find_presets(net: nn.Module, candidates: Mapping[str, ReplaceableLayer]) -> Presets:
    """Return the presets of a network, which choose layers by their weights."""
    weights, shapes = {}, {}
    for name, candidate in candidates.items():
        weight = "in_proj_weight" if candidate.projection else ".weight" if name else "weight"
        weights[name] = [name.removesuffix(candidate.projection) + weight]
        layer = candidate.layer
        shapes[name] = torch.Size((0, 0)) if layer is None else layer.weight.shape
    return Presets(net, weights, shapes)


def _refuse_other_kinds(
    net: nn.Module, names: Mapping[str, Sequence[str]], targets: Patterns
) -> None:
    """Say what a pattern names, if that is no layer of the kinds that can be replaced."""
    every = [name for aliases in names.values() for name in aliases]
    for pattern in [targets] if isinstance(targets, str) else targets or ():
        if pattern.removeprefix(EXPLICIT) in PRESETS or any(matches(pattern, n) for n in every):
            continue
        for name, module in net.named_modules():
            if name and matches(pattern, name):
                raise SubspanError(
                    f"layer {name!r} in targets is a {type(module).__name__}: expected an "
                    "nn.Linear, an nn.Conv2d or an nn.MultiheadAttention; leave it out"
                )


def check_replaceable(candidates: Mapping[str, ReplaceableLayer], names: Sequence[str]) -> None:
    """Refuse layers that cannot be replaced, or have what a new one could not have."""
    for name in names:
        candidate = candidates[name]
        if candidate.obstacle is not None:
            raise SubspanError(
                f"layer {name!r} cannot be replaced, since {candidate.obstacle}: leave it out"
            )
        if isinstance(candidate.owner, nn.MultiheadAttention):
            whole = name.removesuffix(candidate.projection)
            refuse_hooks(whole.removesuffix("."), candidate.owner)
            refuse_hooks(whole + "out_proj", candidate.owner.out_proj, called=False)
        else:
            refuse_hooks(name, candidate.owner)


EXAMPLES: dict[type[nn.Module], Callable[[], nn.Module]] = {
    nn.Conv2d: lambda: nn.Conv2d(1, 1, 1),
    nn.MultiheadAttention: lambda: nn.MultiheadAttention(1, 1),
    Attention: lambda: Attention(nn.MultiheadAttention(1, 1)),
}


def example(kind: type[nn.Module]) -> nn.Module:
    """Make a layer of an ordinary class, as it is before anybody touches it."""
    with torch.random.fork_rng(devices=[]):
        return EXAMPLES[kind]() if kind in EXAMPLES else kind(1, 1)


def replace_layers(
    net: nn.Module,
    make: Callable[[str, nn.Linear | nn.Conv2d], nn.Module],
    *,
    targets: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Put other layers in place of a network's linear and convolutional ones.

    The projections of an ``nn.MultiheadAttention`` become four layers (``q_proj``, …,
    ``out_proj``). A new layer has the hooks, the attributes, ``training`` and ``requires_grad`` of
    the old one.

    Args:
        net: changed in place.
        make: makes the new layer from the name and the layer that it replaces, which it must not
            change.
        targets: which layers, by patterns or presets as of :class:`~subspan.SubspaceModel`. By
            default every ``nn.Linear`` and ``nn.Conv2d`` without groups, of exactly these classes,
            that shares its parameters with no other module and whose weight nothing else computes
            (``weight_norm``, ``spectral_norm``, ``prune``, a parametrization). Others are left as
            they are by default, and refused where a pattern names them.
        exclude: layers to leave as they are.

    Returns:
        ``net``; or the new layer, if ``net`` itself is one that was replaced.

    Raises:
        SubspanError: for a layer that cannot be replaced, or has a hook on a weight or a
            ``state_dict``, which would be lost; and if there is nothing to replace. The network is
            then untouched.
    """
    candidates = find_replaceable(net)
    names = select_layers(net, candidates, targets, exclude)
    return put_layers(net, candidates, {name: make(name, candidates[name].plain) for name in names})


def put_layers(
    net: nn.Module, candidates: Mapping[str, ReplaceableLayer], layers: Mapping[str, nn.Module]
) -> nn.Module:
    """Exchange layers, which take over the hooks, attributes and flags of the old ones.

    The network is returned, or the new layer if it was one itself; if an attribute cannot be taken
    over it is untouched.
    """
    new: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        candidate = candidates[name]
        hand_over(name, candidate.plain, layer, example(type(candidate.plain)))
        if candidate.attention is None:
            new[id(candidate.owner)] = layer
            continue
        setattr(candidate.attention, candidate.projection, layer)
        if id(candidate.owner) not in new:
            whole, like = name.rpartition(".")[0], example(nn.MultiheadAttention)
            hand_over(whole, candidate.owner, candidate.attention, like, parts=True)
            new[id(candidate.owner)] = candidate.attention
    for module in net.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            id(m) in new for m in module.modules()
        ):
            module.use_nested_tensor = False  # a fused path that reads weights around `forward`
    return exchange(net, new)


def exchange(net: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
    """Exchange modules wherever they are used, and nothing else; the keys are their ``id``."""
    for module in list(net.modules()):
        if id(module) in new:
            note_replaced(module, new[id(module)])
    for parent in list(net.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in new:
                parent._modules[name] = new[id(child)]
    return new.get(id(net), net)
