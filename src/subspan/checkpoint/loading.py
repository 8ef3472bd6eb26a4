"""A saved model, rebuilt around a network, and tensors put back into one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from subspan.adapters.factors import rebuild_lora
from subspan.checkpoint.base import find_base, say_base
from subspan.checkpoint.file import COORDINATES, Header, Tensors, Types, agree, layers_of, read
from subspan.checkpoint.part import base_of, check_part
from subspan.checkpoint.saving import count_kinds, rows_kept, stored_tensors
from subspan.counts import count
from subspan.errors import SubspanError
from subspan.layers.protocol import Compressed, compressed_layers, layer_type
from subspan.layers.rebuild import rebuild_layers
from subspan.layers.replace import exchange
from subspan.subspace import init
from subspan.subspace.dtensors import copy_into
from subspan.subspace.growing import grow
from subspan.subspace.model import SubspaceModel
from subspan.subspace.parameters import find_slots, saved_buffers
from subspan.subspace.states import refuse_rounding
from subspan.subspace.targets import find_presets

Net = nn.Module | Callable[[], nn.Module]


@torch.inference_mode(False)  # what is made in it could not be trained
def load(path: str | os.PathLike[str], net: Net) -> nn.Module:
    """Rebuild a saved model around a network, as :func:`subspan.load` does where it gets one."""
    header, tensors = read(path)
    types, seed = layers_of(header, path), header.get("init_seed")
    if isinstance(net, nn.Module):
        network = net
    else:
        network = net() if seed is None else init.build(net, seed)
    if not isinstance(network, nn.Module):
        raise SubspanError(f"expected a function that makes the network, got {network!r} from it")
    find_slots(network)  # refuses parameters without values
    if any(SubspaceModel.of(module) for module in network.modules()):
        raise SubspanError(
            "the network is in a subspace already: load the file around another one, or unwrap() "
            "its SubspaceModel first"
        )
    if header["kind"] == "part":
        check_part(path, network, header)
        restore(network, tensors)
        return network
    weights = count(network).dense
    if header["kind"] == "subspace":  # around the numbers that compressed layers have themselves
        layers = compressed_layers(network).values()
        weights -= sum(layer.dense_numbers - layer.own_numbers for layer in layers)
    if weights != header["weights"]:
        raise SubspanError(
            f"{path} is of a network of {header['weights']:,} weights, this one has {weights:,}"
        )
    if header["kind"] == "subspace":
        return _load_model(path, network, header, tensors, draw=network is net)
    return _load_network(path, network, types, tensors)


def _load_network(path: object, network: nn.Module, types: Types, tensors: Tensors) -> nn.Module:
    """Give a network the compressed layers and all tensors of a file."""
    try:
        _refuse_rounding(network, types, tensors)
        before = [(module, dict(module._modules)) for module in network.modules()]
        made = rebuild_layers(network, types, resize=False)
    except SubspanError as error:
        raise SubspanError(f"{path} does not fit this network: {error}") from None
    try:
        restore(made, tensors)
    except BaseException:
        pairs = ((m._modules[name], part) for m, parts in before for name, part in parts.items())
        both = [(made, network), *pairs]
        exchange(made, {id(new): old for new, old in both if old is not None and new is not old})
        raise
    return made


def _load_model(
    path: object, network: nn.Module, header: Header, tensors: Tensors, draw: bool
) -> SubspaceModel:
    """Put a network into the subspace of a file, at its coordinates.

    With ``draw`` its initial weights are drawn first, if the file has a seed of them.
    """
    before: list[tuple[nn.Parameter, Tensor]] = []
    if draw and (seed := header["init_seed"]) is not None:
        before = [(p, p.detach().clone()) for p in network.parameters()]
        init.initialize(network, seed)
    try:
        model = _wrap(path, network, header, tensors)
        if COORDINATES in tensors and tensors[COORDINATES].dtype == torch.float64:
            for w in model.coordinates.values():  # of a model that was converted for its training
                w.data = w.data.double()
        restore(model, tensors)
    except BaseException:
        if (begun := SubspaceModel.of(network)) is not None:
            begun.unwrap()
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        raise
    return model


def _refuse_rounding(network: nn.Module, types: Types, tensors: Tensors) -> None:
    """Refuse numbers that a network would round, while its layers are still those that it has."""
    dtypes = {name: p.dtype for name, p in network.named_parameters()}
    modules = dict(network.named_modules())
    for layer in (name for of in types.values() for name in of if name in modules):
        own = [p.dtype for p in modules[layer].parameters() if p.is_floating_point()]
        dtypes |= {name: own[0] for name in tensors if own and name.startswith(f"{layer}.")}
    refuse_rounding(tensors, dtypes, "the file")


def rebuild(network: nn.Module, header: Header) -> nn.Module:
    """Give a network the compressed layers that a header describes, with any values.

    A :class:`SubspaceModel` grows to the coordinates that it says.

    Raises:
        SubspanError: if the network is another one; it is then untouched.
    """
    if isinstance(network, SubspaceModel) and header["kind"] == "subspace":
        recipe = header["recipe"]
        dims = recipe["dim"] or [d for _, d in recipe["compartments"]]
        if dims != network.recipe["dim"] and dims != [p.dim for p in network.compartments]:
            grow(network, dims)
        return network
    return rebuild_layers(network, layers_of(header))


@torch.no_grad()
def restore(model: nn.Module, tensors: Tensors) -> None:
    """Put the tensors of a checkpoint, as :func:`read` gives them, into the model that was saved.

    Raises:
        SubspanError: if they are another model's, or the model's dtypes would round their numbers;
            it is then untouched.
    """
    model = SubspaceModel.of(model) or model
    live = stored_tensors(model)
    resized: dict[type[Compressed], dict[str, Any]] = {}
    # Those inside a SubspaceModel are its base, and not in the file.
    layers = {} if isinstance(model, SubspaceModel) else compressed_layers(model)
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        recipe = layer.recipe_in(
            {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        )
        if recipe != layer.recipe:
            resized.setdefault(layer_type(layer.type_name), {})[name] = recipe
            twin = layer.rebuild(layer, recipe, device="meta")
            own = {prefix + key: p for key, p in twin.named_parameters()}
            live |= {key: p for key, p in own.items() if key in live}  # if nothing computes it
    may_lack: set[str] = set()
    if isinstance(model, SubspaceModel):
        live[COORDINATES] = torch.empty(sum(part.dim for part in model.compartments))
        may_lack = {f"body.{name}" for name in saved_buffers(model.body)}
    elif base_of(model):
        may_lack = set(saved_buffers(model))
    for name in sorted((live.keys() | tensors.keys()) - (may_lack - tensors.keys())):
        in_network, in_file = (
            str(list(ts[name].shape)) if name in ts else "no place" for ts in (live, tensors)
        )
        if in_network != in_file:
            raise SubspanError(
                f"the checkpoint is of another network: {name} has shape {in_file} in the file "
                f"and {in_network} in the network"
            )
    dtypes = {name: [tensor.dtype] for name, tensor in live.items()}
    if isinstance(model, SubspaceModel):
        dtypes[COORDINATES] = [w.dtype for w in model.coordinates.values()]
    for name, tensor in tensors.items():
        for dtype in dtypes[name]:
            refuse_rounding({name: tensor}, {name: dtype}, "the file")
    if resized:
        rebuild_layers(model, resized)
        live |= stored_tensors(model)
    for name, tensor in tensors.items():
        copy_into(live[name], tensor)
    if isinstance(model, SubspaceModel):
        parts = tensors[COORDINATES].split([part.dim for part in model.compartments])
        for w, part in zip(model.coordinates.values(), parts, strict=True):
            w.copy_(part)


def _wrap(path: object, net: nn.Module, header: Header, tensors: Tensors) -> SubspaceModel:
    """Return the model of a recipe, if this is its network."""
    try:
        # Files from before padding rows were kept say nothing of them.
        recipe = {"padding": "train"} | header["recipe"]
        made = header.get("lora")
        model = SubspaceModel(net, **recipe) if made is None else rebuild_lora(net, recipe, made)
    except (SubspanError, TypeError, ValueError) as error:
        raise SubspanError(f"{path} does not fit this network: {error}") from None
    _take_buffers(path, model, header, tensors)
    check_base(path, model, header)
    model.init_seed = header["init_seed"]
    model.subspace.reads.add(*header.get("apart", ()))
    return model


def _take_buffers(path: object, model: SubspaceModel, header: Header, tensors: Tensors) -> None:
    """Accept a network whose buffers changed (by training, before unwrap()) if all are here."""
    weights = model.subspace
    same = "parameters" in header and header["parameters"] == weights.parameters_digest()
    if not same or agree(model.base_fingerprint, header["fingerprint"]):
        return
    if left := [name for name in weights.base_buffers if f"body.{name}" not in tensors]:
        raise SubspanError(
            f"{path} was trained from other initial weights: the parameters are the same, but a "
            f"buffer is not ({left[0]} or another): give the network as it was before training"
        )
    weights.take_fingerprint(header["fingerprint"])
    weights.base_buffers = {}  # so that all of them are stored again


def check_base(path: object, model: SubspaceModel, header: Header) -> None:
    """Refuse coordinates around another θ₀ than theirs, or of another part of the network."""
    if (here := count_kinds(model.subspace.packed.values())) != (
        there := header.get("quantised", {})
    ):
        raise SubspanError(
            f"{path} was trained around a network with {_say_kinds(there)}, and this one has "
            f"{_say_kinds(here)}: quantise it in the same way, or not at all, before it is loaded"
        )
    if not agree(model.base_fingerprint, header["fingerprint"]):
        bases = header.get("base"), find_base(model)
        theirs, ours = (f"{say_base(b)} in {b.get('dtype')}" if b else "" for b in bases)
        named = f"; it was trained from {theirs}, and this is {ours}" if theirs and ours else ""
        raise SubspanError(
            f"{path} was trained from other initial weights (fingerprint {header['fingerprint']}, "
            f"this network has {model.base_fingerprint}{named if theirs != ours else ''}): give "
            "the network that it was trained from"
        )
    own = rows_kept(model.subspace.kept)
    for name in sorted(own.keys() | header.get("kept", own).keys()):
        if own.get(name) != header.get("kept", own).get(name):
            raise SubspanError(
                f"{path} was trained with another padding row of {name} (padding_idx of its "
                "embedding), which stays at θ₀: make the network as it was for the training (with "
                "the same pad_token_id, say)"
            )
    if not agree(model.layout, header["layout"]):
        if presets := find_presets(header["recipe"] | header.get("lora", {})):
            raise SubspanError(
                f"{path} was trained through other parameters than those that {presets[0]!r} "
                "chooses in this network, whose modules have other classes (in another version of "
                "the library that made them, say) or whose frozen parameters are others: load it "
                "with that version"
            )
        if "fixed_matrices" in model.subspace.meaning:
            raise SubspanError(
                f"{path} was trained around products of sums of other fixed matrices, or with "
                "other parameters frozen: make the network as it was"
            )
        raise SubspanError(
            f"{path} was trained with other parameters frozen (requires_grad=False) than this "
            "network has: freeze the same ones"
        )


def _say_kinds(numbers: Mapping[str, int]) -> str:
    tensors = ", ".join(f"{number} of {kind}" for kind, number in numbers.items())
    return f"quantised tensors ({tensors})" if tensors else "no quantised tensors"
