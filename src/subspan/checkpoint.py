"""A trained model as one safetensors file: its coordinates and the recipe around them.

The file holds the coordinates of all compartments as one tensor, what was trained fully, the
buffers that training changed, and one metadata key, ``subspan``, with sorted JSON: format, recipe,
counts, fingerprint of θ₀ and a digest of all (``docs/format.md``). Of an ordinary network it holds
all weights. Nothing in it is executable.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from subspan.counts import count
from subspan.errors import SubspanError
from subspan.files import refuse_what_is_no_file, write_atomically
from subspan.layers.factorize import factorize_like
from subspan.layers.lowrank import LowRank
from subspan.layers.product_of_sums import ProductOfSums, product_of_sums_like
from subspan.subspace import init
from subspan.subspace.dtensors import copy_into, whole
from subspan.subspace.model import SubspaceModel
from subspan.subspace.parameters import (
    digest_tensors,
    find_aliases,
    find_quantised,
    find_slots,
    saved_buffers,
)

FORMAT = 1
KEY = "subspan"
COORDINATES = "coordinates"
FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {  # of the header, by kind
    "full": {"extra": dict, "weights": int},
    "lowrank": {"extra": dict, "weights": int, "ranks": dict},
    "product-of-sums": {"extra": dict, "weights": int, "ranks": dict, "sums": dict},
    "subspace": {
        "extra": dict,
        "weights": int,
        "recipe": dict,
        "init_seed": (int, NoneType),
        "fingerprint": str,
        "layout": str,
    },
}

Net = nn.Module | Callable[[], nn.Module]


def save(
    model: nn.Module, path: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None
) -> int:
    """Write a model to one safetensors file, all of it or nothing.

    Args:
        model: a :class:`SubspaceModel`; or an ordinary network, stored with all its weights.
        path: of the file; its folder must exist.
        extra: JSON values of the caller's, given back by :func:`inspect`.

    Returns:
        The size of the file in bytes.

    Raises:
        SubspanError: if there is no such folder, ``extra`` is not JSON, a SubspaceModel lies
            inside another module, or a module has state beside parameters and buffers.
        OSError: if the file cannot be written; one that was there before is then still whole.
    """
    path = Path(path)
    refuse_what_is_no_file(path)
    header, data = contents(model, extra)
    text = _json(header | {"digest": _digest(header, data)})
    return write_atomically(path, safetensors.torch.save(data, metadata={KEY: text}))


def contents(
    model: nn.Module, extra: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and copies of the tensors that a file of this model has.

    Raises:
        SubspanError: as :func:`save`.
    """
    header: dict[str, Any] = {"format": FORMAT, "extra": dict(extra or {})}
    model = SubspaceModel.of(model) or model
    _check_only_tensors(model)
    if isinstance(model, SubspaceModel):
        model.subspace.changes.check_complete()
        own = {**model.fully_trained(), **model.changed_buffers()}
        tensors = {f"body.{name}": tensor for name, tensor in own.items()}
        tensors[COORDINATES] = torch.cat([w.detach() for w in model.coordinates.values()])
        header |= {
            "kind": "subspace",
            "recipe": model.recipe,
            "init_seed": model.init_seed,
            "fingerprint": model.base_fingerprint,
            "layout": model.layout,
            "weights": model.summary().weights,
        }
        if packed := model.subspace.packed:
            header["quantised"] = _counted(packed.values())
        if saved_buffers(model.body):
            header["parameters"] = model.subspace.parameters_digest()
    else:
        tensors = _stored(model)
        ranks = {name: layer.rank for name, layer in _factored(model).items()}
        header |= {"kind": "full", "weights": count(model).dense}
        sums = {n: m.recipe for n, m in model.named_modules() if isinstance(m, ProductOfSums)}
        if ranks:
            header |= {"kind": "lowrank", "ranks": ranks}
        if sums:
            header |= {"kind": "product-of-sums", "ranks": ranks, "sums": sums}
    try:
        header = json.loads(json.dumps(header))  # as a reader will see it: all keys are strings
    except TypeError as error:
        raise SubspanError(f"extra must hold JSON values: {error}") from None
    # Copies: safetensors refuses tensors that overlap in memory.
    layout = torch.contiguous_format
    return header, {
        n: whole(t.detach()).to("cpu", copy=True, memory_format=layout) for n, t in tensors.items()
    }


def _check_only_tensors(model: nn.Module) -> None:
    """Refuse state that is no parameter and no buffer, which no file here could hold.

    Raises:
        SubspanError: naming a module that has some.
    """
    for name, module in model.named_modules():
        own = type(module).get_extra_state is not nn.Module.get_extra_state
        if own and module.get_extra_state() is not None:
            raise SubspanError(
                f"{name or 'the network'} ({type(module).__name__}) has state of its own "
                "(get_extra_state), which a file of tensors would lose: keep it in buffers, or "
                "save state_dict() by torch.save"
            )


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a checkpoint, checked to be whole and unchanged.

    Raises:
        SubspanError: if it is no checkpoint, of a newer format, cut short or edited.
    """
    path = Path(path)
    if not path.is_file():
        raise SubspanError(f"{path} is not a file: expected a checkpoint that subspan saved")
    if not os.access(path, os.R_OK):
        raise SubspanError(f"{path} may not be read: see to its permissions")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise SubspanError(f"{path} is damaged or no safetensors file: {error}") from None
    if KEY not in metadata:
        raise SubspanError(
            f"{path} is no subspan checkpoint: it has no {KEY!r} key in its metadata"
        )
    try:
        header = json.loads(metadata[KEY])
        version = header["format"]
    except (ValueError, KeyError, TypeError):
        raise SubspanError(f"{path} is damaged: its header is not readable") from None
    if not isinstance(version, int) or version > FORMAT:
        raise SubspanError(
            f"{path} has format {version}, this version of subspan reads up to {FORMAT}: upgrade"
        )
    if header.pop("digest", None) != _digest(header, tensors):
        raise SubspanError(f"{path} was damaged or edited after it was saved: its digest differs")
    fields = FIELDS.get(str(header.get("kind")), {"kind": ()})
    if not all(name in header and isinstance(header[name], t) for name, t in fields.items()):
        raise SubspanError(f"{path} is not what subspan saves: fields of its header are wrong")
    return header, tensors


@torch.inference_mode(False)  # what is made in it could not be trained
def load(path: str | os.PathLike[str], net: Net) -> nn.Module:
    """Rebuild a saved model around a network.

    Args:
        path: of a file of :func:`save`.
        net: the network with the initial weights that the model was trained from, or a function
            that makes it. For a model of :meth:`SubspaceModel.from_seed` only its architecture
            counts: its initial weights are drawn anew.

    Returns:
        The :class:`SubspaceModel` (or the ordinary network) as it was saved. ``net`` is taken over.

    Raises:
        SubspanError: if the file is not usable, or the network is another one; a network that was
            given is then untouched.
    """
    header, tensors = read(path)
    seed = header.get("init_seed")
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
    weights = count(network).dense
    if weights != header["weights"]:
        raise SubspanError(
            f"{path} is of a network of {header['weights']:,} weights, this one has {weights:,}"
        )
    if header["kind"] != "subspace":
        network = arranged(network, header)
        restore(network, tensors)
        return network
    if network is net and seed is not None:
        before = [(p, p.detach().clone()) for p in network.parameters()]
        init.initialize(network, seed)
    else:
        before = []
    try:
        model = _wrapped(path, network, header, tensors)
        restore(model, tensors)
    except BaseException:
        if (begun := SubspaceModel.of(network)) is not None:
            begun.unwrap()
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        raise
    return model


def arranged(network: nn.Module, header: Mapping[str, Any]) -> nn.Module:
    """A network with the layers that a header tells of, with any values.

    Raises:
        SubspanError: if the network is another one; it is then untouched.
    """
    if ranks := header.get("ranks"):
        network = factorize_like(network, ranks)
    if sums := header.get("sums"):
        network = product_of_sums_like(network, sums)
    return network


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint says of itself: its header, and the names and shapes of its tensors."""
    header, tensors = read(path)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return header | {"tensors": shapes, "bytes": Path(path).stat().st_size}


@torch.no_grad()
def restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors of a checkpoint, as :func:`read` gives them, into the model that was saved.

    Raises:
        SubspanError: if they are another model's; this one is then untouched.
    """
    model = SubspaceModel.of(model) or model
    own = _stored(model)
    ranks = {}
    for name, layer in _factored(model).items():  # which may be of another rank by now
        (n, m), core = layer.shape, tensors.get(_join(name, "S"), layer.S)
        r = ranks[name] = core.shape[0]
        for factor, shape in (("U", (n, r)), ("S", (r, r)), ("V", (m, r))):
            own[_join(name, factor)] = torch.empty(shape, device="meta")
    may_lack: set[str] = set()
    if isinstance(model, SubspaceModel):
        own[COORDINATES] = torch.empty(sum(part.dim for part in model.compartments))
        may_lack = {f"body.{name}" for name in saved_buffers(model.body)}
    for name in sorted((own.keys() | tensors.keys()) - (may_lack - tensors.keys())):
        here, there = (
            str(list(ts[name].shape)) if name in ts else "no place" for ts in (own, tensors)
        )
        if here != there:
            raise SubspanError(
                f"the checkpoint is of another network: {name} has shape {there} in the file and "
                f"{here} in the network"
            )
    if ranks:
        factorize_like(model, ranks)
        own |= _stored(model)
    for name, tensor in tensors.items():
        copy_into(own[name], tensor)
    if isinstance(model, SubspaceModel):
        parts = tensors[COORDINATES].split([part.dim for part in model.compartments])
        for w, part in zip(model.coordinates.values(), parts, strict=True):
            w.copy_(part)


def _wrapped(
    path: str | os.PathLike[str],
    net: nn.Module,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> SubspaceModel:
    """The model of a recipe, if this is its network."""
    try:
        # Files from before padding rows were kept say nothing of them.
        model = SubspaceModel(net, **{"padding": "train"} | header["recipe"])
    except (SubspanError, TypeError, ValueError) as error:
        raise SubspanError(f"{path} does not fit this network: {error}") from None
    _take_buffers(path, model, header, tensors)
    check_base(path, model, header)
    model.init_seed = header["init_seed"]
    return model


def _take_buffers(
    path: str | os.PathLike[str],
    model: SubspaceModel,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Accept a network whose buffers have changed (by training, before unwrap()) if all are here.

    Raises:
        SubspanError: if the file leaves some buffers to the network, and they may be others.
    """
    weights = model.subspace
    same = "parameters" in header and header["parameters"] == weights.parameters_digest()
    if not same or model.base_fingerprint == header["fingerprint"]:
        return
    if left := [name for name in weights.base_buffers if f"body.{name}" not in tensors]:
        raise SubspanError(
            f"{path} was trained from other initial weights: the parameters are the same, but a "
            f"buffer is not ({left[0]} or another): give the network as it was before training"
        )
    weights.take_fingerprint(header["fingerprint"])


def check_base(
    path: str | os.PathLike[str], model: SubspaceModel, header: Mapping[str, Any]
) -> None:
    """Refuse coordinates around another base than theirs.

    Raises:
        SubspanError: if the header's θ₀ is not this model's, or another part of it is trained.
    """
    if (here := _counted(model.subspace.packed.values())) != (there := header.get("quantised", {})):
        raise SubspanError(
            f"{path} was trained around a network with {_kinds(there)}, and this one has "
            f"{_kinds(here)}: quantise it in the same way, or not at all, before it is loaded"
        )
    if model.base_fingerprint != header["fingerprint"]:
        raise SubspanError(
            f"{path} was trained from other initial weights (fingerprint {header['fingerprint']}, "
            f"this network has {model.base_fingerprint}): give the network that it was trained from"
        )
    if model.layout != header["layout"]:
        raise SubspanError(
            f"{path} was trained with other parameters frozen (requires_grad=False) than this "
            "network has: freeze the same ones"
        )


def _counted(kinds: Iterable[str]) -> dict[str, int]:
    """How many quantised tensors of each kind there are."""
    return dict(sorted(Counter(kinds).items()))


def _kinds(counted: Mapping[str, int]) -> str:
    """The same in words."""
    tensors = ", ".join(f"{number} of {kind}" for kind, number in counted.items())
    return f"quantised tensors ({tensors})" if tensors else "no quantised tensors"


def _factored(model: nn.Module) -> dict[str, LowRank]:
    """Factored layers by name; those inside a SubspaceModel are its base and not stored."""
    if isinstance(model, SubspaceModel):
        return {}
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRank)}


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """Live tensors by the names that they have in a file, without coordinates."""
    if isinstance(model, SubspaceModel):
        tensors = {**model.fully_trained(), **saved_buffers(model.body)}
        return {f"body.{name}": tensor for name, tensor in tensors.items()}
    if any(SubspaceModel.of(module) for module in model.modules()):
        raise SubspanError(
            f"a SubspaceModel lies inside this {type(model).__name__}: save that one (`.module` of "
            "DDP, `._orig_mod` of torch.compile), or put its merge() there"
        )
    places = find_slots(model)
    for name, found in find_quantised(model, places).items():
        raise SubspanError(
            f"{name} is quantised ({found.kind}), and a file of a whole network holds dense "
            "weights only: save state_dict() by torch.save, or coordinates around it"
        )
    parameters = {name: model.get_parameter(name) for name in find_aliases(places)}
    return {**parameters, **saved_buffers(model)}


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """128 bits over the header and all tensors."""
    sha = hashlib.sha256(_json(header).encode())
    sha.update(digest_tensors({name: tensors[name] for name in sorted(tensors)}).encode())
    return sha.hexdigest()[:32]


def _json(header: Mapping[str, Any]) -> str:
    return json.dumps(header, sort_keys=True, separators=(",", ":"))
