"""Where the parameters of a network live, and how to take them out and put them back.

A *slot* is one entry of one module's ``_parameters``; a *tensor* is what is in it. Tied weights are
one tensor in several slots; a module that is reachable by two paths has each slot once. Taking a
tensor out leaves its initial value behind as a buffer of the same name (never saved), so that the
hollow network still moves between devices, copies and answers ``net.fc.weight`` as before.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subspan.compartments import Patterns, select
from subspan.errors import SubspanError


@dataclass(frozen=True)
class Slot:
    """One entry of one module: ``path`` leads there, ``tensor`` is the first path to its tensor."""

    path: str
    tensor: str

    @functools.cached_property
    def names(self) -> tuple[tuple[str, ...], str]:
        """Names of the modules on the way, and of the attribute."""
        *modules, attribute = self.path.split(".")
        return tuple(modules), attribute

    def find(self, net: nn.Module) -> tuple[nn.Module, str]:
        """The module and its attribute; ``get_submodule`` would take a tenth of a small step."""
        modules, attribute = self.names
        for name in modules:
            net = net._modules[name]  # type: ignore[assignment]
        return net, attribute


def slots(net: nn.Module) -> list[Slot]:
    """Every parameter slot of a network, each once, in the order of ``named_parameters``.

    Raises:
        SubspanError: for a parameter without values (a lazy one, or one on the meta device).
    """
    found, first_name = [], dict[int, str]()
    for prefix, module in net.named_modules():  # visits a shared module once
        for attribute, tensor in module._parameters.items():
            if tensor is None:
                continue
            path = f"{prefix}.{attribute}" if prefix else attribute
            if nn.parameter.is_lazy(tensor) or tensor.is_meta:
                raise SubspanError(f"{path} has no values yet: run a batch, or load them, first")
            found.append(Slot(path, first_name.setdefault(id(tensor), path)))
    return found


def aliases(places: Iterable[Slot]) -> dict[str, list[str]]:
    """For every tensor the paths of its slots."""
    names: dict[str, list[str]] = {}
    for slot in places:
        names.setdefault(slot.tensor, []).append(slot.path)
    return names


def trained(
    tensors: Mapping[str, nn.Parameter], names: Mapping[str, Sequence[str]],
    targets: Patterns, exclude: Patterns, fully: set[str],
) -> dict[str, int]:  # fmt: skip
    """The tensors to train in the subspace and their sizes, in the network's order.

    Args:
        tensors: by name.
        names: of :func:`aliases`.
        targets: as for :class:`~subspan.subspace.SubspaceModel`.
        exclude: as there.
        fully: the names of those that are trained directly.

    Raises:
        SubspanError: for a tensor that cannot be trained, and if none is left.
    """
    if targets is None:
        chosen = {name for name, tensor in tensors.items() if tensor.requires_grad}
    else:
        chosen = select(names, targets, "targets")
    chosen -= select(names, exclude, "exclude") | fully
    for name, tensor in tensors.items():
        if name in chosen and not tensor.is_floating_point():
            raise SubspanError(f"{name} is {tensor.dtype} and P w is real: exclude it")
    sizes = {name: t.numel() for name, t in tensors.items() if name in chosen and t.numel()}
    if not sizes:
        raise SubspanError(
            "no parameter is left to train in the subspace: give targets, or unfreeze some, "
            f"of {', '.join(names) or 'none'}"
        )
    return sizes


def hollow(net: nn.Module, places: Iterable[Slot]) -> None:
    """Replace the parameters in these slots by buffers; a tied tensor stays in its first slot."""
    for slot in places:
        module, attribute = slot.find(net)
        tensor = module._parameters.pop(attribute)
        assert tensor is not None
        first = slot.path == slot.tensor
        module.register_buffer(attribute, tensor.detach() if first else None, persistent=False)
    forget_flat_weights(net)


def swap(net: nn.Module, places: Iterable[Slot], tensors: Mapping[str, Tensor]) -> None:
    """Put tensors where :func:`hollow` left buffers."""
    for slot in places:
        module, attribute = slot.find(net)
        module._buffers[attribute] = tensors[slot.tensor]


def base(net: nn.Module, places: Iterable[Slot]) -> dict[str, Tensor]:
    """What lies in the slots of a hollow network, by tensor."""
    found = {}
    for slot in places:
        if slot.path == slot.tensor:
            module, attribute = slot.find(net)
            found[slot.tensor] = module._buffers[attribute]
    return found  # type: ignore[return-value]


def fill(net: nn.Module, places: Iterable[Slot], tensors: Mapping[str, nn.Parameter]) -> None:
    """Undo :func:`hollow`: put parameters into the slots again, those of one tensor tied."""
    for slot in places:
        module, attribute = slot.find(net)
        del module._buffers[attribute]
        module._non_persistent_buffers_set.discard(attribute)
        module.register_parameter(attribute, tensors[slot.tensor])
    forget_flat_weights(net)


@contextlib.contextmanager
def unchanged_on_error(net: nn.Module, *, values: bool) -> Iterator[None]:
    """Whatever is raised inside, the network's own parameters and buffers are in place again.

    Args:
        net: any module.
        values: whether parameters may get other values inside; they are then copied first.
    """
    registries: list[Any] = [
        registry
        for module in net.modules()
        for registry in (module._parameters, module._buffers, module._non_persistent_buffers_set)
    ]
    before = [registry.copy() for registry in registries]
    parameters = [
        (p, p.requires_grad, p.detach().clone() if values else None) for p in net.parameters()
    ]
    try:
        yield
    except BaseException:
        for registry, content in zip(registries, before, strict=True):
            registry.clear()
            registry.update(content)
        for parameter, requires_grad, value in parameters:
            parameter.requires_grad_(requires_grad)
            if value is not None:
                parameter.detach().copy_(value)
        forget_flat_weights(net)
        raise


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
            gone: list[Any] = [_gone] * len(module._flat_weights_names)
            module._flat_weights = [None] * len(gone)
            module._flat_weight_refs = gone


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
        sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()[:32]
