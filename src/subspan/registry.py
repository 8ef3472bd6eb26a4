"""Registries: whatever users may add and name, a projection, a layer or a method, by its name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import TypeVar

from subspan.errors import SubspanError, unknown

T = TypeVar("T")


class TakenError(TypeError):
    """A name that something else is registered by."""


class Registry(dict[str, T]):
    """Everything of one kind ("method", say) by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def add(self, name: str, item: T) -> None:
        """Register an item; raise TakenError if there is one of that name already."""
        if name in self:
            article = "an" if self.kind[0] in "aeiou" else "a"
            raise TakenError(f"{article} {self.kind} named {name!r} is registered already")
        self[name] = item

    def find(self, name: str) -> T:
        """Return the item of a name; raise SubspanError with the nearest names if there is none."""
        if name not in self:
            raise unregistered(self.kind, name, self)
        return self[name]


def unregistered(kind: str, name: object, known: Iterable[str]) -> SubspanError:
    """Make the error for a name that nothing is registered by, or not yet."""
    return SubspanError(
        f"{unknown(kind, name, known)}; what a module of yours adds is known once that has been "
        "imported (--import on the command line)"
    )


def import_files(package: ModuleType) -> list[ModuleType]:
    """Import every file of a package, which registers what is in it, and return the modules.

    Raises:
        SubspanError: a module of the user's, which was imported before, has taken a name.
    """
    files = pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    try:
        return [importlib.import_module(file.name) for file in files]
    except TakenError as error:
        raise SubspanError(f"{error}: subspan has it, call that of your module otherwise") from None
