"""Memory that several tensors of a network share: what trains one would leave the others behind."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from subspan.errors import SubspanError
from subspan.subspace.functions import address_of

_OF_EVERY_MODULE = vars(nn.Module()).keys()
_COMPUTED_FROM = ("_orig", "_g", "_v")  # names of parameters from which hooks of PyTorch's compute


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its storage: bytes from ``start`` to ``end``, perhaps with gaps."""

    storage: int
    start: int
    end: int
    name: str
    tensor: Tensor
    owner: int  # the ``id`` of the module whose parameter it is, or 0

    @classmethod
    def of(cls, name: str, tensor: Tensor, owner: int = 0) -> Place:
        """Find the place of a tensor of that name; one without memory is a place of its own."""
        if tensor.layout != torch.strided or not (storage := address_of(tensor)):
            return cls(id(tensor), 0, 1, name, tensor, owner)
        size = tensor.element_size()
        start = int(tensor.storage_offset()) * size
        steps = zip(tensor.stride(), tensor.shape, strict=True)
        end = start + size * (1 + sum(s * (n - 1) for s, n in steps))
        return cls(storage, start, end, name, tensor, owner)

    def overlaps(self, other: Place) -> bool:
        """Return whether one byte belongs to both, whose ranges overlap."""
        one, two = self.tensor, other.tensor
        full = all(p.end - p.start == p.tensor.nbytes for p in (self, other))
        if one is two or full or one.dtype != two.dtype:
            return True
        first = min(int(t.storage_offset()) for t in (one, two))
        entries = torch.arange((max(self.end, other.end)) // one.element_size() - first)
        return bool(torch.isin(*(_view(entries, t, first) for t in (one, two))).any())


def find_overlaps(places: Iterable[Place]) -> Iterator[tuple[Place, Place]]:
    """Yield all pairs of places that have a byte in common."""
    ordered = sorted(places, key=lambda place: (place.storage, place.start, place.end))
    for k, one in enumerate(ordered, start=1):
        for other in itertools.islice(ordered, k, None):
            if (other.storage, other.start) >= (one.storage, one.end):
                break
            if one.overlaps(other):
                yield one, other


def _view(entries: Tensor, like: Tensor, first: int) -> Tensor:
    return entries.as_strided(like.shape, like.stride(), int(like.storage_offset()) - first)


def refuse_shared(
    net: nn.Module, parameters: Mapping[str, Tensor], chosen: set[str], fully: set[str]
) -> None:
    """Refuse a trained parameter whose memory another tensor has, too.

    ``parameters`` are without those that are quantised. The ``chosen`` are trained in the subspace
    and leave their memory at θ₀; the others are trained ``fully``, in their memory.
    """
    every = itertools.chain(parameters.items(), _others(net, parameters.values()))
    places = (Place.of(name, tensor) for name, tensor in every if _lies_in_memory(tensor))
    for one, other in find_overlaps(places):
        _check(one, other, parameters, chosen, fully)


def _check(
    one: Place, other: Place, parameters: Mapping[str, Tensor], chosen: set[str], fully: set[str]
) -> None:
    names = one.name, other.name
    both = parameters.keys() >= set(names)
    if not {*names} & (chosen | fully if both else chosen):
        return
    if both:
        raise SubspanError(
            f"{one.name} and {other.name} share memory and are two parameters: make them one "
            "parameter, or exclude both"
        )
    trained, beside = names if names[0] in parameters else reversed(names)
    raise SubspanError(
        f"{beside} shares the memory of {trained}, and would stay at θ₀ while that is trained: "
        f"read {trained} in its place, give it memory of its own (clone()), or exclude {trained}"
    )


def _others(net: nn.Module, parameters: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield buffers and other tensors that modules hold, which are no parameters, by name."""
    seen = {id(p) for p in parameters}
    for path, module in net.named_modules():
        held = {
            name: value
            for name, value in vars(module).items()
            if name not in _OF_EVERY_MODULE
            and not any(name + end in module._parameters for end in _COMPUTED_FROM)
        }
        for name, value in itertools.chain(held.items(), module._buffers.items()):
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{path}.{name}" if path else name, tensor


def _lies_in_memory(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        return False
    return tensor.numel() > 0 and not is_traceable_wrapper_subclass(tensor)
