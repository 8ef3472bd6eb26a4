"""Registries: whatever users may add and name, a projection, a layer or a method, by its name."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
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


def import_files(package: ModuleType) -> list[ModuleType]:
    """Import every file of a package, which registers what is in it, and return the modules."""
    files = pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    return [importlib.import_module(file.name) for file in files]
