"""Registries: whatever users may add and name, a projection, a layer or a method, by its name."""

from __future__ import annotations

from typing import TypeVar

from subspan.errors import unknown

T = TypeVar("T")


class Registry(dict[str, T]):
    """Everything of one kind ("method", say) by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def add(self, name: str, item: T) -> None:
        """Register an item; raise TypeError if there is one of that name already."""
        if name in self:
            article = "an" if self.kind[0] in "aeiou" else "a"
            raise TypeError(f"{article} {self.kind} named {name!r} is registered already")
        self[name] = item

    def find(self, name: str) -> T:
        """Return the item of a name; raise SubspanError with the nearest names if there is none."""
        if name not in self:
            raise unknown(self.kind, name, self)
        return self[name]
