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

_OF_EVERY_MODULE = vars(nn.Module()).keys()
_COMPUTED_FROM = ("_orig", "_g", "_v")  # names of parameters from which hooks of PyTorch's compute


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its storage: bytes from ``start`` to ``end``, perhaps with gaps."""

    start: int
    end: int
    name: str
    tensor: Tensor

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Place:
        """Find the place of a tensor of that name."""
        size = tensor.element_size()
        start = int(tensor.storage_offset()) * size
        steps = zip(tensor.stride(), tensor.shape, strict=True)
        return cls(start, start + size * (1 + sum(s * (n - 1) for s, n in steps)), name, tensor)

    def overlaps(self, other: Place) -> bool:
        """Return whether one byte belongs to both, whose ranges overlap."""
        one, two = self.tensor, other.tensor
        full = all(p.end - p.start == p.tensor.nbytes for p in (self, other))
        if full or one.dtype != two.dtype:
            return True
        first = min(int(t.storage_offset()) for t in (one, two))
        entries = torch.arange((max(self.end, other.end)) // one.element_size() - first)
        return bool(torch.isin(*(_view(entries, t, first) for t in (one, two))).any())


def _view(entries: Tensor, like: Tensor, first: int) -> Tensor:
    return entries.as_strided(like.shape, like.stride(), int(like.storage_offset()) - first)


def refuse_shared(
    net: nn.Module, parameters: Mapping[str, Tensor], chosen: set[str], fully: set[str]
) -> None:
    """Refuse a trained parameter whose memory another tensor has, too.

    ``parameters`` are without those that are quantised. The ``chosen`` are trained in the subspace
    and leave their memory at θ₀; the others are trained ``fully``, in their memory.
    """
    memory: dict[int, list[Place]] = {}
    for name, tensor in itertools.chain(parameters.items(), _others(net, parameters.values())):
        if _lies_in_memory(tensor):
            storage = tensor.untyped_storage().data_ptr()
            memory.setdefault(storage, []).append(Place.of(name, tensor))
    for places in memory.values():
        places.sort(key=lambda place: (place.start, place.end))
        for k, one in enumerate(places):
            for other in itertools.takewhile(
                lambda place, end=one.end: place.start < end,  # type: ignore[misc]
                itertools.islice(places, k + 1, None),
            ):
                _check(one, other, parameters, chosen, fully)


def _check(
    one: Place, other: Place, parameters: Mapping[str, Tensor], chosen: set[str], fully: set[str]
) -> None:
    names = one.name, other.name
    both = parameters.keys() >= set(names)
    if not {*names} & (chosen | fully if both else chosen) or not one.overlaps(other):
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
