"""Links connect modules to their network's subspace; and the names of this library in a network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from subspan.errors import SubspanError

if TYPE_CHECKING:
    from subspan.subspace.weights import Weights

    Behaviour = nn.Module
else:
    Behaviour = object  # a base of what made classes have before the module's own class

LINK = "_subspan"  # in a module's __dict__: its Link
PREFIX = "subspan_"  # of our names among a network's parameters and buffers
FINGERPRINT = PREFIX + "fingerprint"


def is_ours(path: str) -> bool:
    """Return whether the parameter or buffer of a path is one of this library's."""
    return path.rpartition(".")[2].startswith(PREFIX)


@dataclass(eq=False)
class Link:
    """Connects a module to its network's subspace."""

    weights: Weights
    tensors: dict[str, str]  # names of the module's trained tensors, by attribute
    order: list[str]  # of all parameters that the module had when it was wrapped


def check_network(net: Any) -> None:
    """Refuse what is no network, such as its parameters() or its state."""
    if not isinstance(net, nn.Module):
        raise SubspanError(f"the network must be a torch.nn.Module, got {type(net).__name__}")


def find_link(module: Any) -> Link | None:
    """Return the link of a module, or None if it is in no subspace."""
    link: Link | None = vars(module).get(LINK)
    return link


def link_of(module: Any) -> Link:
    """Return the link of a module in a subspace; refuse a copy that lost it."""
    if (link := find_link(module)) is None:
        raise SubspanError(
            f"this {type(module).__name__} was copied by a method of its own and is not in the "
            "subspace of the original: copy the network of unwrap() or merge(), or state_dict()"
        )
    return link


def is_exporting() -> bool:
    """Return whether a graph is made to be exported.

    PyTorch's function of that name is true in every compiled graph before 2.13.
    """
    return bool(torch.compiler._is_exporting_flag)


def is_exported(module: nn.Module) -> bool:
    """Return whether code that is being exported asks, and not the exporter.

    That looks at a network before it puts stand-ins into the places of its parameters.
    """
    link = find_link(module) if is_exporting() else None
    inside = torch.compiler.is_dynamo_compiling()
    return link is not None and (inside or link.weights.has_stand_ins)


def digits_of(fingerprint: str) -> list[int]:
    """Return the bytes of a fingerprint, which a network's buffer holds."""
    return list(bytes.fromhex(fingerprint))


def missing(name: str) -> SubspanError:
    """Make the refusal of a network that has lost a parameter."""
    return SubspanError(
        f"{name} was taken out of the network after it was wrapped, and coordinates go with the "
        "network as it was: do this before; merge() gives this network as it is"
    )


def trained_keys(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, str, Link]]:
    """Yield the trained tensors of a module and its parts: name, key in its state, and link."""
    for path, part in module.named_modules(remove_duplicate=False):
        if (link := find_link(part)) is not None:
            for attribute, tensor in link.tensors.items():
                yield tensor, prefix + (f"{path}.{attribute}" if path else attribute), link


def locate(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the module and the attribute at the end of a parameter's path."""
    prefix, _, attribute = path.rpartition(".")
    return root.get_submodule(prefix), attribute
