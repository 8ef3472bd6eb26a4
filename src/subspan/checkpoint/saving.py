"""Writing a model: which header and which tensors its file has."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from subspan.checkpoint.base import find_base
from subspan.checkpoint.compact import to_compact
from subspan.checkpoint.file import COORDINATES, FORMAT, KEY, describe_layers, digest, to_json
from subspan.checkpoint.part import base_of, trained_tensors
from subspan.counts import count
from subspan.errors import SubspanError
from subspan.files import refuse_what_is_no_file, write_atomically
from subspan.subspace.dtensors import whole
from subspan.subspace.model import SubspaceModel
from subspan.subspace.parameters import find_aliases, find_quantised, find_slots, saved_buffers


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    bits: float | None = None,
    extra: Mapping[str, Any] | None = None,
    base: str | None = None,
) -> int:
    """Write a model to one safetensors file, or to a compact one, all of it or nothing.

    Args:
        model: a :class:`SubspaceModel`; or an ordinary network, stored with all its weights.
        path: of the file; its folder must exist.
        bits: the most that the file may take for each coordinate, on average (2, or 2.5); it is
            then a compact one, not safetensors, and :func:`load` rounds coordinates as it does.
            Those that :class:`subspan.optim.Quantiser` trained stay exactly as they are. What was
            trained fully and changed buffers are stored exactly.
        extra: JSON values of the caller's, given back by :func:`inspect`.
        base: the repository of the Hub that a network of Transformers came from, as ``NAME`` or
            ``NAME@REVISION``; by default what the network itself says.

    Returns:
        The size of the file in bytes.

    Raises:
        SubspanError: if there is no such folder, ``extra`` is not JSON, a SubspaceModel lies
            inside another module, a module has state beside parameters and buffers, a compressed
            layer is of a class that no type registers, ``base`` cannot be this network's, or
            ``bits`` is asked of a model without coordinates or leaves nothing of them.
        OSError: if the file cannot be written; one that was there before is then still whole.
    """
    path = Path(path)
    refuse_what_is_no_file(path)
    header, tensors = contents(model, extra, base)
    if bits is None:
        return write_atomically(path, to_bytes(header, tensors))
    return write_atomically(path, to_compact(header, tensors, bits))


def to_bytes(header: Mapping[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """Return the file of a header and its tensors, with the digest of both."""
    text = to_json({**header, "digest": digest(header, tensors)})
    return safetensors.torch.save(tensors, metadata={KEY: text})


def contents(
    model: nn.Module, extra: Mapping[str, Any] | None = None, base: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and copies of the tensors that a file of this model has.

    Raises:
        SubspanError: as :func:`save`.
    """
    if not isinstance(extra, Mapping | None):
        raise SubspanError(f"extra must be a dict of JSON values, got {type(extra).__name__}")
    header: dict[str, Any] = {"format": FORMAT, "extra": dict(extra or {})}
    model = SubspaceModel.of(model) or model
    _check_only_tensors(model)
    if isinstance(model, SubspaceModel):
        model.subspace.changes.check_complete()
        changed = {**model.fully_trained(), **model.changed_buffers()}
        tensors = {f"body.{name}": tensor for name, tensor in changed.items()}
        tensors[COORDINATES] = torch.cat([w.detach() for w in model.coordinates.values()])
        header |= {
            "kind": "subspace",
            "recipe": model.recipe,
            "init_seed": model.init_seed,
            "fingerprint": model.base_fingerprint,
            "layout": model.layout,
            "weights": model.summary().weights,
        }
        if model.subspace.lora:
            header["lora"] = model.subspace.lora
        if apart := sorted(model.subspace.reads.apart()):
            header["apart"] = apart
        if kept := model.subspace.kept:
            header["kept"] = rows_kept(kept)
        if packed := model.subspace.packed:
            header["quantised"] = count_kinds(packed.values())
        if saved_buffers(model.body):
            header["parameters"] = model.subspace.parameters_digest()
        if (found := find_base(model, base)) is not None:
            header["base"] = found
    elif part := base_of(model):
        tensors = trained_tensors(model, part)
        header |= {"kind": "part", "weights": part.weights, "fingerprint": part.fingerprint}
    else:
        tensors = stored_tensors(model)
        header |= {"weights": count(model).dense} | describe_layers(model)
    try:
        text = json.dumps(header)  # as a reader will see it: all keys are strings
        header = json.loads(text, object_pairs_hook=_unique)
    except (TypeError, ValueError, RecursionError) as error:
        raise SubspanError(f"extra must hold JSON values: {error}") from None
    for name, tensor in tensors.items():
        if name == "__metadata__":
            raise SubspanError(
                f"a tensor cannot be called {name} in a file, where safetensors calls the header "
                "so: give it another name"
            )
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = tensor.dtype if tensor.is_quantized else tensor.layout
            raise SubspanError(
                f"{name} is {kind}, and a file holds dense tensors only: keep it as such, or "
                "save state_dict() by torch.save"
            )
    # Copies: safetensors refuses tensors that overlap in memory.
    layout = torch.contiguous_format
    return header, {
        n: whole(t.detach()).to("cpu", copy=True, memory_format=layout) for n, t in tensors.items()
    }


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of pairs from JSON; refuse a key of which a file would lose the first value."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} would be there twice, for all keys become strings")
        found[key] = value
    return found


def _check_only_tensors(model: nn.Module) -> None:
    """Refuse state that is no parameter and no buffer, which no file here could hold."""
    for name, module in model.named_modules():
        overridden = type(module).get_extra_state is not nn.Module.get_extra_state
        if overridden and module.get_extra_state() is not None:
            raise SubspanError(
                f"{name or 'the network'} ({type(module).__name__}) has state of its own "
                "(get_extra_state), which a file of tensors would lose: keep it in buffers, or "
                "save state_dict() by torch.save"
            )


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return live tensors by the names that they have in a file, without coordinates."""
    if isinstance(model, SubspaceModel):
        tensors = {**model.fully_trained(), **saved_buffers(model.body)}
        return {f"body.{name}": tensor for name, tensor in tensors.items()}
    if base := base_of(model):
        return {**trained_tensors(model, base), **saved_buffers(model)}
    if any(SubspaceModel.of(module) for module in model.modules()):
        raise SubspanError(
            f"a SubspaceModel lies inside this {type(model).__name__}: save that one (`.module` of "
            "DDP, `._orig_mod` of torch.compile), or put its merge() there"
        )
    places = find_slots(model)
    for name, packed in find_quantised(model, places).items():
        raise SubspanError(
            f"{name} is quantised ({packed.kind}), and a file of a whole network holds dense "
            "weights only: save state_dict() by torch.save, or coordinates around it"
        )
    parameters = {name: model.get_parameter(name) for name in find_aliases(places)}
    return {**parameters, **saved_buffers(model)}


def rows_kept(kept: Mapping[str, range]) -> dict[str, list[int]]:
    """Return which entries of tensors stay at θ₀, as JSON."""
    return {name: [entries.start, entries.stop] for name, entries in kept.items()}


def count_kinds(kinds: Iterable[str]) -> dict[str, int]:
    """Count the quantised tensors of each kind."""
    return dict(sorted(Counter(kinds).items()))
