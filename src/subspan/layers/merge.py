"""Ordinary layers in place of a network's compressed ones."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from subspan.errors import SubspanError
from subspan.layers.attention import PROJECTIONS, Attention
from subspan.layers.handover import hand_over, obstacle, refuse_hooks, used_elsewhere
from subspan.layers.protocol import compressed_layers
from subspan.layers.replace import example, exchange, full_name


def merge(net: nn.Module, *, factors: bool = False) -> nn.Module:
    """Put ordinary layers in place of a network's compressed ones, whatever their types.

    Nothing of subspan is left in the network; but of an ``nn.MultiheadAttention`` whose projections
    are to be two layers each, :class:`~subspan.layers.attention.Attention` stays. A program of
    ``torch.export`` is free of that, too.

    Args:
        net: changed in place.
        factors: whether a layer of low rank becomes two plain ones, of Vᵀ and of U S, which keeps
            r (n + m) numbers and products; otherwise one with the dense weight, as all others do.

    Returns:
        ``net``; or the ordinary layer, if ``net`` itself is a compressed one.

    Raises:
        SubspanError: if there is no compressed layer, or one that has what an ordinary layer could
            not have, as for :func:`replace_layers`. The network is then untouched.
    """
    used = used_elsewhere(net)
    new: dict[int, nn.Module] = {}
    for name, layer in compressed_layers(net).items():
        fresh = layer.rebuild(layer, layer.recipe, device="meta")
        if type(layer) is not type(fresh):
            raise SubspanError(
                f"layer {name!r} cannot be merged, since its class, {full_name(layer)}, is not "
                f"{full_name(fresh)} and may compute anything: merge the SubspaceModel first, if "
                "it is one"
            )
        registries = fresh._parameters, fresh._buffers, fresh._modules
        kinds = {type(p) for p in fresh.parameters()}
        if why := obstacle(layer, *registries, kinds=kinds) or used.get(id(layer)):
            raise SubspanError(f"layer {name!r} cannot be merged, since {why}")
        refuse_hooks(name, layer)
        plain = layer.two_factors() if factors else layer.dense()
        new[id(layer)] = hand_over(name, layer, plain, fresh)
    if not new:
        raise SubspanError("the network has no factored layer to merge")
    for name, module in net.named_modules():
        if type(module) is Attention:
            layers = [getattr(module, part) for part in PROJECTIONS]
            plain_layers = [new.get(id(layer), layer) for layer in layers]
            if all(type(layer) is nn.Linear for layer in plain_layers):
                new[id(module)] = _whole(name, module, plain_layers, used)
    return exchange(net, new)


def _whole(
    name: str, module: Attention, layers: list[nn.Linear], used: Mapping[int, str]
) -> nn.MultiheadAttention:
    """Make the ordinary attention with these four projections, or refuse what it cannot have."""
    why = obstacle(module, (), modules=PROJECTIONS) or used.get(id(module))
    for part, layer in zip(PROJECTIONS, layers, strict=True):
        why = why or obstacle(layer, ("weight", "bias")) or used.get(id(layer))
        if part != "out_proj" and (extra := vars(layer).keys() - vars(example(nn.Linear)).keys()):
            why = why or f"nn.MultiheadAttention has no {part} for its attribute {min(extra)!r}"
    if why := why or module.obstacle(layers):
        raise SubspanError(f"layer {name!r} cannot be merged, since {why}")
    refuse_hooks(name, module)
    for part, layer in zip(PROJECTIONS, layers, strict=True):
        refuse_hooks(f"{name}.{part}", layer, called=False)
    whole = module.original(layers)
    hand_over(f"{name}.out_proj", layers[-1], whole.out_proj, example(nn.Linear))
    hand_over(name, module, whole, example(Attention), parts=True)
    return whole
