"""Taking a network over, and giving it back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from subspan.errors import SubspanError
from subspan.subspace import quantised_layers
from subspan.subspace.adapted import remove_factors
from subspan.subspace.changes import outgrow, watch_optimizers
from subspan.subspace.classes import make_class
from subspan.subspace.functions import ordinary_tensors
from subspan.subspace.links import FINGERPRINT, LINK, Link, digits_of
from subspan.subspace.quantised import QuantisedTensor
from subspan.subspace.sharded import refuse_whole
from subspan.subspace.theta0 import Base, freeze, thaw
from subspan.subspace.variant import BESIDE, refuse_in_use
from subspan.subspace.weights import Weights


def attach(weights: Weights) -> None:
    """Give the network's modules their classes, and the network its coordinates.

    Raises:
        SubspanError: if a module cannot have another class. After this and any other exception (of
            a hook, say) the network is as it was.
    """
    try:
        _attach(weights)
    except BaseException:
        detach(weights)
        raise


def _attach(weights: Weights) -> None:
    root, inside = weights.root, dict[nn.Module, dict[str, str]]()
    for slot in weights.slots:
        module, attribute = slot.find(root)
        inside.setdefault(module, {})[attribute] = slot.tensor
    above = [
        module for module in root.modules() if any(part in inside for part in module.modules())
    ]
    weights.wrapped = []
    for module in above:
        try:
            link_module(module, weights, inside.get(module, {}))
        except Exception as error:  # a class may refuse to be derived from in its own words
            name = next(n for n, m in root.named_modules() if m is module)
            raise SubspanError(
                f"module {name or 'the network'} is a {type(module).__name__}, whose weights "
                f"cannot be computed in place ({error}): exclude it"
            ) from None
    for name in weights.requires_grad:
        weights.stored(name).requires_grad_(name in weights.fully)
    for tensor, (module, attribute) in weights.homes.items():
        freeze(module._parameters[attribute], weights, tensor)
    like = weights.base_of(weights.compartments[0].pieces[0].tensor)
    with torch.inference_mode(False), torch.no_grad():
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        for name, part in zip(weights.coordinate_names, weights.compartments, strict=True):
            w = torch.zeros(part.dim, device=like.device, dtype=dtype)
            nn.Module.register_parameter(root, name, nn.Parameter(w))
        # Small integers as floats: the mean of equal ones is the same again.
        digits = digits_of(weights.fingerprint)
        number = torch.tensor(digits, dtype=torch.float32, device=like.device)
        nn.Module.register_buffer(root, FINGERPRINT, number)
    if root._buffers[FINGERPRINT].device != like.device:  # type: ignore[union-attr]
        raise SubspanError(
            "parameters that are made here go to another device (by init_empty_weights of "
            "accelerate, say): wrap the network outside of that context"
        )
    for name in weights.requires_grad.keys() - {*weights.fully}:
        weights.stored(name).grad = None  # of a loss from before: an optimizer would still use it
    weights.packing = quantised_layers.keep_packing(root)
    weights.note()
    weights.changes.remember(name for name in weights.requires_grad if name not in weights.fully)
    watch_optimizers()


def link_module(module: nn.Module, weights: Weights, tensors: dict[str, str]) -> None:
    """Give a module its class and its link; ``tensors`` are those of its attributes."""
    module.__class__ = make_class(type(module), tuple(tensors), module is weights.root)
    weights.wrapped.append(module)
    module.__dict__[LINK] = Link(weights, tensors, list(module._parameters))
    if isinstance(module, nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)
        module.__dict__["_flat_weight_refs"] = [None] * len(module._flat_weights_names)


def detach(weights: Weights, values: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Undo :meth:`attach`: ordinary parameters again, at θ₀ or at other values."""
    root = weights.network()
    refuse_whole(weights, "unwrapped or merged")
    refuse_in_use(weights, "unwrapped")
    for name in weights.coordinate_names:
        w = root._parameters.pop(name, None)
        if values is None and w is not None:  # who merges has made a copy, which nobody trains
            outgrow(w, "that unwrap() has taken out of the network")
    root._buffers.pop(FINGERPRINT, None)
    for module in weights.wrapped:
        if hasattr(type(module), "_subspan_class"):
            module.__dict__.pop(LINK, None)
            module.__dict__.pop(BESIDE, None)
            module.__class__ = module._subspan_class[0]  # type: ignore[assignment,index]
    for tensor, (module, attribute) in weights.homes.items():
        parameter = module._parameters.get(attribute)
        if isinstance(parameter, Base) and parameter.home[0] is weights:
            if values is not None and tensor in weights.packed:
                _make_dense(weights, tensor, values[tensor])
                continue
            with ordinary_tensors():
                if values is not None and tensor in values:
                    parameter.data = values[tensor].detach()
                thaw(parameter)
    for module in weights.wrapped:
        if isinstance(module, nn.RNNBase) and "_flat_weights" not in module.__dict__:
            module._init_flat_weights()
    for tensor in (values or {}).keys() & weights.adapters.keys() - weights.homes.keys():
        _make_dense(weights, tensor, values[tensor])  # type: ignore[index]
    for name, flag in weights.requires_grad.items():
        if (p := weights.find(name)) is not None:  # people may have taken it out meanwhile
            with torch.inference_mode(p.is_inference()):
                p.requires_grad_(flag)
    remove_factors(root)
    quantised_layers.let_pack(weights.packing)
    if values is not None and weights.packed:
        quantised_layers.unmark(root)
    weights.root = None  # type: ignore[assignment]
    return root


def _make_dense(weights: Weights, tensor: str, value: Tensor) -> None:
    """Put θ into the slots of a quantised tensor, whose layers become ordinary ones."""
    module, attribute = weights.locations[tensor]
    packed = weights.held(tensor)
    assert isinstance(packed, QuantisedTensor)
    dtype = quantised_layers.resting_dtype(module, packed, weights.root)
    parameter = nn.Parameter(value.detach().to(dtype), False)
    places = [slot.find(weights.root) for slot in weights.slots if slot.tensor == tensor]
    for holder, name in places or [(module, attribute)]:
        holder._parameters[name] = parameter
        quantised_layers.make_plain(holder)
