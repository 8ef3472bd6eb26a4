"""Where the parameters of a network live, and how to take them out and put them back.

A *slot* is one entry of one module's ``_parameters``; a *tensor* is what is in it. Tied weights are
one tensor in several slots; a module that is reachable by two paths has each slot once. Taking a
tensor out leaves its initial value behind as a buffer of the same name (never saved), so that the
hollow network still moves between devices, copies and answers ``net.fc.weight`` as before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Slot:
    """One entry of one module: ``path`` leads to it, ``tensor`` is the first name of what it holds."""

    path: str
    tensor: str

    def find(self, net: nn.Module) -> tuple[nn.Module, str]:
        """The module and its attribute."""
        module, _, attribute = self.path.rpartition(".")
        return net.get_submodule(module), attribute


def slots(net: nn.Module) -> list[Slot]:
    """Every parameter slot of a network, each once, in the order of ``named_parameters``."""
    found, first_name = [], dict[int, str]()
    for prefix, module in net.named_modules():  # visits a shared module once
        for attribute, tensor in module._parameters.items():
            if tensor is not None:
                path = f"{prefix}.{attribute}" if prefix else attribute
                found.append(Slot(path, first_name.setdefault(id(tensor), path)))
    return found


def aliases(places: Iterable[Slot]) -> dict[str, list[str]]:
    """For every tensor the paths of its slots."""
    names: dict[str, list[str]] = {}
    for slot in places:
        names.setdefault(slot.tensor, []).append(slot.path)
    return names


def hollow(net: nn.Module, places: Iterable[Slot]) -> None:
    """Replace the parameters in these slots by buffers; of a tied tensor the first slot keeps it."""
    for slot in places:
        module, attribute = slot.find(net)
        tensor = module._parameters.pop(attribute)
        assert tensor is not None
        first = slot.path == slot.tensor
        module.register_buffer(attribute, tensor.detach() if first else None, persistent=False)
    forget_flat_weights(net)


def fill(net: nn.Module, places: Iterable[Slot], tensors: Mapping[str, nn.Parameter]) -> None:
    """Undo :func:`hollow`: put parameters into the slots again, those of one tensor tied."""
    for slot in places:
        module, attribute = slot.find(net)
        del module._buffers[attribute]
        module._non_persistent_buffers_set.discard(attribute)
        module.register_parameter(attribute, tensors[slot.tensor])
    forget_flat_weights(net)


def restore_order(net: nn.Module, order: Mapping[str, list[str]]) -> None:
    """Sort every module's parameters as they were, so that a ``state_dict`` reads as before."""
    for path, names in order.items():
        parameters = net.get_submodule(path)._parameters
        sorted_parameters = {name: parameters[name] for name in names}
        parameters.clear()
        parameters.update(sorted_parameters)


def parameter_order(net: nn.Module) -> dict[str, list[str]]:
    """What :func:`restore_order` restores."""
    return {path: list(module._parameters) for path, module in net.named_modules()}


def _gone() -> None:
    """A dead reference: tells a recurrent layer that its weights have changed."""


def forget_flat_weights(net: nn.Module) -> None:
    """Make recurrent layers look their weights up again.

    They keep a list of their weights beside the slots; after a call with other tensors in the slots
    it would keep the graph alive and break ``deepcopy``.
    """
    for module in net.modules():
        if isinstance(module, nn.RNNBase):
            n = len(module._flat_weights_names)
            module._flat_weights = [None] * n
            module._flat_weight_refs = [_gone] * n


def saved_buffers(net: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a network's ``state_dict``, by name, those of BatchNorm say."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in net.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """128 bits of SHA-256 over names, dtypes, shapes and bytes, as 32 hexadecimal digits."""
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(memoryview(flat.view(torch.uint8).numpy()))
    return sha.hexdigest()[:32]
