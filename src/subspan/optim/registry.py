"""Names of the parts that an optimizer can be given."""

from __future__ import annotations

from typing import TypeVar

from subspan.errors import unknown

T = TypeVar("T")


class Registry(dict[str, T]):
    """Parts of one kind by name.

    Args:
        kind: of the parts, for errors: "integrator", say.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def add(self, name: str, part: T) -> None:
        """Register a part.

        Raises:
            TypeError: if there is one of that name already.
        """
        if name in self:
            raise TypeError(f"an {self.kind} named {name!r} is registered already")
        self[name] = part

    def find(self, name: str) -> T:
        """Return the part of a name.

        Raises:
            SubspanError: if there is none, with the nearest names.
        """
        if name not in self:
            raise unknown(self.kind, name, self)
        return self[name]
