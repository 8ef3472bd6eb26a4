"""The places of a network's parameters, which of them a subspace can train, and digests.

A *slot* is one entry of one module's ``_parameters``; a *tensor* is what is in it. Tied weights are
one tensor in several slots; a module that is reachable by two paths has each slot once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from subspan.errors import SubspanError
from subspan.subspace.compartments import Patterns, select
from subspan.subspace.functions import ordinary_tensors
from subspan.subspace.links import FINGERPRINT, locate
from subspan.subspace.memory import refuse_shared
from subspan.subspace.quantised import QuantisedTensor, read_quantised
from subspan.subspace.quantised_layers import refuse_foreign

if TYPE_CHECKING:
    from subspan.subspace.targets import Presets


@dataclass(frozen=True)
class Slot:
    """One entry of one module: ``path`` leads there, ``tensor`` is the first path to its tensor."""

    path: str
    tensor: str

    def find(self, net: nn.Module) -> tuple[nn.Module, str]:
        """Find the module and the attribute."""
        return locate(net, self.path)


def find_slots(net: nn.Module) -> list[Slot]:
    """Find every parameter slot of a network, each once, in the order of ``named_parameters``.

    Raises:
        SubspanError: for a parameter without values (a lazy one, one on the meta device, or one
            that is offloaded).
    """
    slots, first_name = [], dict[int, str]()
    for prefix, module in net.named_modules():  # visits a shared module once
        for attribute, tensor in module._parameters.items():
            if tensor is None:
                continue
            path = f"{prefix}.{attribute}" if prefix else attribute
            if tensor.is_meta and getattr(module, "_hf_hook", None) is not None:
                raise SubspanError(
                    f"{path} is offloaded (by accelerate) and θ₀ must be in memory: load the "
                    "network without offloading, with a device_map of one device or none"
                )
            if nn.parameter.is_lazy(tensor) or tensor.is_meta:
                raise SubspanError(
                    f"{path} has no values yet: run a batch, or load them, first (an "
                    "__init__ that from_pretrained runs has none: wrap what that returns)"
                )
            slots.append(Slot(path, first_name.setdefault(id(tensor), path)))
    return slots


def find_aliases(places: Iterable[Slot]) -> dict[str, list[str]]:
    """Group the paths of slots by their tensor."""
    names: dict[str, list[str]] = {}
    for slot in places:
        names.setdefault(slot.tensor, []).append(slot.path)
    return names


def with_foreign(
    names: Mapping[str, Sequence[str]], foreign: Iterable[str]
) -> dict[str, Sequence[str]]:
    """Add the names of weights that cannot be read, where these are no parameters."""
    return {**names, **{name: [name] for name in foreign if name not in names}}


def select_trainable(
    tensors: Mapping[str, nn.Parameter],
    names: Mapping[str, Sequence[str]],
    targets: Patterns,
    exclude: Patterns,
    fully: set[str],
    packed: Mapping[str, QuantisedTensor] | None = None,
    foreign: Mapping[str, str] | None = None,
    presets: Presets | None = None,
) -> dict[str, int]:
    """Select the tensors to train in the subspace; their sizes, in the network's order.

    The ``packed`` count as if they required a gradient, since none of them can. Some of the
    ``foreign``, which cannot be trained, are no parameters. Those trained ``fully`` are left out.
    """
    packed, foreign = packed or {}, foreign or {}
    every = with_foreign(names, foreign)
    if targets is None:
        chosen = {name for name, tensor in tensors.items() if tensor.requires_grad}
        chosen |= packed.keys() | foreign.keys()
    else:
        chosen = select(every, targets, "targets", presets=presets)
    chosen -= select(every, exclude, "exclude", presets=presets) | fully
    for name in chosen & foreign.keys():
        raise refuse_foreign(foreign[name])
    for name, tensor in tensors.items():
        if name in chosen and name not in packed and not tensor.is_floating_point():
            raise SubspanError(f"{name} is {tensor.dtype} and P w is real: exclude it")
        if name in chosen and name not in packed and tensor.dtype.itemsize < 2:
            raise SubspanError(
                f"{name} is {tensor.dtype}, in which PyTorch adds nothing up: exclude it, or "
                "convert it before"
            )
    sizes = {name: packed.get(name, t).numel() for name, t in tensors.items() if name in chosen}
    sizes = {name: size for name, size in sizes.items() if size}
    if not sizes:
        raise SubspanError(
            "no parameter is left to train in the subspace: give targets, or unfreeze some, "
            f"of {', '.join(names) or 'none'}"
        )
    return sizes


def find_quantised(net: nn.Module, places: Iterable[Slot]) -> dict[str, QuantisedTensor]:
    """Describe a network's quantised tensors, by name."""
    found = {
        slot.tensor: read_quantised(*slot.find(net)) for slot in places if slot.path == slot.tensor
    }
    return {name: packed for name, packed in found.items() if packed is not None}


def check_trainable(
    net: nn.Module,
    places: Iterable[Slot],
    chosen: set[str],
    fully: set[str],
    packed: Mapping[str, QuantisedTensor],
) -> None:
    """Refuse what cannot be trained as it is, in the subspace (``chosen``) or directly."""
    own: dict[str, nn.Parameter] = {}
    for slot in places:
        module, attribute = slot.find(net)
        p = module._parameters[attribute]
        assert p is not None
        inside, whole = slot.tensor in chosen, slot.tensor in fully
        if (quantised := packed.get(slot.tensor)) is not None:
            if whole:
                raise SubspanError(
                    f"{slot.path} is quantised ({quantised.kind}) and cannot be trained directly: "
                    "leave it out of train_fully, and it is trained in the subspace"
                )
            if inside and quantised.refusal:
                raise SubspanError(f"{slot.path} {quantised.refusal}")
            continue
        if whole and not (p.is_floating_point() or p.is_complex()):
            raise SubspanError(
                f"{slot.path} is {p.dtype} and has no gradient: leave it out of train_fully"
            )
        if (inside or whole) and p.layout != torch.strided:
            raise SubspanError(
                f"{slot.path} is {p.layout}, and what is trained must be dense: give it as "
                "to_dense(), or leave it out"
            )
        if whole and p.is_inference():
            raise SubspanError(
                f"{slot.path} was made under inference_mode and cannot be trained fully: make the "
                "network outside of it"
            )
        if inside and isinstance(module, torch.jit.ScriptModule):
            raise SubspanError(
                f"{slot.path} belongs to a part that TorchScript compiled, which reads its weights "
                "itself: exclude it, or give the part as it was before"
            )
        if inside and (p._backward_hooks or p._post_accumulate_grad_hooks):
            raise SubspanError(
                f"{slot.path} has a hook on its gradient, which goes to the coordinates: remove "
                "the hook, or exclude the parameter"
            )
        ordinary = type(p) is nn.Parameter or getattr(type(p), "may_be_computed", False)
        if inside and not ordinary:
            raise SubspanError(
                f"{slot.path} is a {type(p).__name__}, a parameter of a kind of its own: exclude it"
            )
        if inside and any(s == 0 and n > 1 for s, n in zip(p.stride(), p.shape, strict=True)):
            raise SubspanError(
                f"{slot.path} is expanded, so that one number in memory is several weights: make "
                "it contiguous first"
            )
        own[slot.tensor] = p
    refuse_shared(net, own, chosen, fully)


def find_padding(net: nn.Module, places: Iterable[Slot]) -> dict[str, range]:
    """Find entries of embeddings at ``padding_idx``, which ordinary training leaves as they are.

    A tensor that is used elsewhere, too (as the head of a language model, say), has one there.
    """
    rows: dict[str, set[range]] = {}
    for slot in places:
        module, attribute = slot.find(net)
        row = range(0)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and attribute == "weight":
            index, width = module.padding_idx, module.embedding_dim
            row = range(0) if index is None else range(index * width, (index + 1) * width)
        rows.setdefault(slot.tensor, set()).add(row)
    alike = {tensor: next(iter(seen)) for tensor, seen in rows.items() if len(seen) == 1}
    return {tensor: row for tensor, row in alike.items() if row}


def saved_buffers(net: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a network's ``state_dict`` by name, those of BatchNorm say."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in net.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
        and name not in module._non_persistent_buffers_set
        and name != FINGERPRINT  # which is ours
    }


def digest_buffers(net: nn.Module) -> dict[str, str]:
    """Return a digest of each of a network's saved buffers, by name."""
    return {name: digest_tensors({name: buffer}) for name, buffer in saved_buffers(net).items()}


def changed_buffers(net: nn.Module, before: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the saved buffers of a network that have other digests than before, and new ones."""
    now, buffers = digest_buffers(net), saved_buffers(net)
    return {name: buffers[name] for name in now if now[name] != before.get(name)}


def digest_tensors(tensors: Mapping[str, Tensor | QuantisedTensor]) -> str:
    """Digest names, dtypes, shapes and bytes: 128 bits of SHA-256, as 32 hexadecimal digits."""
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if isinstance(tensor, QuantisedTensor):
            sha.update(f"{tensor.kind} {tensor.text}".rstrip().encode() + b"\n")
            parts = {f"{name}.{part}": inside for part, inside in tensor.parts.items()}
            sha.update(digest_tensors(parts).encode())
            continue
        if tensor.layout != torch.strided:
            sha.update(f"{tensor.layout}\n{digest_tensors(_sparse_parts(tensor))}".encode())
            continue
        sha.update(bytes_of(tensor).numpy().data)
    return sha.hexdigest()[:32]


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a dense tensor in the order of its entries, on the CPU.

    They are a storage of their own: PyTorch resizes none of which it has made an array of NumPy's.
    """
    with ordinary_tensors():
        plain = tensor.detach().cpu().resolve_conj().resolve_neg()
        return from_dlpack(plain.contiguous().reshape(-1).view(torch.uint8))


def tensor_of(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Return the tensor of :func:`bytes_of`, in memory of its own."""
    flat = torch.empty(0, dtype=dtype, device="cpu")
    if data:
        flat = torch.frombuffer(bytearray(data), dtype=dtype)
    return flat.reshape(shape)


def _sparse_parts(tensor: Tensor) -> dict[str, Tensor]:
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.detach().coalesce()
        return {"indices": tensor.indices(), "values": tensor.values()}
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        inside = {"rows": tensor.crow_indices(), "columns": tensor.col_indices()}
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        inside = {"columns": tensor.ccol_indices(), "rows": tensor.row_indices()}
    else:
        return {"dense": tensor.to_dense()}
    return inside | {"values": tensor.values()}
