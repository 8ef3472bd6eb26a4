"""Dataclasses of tensors, as sets are: moved to a device, and taken apart for a file."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self, get_type_hints

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tensors:
    """Fields that are tensors, or dataclasses of such, or JSON values with tuples for lists."""

    def to(self, device: torch.device | str) -> Self:
        """Return it with all tensors, those of inner dataclasses too, on another device."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {k: v.to(device) for k, v in own.items() if isinstance(v, (Tensor, Tensors))}
        return replace(self, **moved)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors by names such as "train.labels", and the JSON values of this one."""
        tensors: dict[str, Tensor] = {}
        rest: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensors):
                tensors |= {f"{field.name}.{name}": t for name, t in value.pack()[0].items()}
            elif isinstance(value, Tensor):
                tensors[field.name] = value
            else:
                rest[field.name] = value
        return tensors, rest

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> Self:
        """Return what :meth:`pack` took apart; raise KeyError if something is missing."""
        given: dict[str, Any] = {}
        for name, kind in get_type_hints(cls).items():
            if isinstance(kind, type) and issubclass(kind, Tensors):
                inside = {key.removeprefix(f"{name}."): t for key, t in tensors.items()}
                given[name] = kind.unpack(inside, {})
            elif kind is Tensor:
                given[name] = tensors[name]
            else:
                given[name] = tuple(rest[name]) if isinstance(rest[name], list) else rest[name]
        return cls(**given)


@dataclass(frozen=True, eq=False, kw_only=True)
class Raw(Tensors):
    """The content of a source, before a validation part is drawn from its training part."""

    notes: tuple[str, ...] = ()  # sentences that a reader of the results should know
    # Whether some of it lies beside its source, where a change would not be noticed, so that it is
    # read each time.
    outside: bool = False
