"""A trained model as one safetensors file: its coordinates and the recipe around them.

The file holds the coordinates of all compartments as one tensor, what was trained fully, the buffers
that training changed, and one metadata key, ``subspan``, with sorted JSON: format, recipe, counts,
fingerprint of θ₀ and a digest of the rest (``docs/format.md``). Of an ordinary network it holds all
weights. Nothing in it is executable.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from subspan import init, slots
from subspan.errors import SubspanError
from subspan.subspace import SubspaceModel

FORMAT = 1
KEY = "subspan"
COORDINATES = "coordinates"

Net = nn.Module | Callable[[], nn.Module]


def save(model: nn.Module, path: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None) -> int:
    """Write a model to one safetensors file, all of it or nothing.

    Args:
        model: a :class:`SubspaceModel`; or an ordinary network, stored with all its weights.
        path: of the file; its folder must exist.
        extra: JSON values of the caller's, given back by :func:`inspect`.

    Returns:
        The size of the file in bytes.
    """
    header: dict[str, Any] = {"format": FORMAT, "extra": dict(extra or {})}
    if isinstance(model, SubspaceModel):
        tensors = {
            COORDINATES: torch.cat([w.detach().reshape(-1) for w in model.coordinates.values()])
        } | dict(model.fully_trained()) | model.changed_buffers()
        header |= {
            "kind": "subspace",
            "recipe": model.recipe,
            "init_seed": model.init_seed,
            "fingerprint": model.base_fingerprint,
            "weights": model.summary().weights,
        }
    else:
        places = slots.slots(model)
        tensors = {s.tensor: s.find(model)[0].get_parameter(s.find(model)[1]) for s in places}
        header |= {"kind": "full", "weights": sum(t.numel() for t in tensors.values())}
        tensors |= slots.saved_buffers(model)
    data = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header["digest"] = _digest(header, data)
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return write_atomically(path, safetensors.torch.save(data, metadata={KEY: text}))


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a checkpoint, checked to be whole and unchanged.

    Raises:
        SubspanError: if it is no checkpoint, of a newer format, cut short or edited.
    """
    path = Path(path)
    if not path.is_file():
        raise SubspanError(f"{path} is not a file: expected a checkpoint that subspan saved")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise SubspanError(f"{path} is damaged or no safetensors file: {error}") from None
    if KEY not in metadata:
        raise SubspanError(f"{path} is a safetensors file but no subspan checkpoint (no {KEY!r} key)")
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
    return header, tensors


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
    recipe, seed = header.get("recipe"), header.get("init_seed")
    if isinstance(net, nn.Module):
        network = net
    elif seed is not None:
        network = init.build(net, seed)
    else:
        network = net()
    if header["kind"] == "full":
        return _load_full(path, network, tensors)
    weights = sum(slot_tensor.numel() for slot_tensor in dict(network.named_parameters()).values())
    if weights != header["weights"]:
        raise SubspanError(
            f"{path} belongs to a network of {header['weights']:,} weights, this one has {weights:,}"
        )
    restore: dict[str, Tensor] = {}
    if seed is not None and network is net:
        restore = {name: p.detach().clone() for name, p in net.named_parameters()}
        init.initialize(net, seed)
    try:
        model = SubspaceModel(network, **recipe)
    except SubspanError:
        _write_back(network, restore)
        raise
    if model.base_fingerprint != header["fingerprint"]:
        network = model.unwrap()
        _write_back(network, restore)
        raise SubspanError(
            f"{path} was trained from other initial weights (fingerprint {header['fingerprint']}, "
            f"this network has {model.base_fingerprint}): give the network that it was trained from"
        )
    model.init_seed = seed
    _fill(model, tensors)
    return model


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint says of itself: its header, and the names and shapes of its tensors."""
    header, tensors = read(path)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return header | {"tensors": shapes, "bytes": Path(path).stat().st_size}


@torch.no_grad()
def _fill(model: SubspaceModel, tensors: dict[str, Tensor]) -> None:
    parts = tensors.pop(COORDINATES).split([p.dim for p in model.compartments])
    for w, part in zip(model.coordinates.values(), parts, strict=True):
        w.copy_(part)
    targets = model.fully_trained() | slots.saved_buffers(model.body)
    for name, tensor in tensors.items():
        targets[name].copy_(tensor)


def _load_full(path: str | os.PathLike[str], net: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    places = slots.slots(net)
    own = {s.tensor: tuple(net.get_parameter(s.tensor).shape) for s in places}
    own |= {name: tuple(b.shape) for name, b in slots.saved_buffers(net).items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(own.keys() | theirs.keys()):
        if own.get(name) != theirs.get(name):
            raise SubspanError(
                f"{path} belongs to another network: {name} has shape {theirs.get(name)} there and "
                f"{own.get(name)} here"
            )
    net.load_state_dict(tensors, strict=False)
    return net


@torch.no_grad()
def _write_back(net: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, tensor in values.items():
        net.get_parameter(name).copy_(tensor)


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    sha = hashlib.sha256(text.encode())
    sha.update(slots.digest({name: tensors[name] for name in sorted(tensors)}).encode())
    return sha.hexdigest()[:32]


def write_atomically(path: str | os.PathLike[str], data: bytes) -> int:
    """Write a file so that at every moment the old or the new one is there, whole.

    A temporary file in the same folder is written, synced and renamed; it is removed if anything
    goes wrong (a full disk, say).

    Returns:
        The number of bytes.
    """
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return len(data)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
