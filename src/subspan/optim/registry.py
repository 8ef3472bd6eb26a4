"""Parts that an optimizer can be given by name."""

from __future__ import annotations

from typing import TypeVar

from subspan.errors import unknown

T = TypeVar("T")


class Registry(dict[str, T]):
    """Parts of one kind ("integrator", say) by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def add(self, name: str, part: T) -> None:
        """Register a part; raise TypeError if there is one of that name already."""
        if name in self:
            raise TypeError(f"an {self.kind} named {name!r} is registered already")
        self[name] = part

    def find(self, name: str) -> T:
        """Return the part of a name; raise SubspanError with the nearest names if there is none."""
        if name not in self:
            raise unknown(self.kind, name, self)
        return self[name]
