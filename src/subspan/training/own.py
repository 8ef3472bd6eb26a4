"""Networks and tasks of the user's own, by the name ``package.module:function``."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from subspan.errors import SubspanError, unknown
from subspan.registry import import_files

IMPORTS = "SUBSPAN_IMPORT"  # the environment's variable: modules, separated by commas


def load(name: str) -> None:
    """Import a module of the user's, for what it adds to the registries.

    If that fails the error names the file and the line.
    """
    if re.fullmatch(r"\w+(\.\w+)*", name) is None:
        raise SubspanError(f"--import needs a module as 'package.module', got {name!r}")
    try:
        _module(name, f"--import {name}")
    except SubspanError:
        raise
    except Exception as error:
        found = None
        with contextlib.suppress(Exception):  # which imports the package that the module is in
            found = importlib.util.find_spec(name)
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if found and frame.filename == found.origin]
        place = (own or frames)[-1].filename, (own or frames)[-1].lineno
        if isinstance(error, SyntaxError):
            place = error.filename or place[0], error.lineno
        raise SubspanError(
            f"--import {name} fails in {place[0]}, line {place[1]}: {type(error).__name__}: {error}"
        ) from error


def remember(modules: Iterable[str]) -> None:
    """Put modules into the environment, from which other processes of this command have them."""
    if names := dict.fromkeys([*remembered(), *modules]):
        os.environ[IMPORTS] = ",".join(names)


def remembered() -> tuple[str, ...]:
    """Return the modules that ``--import`` named in this process, or in the one that started it."""
    return tuple(filter(None, os.environ.get(IMPORTS, "").split(",")))


def load_remembered() -> None:
    """Import them."""
    for name in remembered():
        load(name)


@functools.cache
def import_all(package: str) -> None:
    """Import these modules and every file of a package, which add to the package's registry."""
    load_remembered()
    import_files(sys.modules[package])


@contextlib.contextmanager
def modules_beside(file: str) -> Iterator[None]:
    """Look for the user's modules in a file's folder first, then where they always are.

    So do processes that begin meanwhile: they inherit the environment.
    """
    folder, before = str(Path(file).parent.resolve()), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, before]))
    path = list(sys.path)
    sys.path[:0] = [folder, os.getcwd()]
    try:
        yield
    finally:
        sys.path[:] = path
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _module(name: str, what: str) -> ModuleType:
    # An installed command has its own folder first on sys.path, not the user's.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # An import that fails inside the user's module is the user's to see in full.
        if not f"{name}.".startswith(f"{error.name}."):
            raise
        raise SubspanError(
            f"{what}: there is no module {error.name!r} in {os.getcwd()} or among the installed "
            "packages: run from the folder that holds it, or install it"
        ) from error


def call(kind: str, name: str, offered: Mapping[str, Any], asked: Iterable[str] = ()) -> Any:
    """Import ``package.module`` and call ``function``, or a class, with what it asks for by name.

    It gets those of the offered arguments that it has, and must have those that a user asked for.
    The kind is what it is to make, in errors.
    """
    match = re.fullmatch(r"(\w+(?:\.\w+)*):(\w+)", name)
    if match is None:
        raise SubspanError(
            f"expected a {kind} of your own as 'package.module:function', got {name!r}"
        )
    module_name, attribute = match.groups()
    module = _module(module_name, f"{kind} {name!r}")
    if not hasattr(module, attribute):
        public = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise unknown(f"function of {module_name}", attribute, public)
    function = getattr(module, attribute)
    if not callable(function) or not hasattr(function, "__name__"):
        raise SubspanError(
            f"{kind} {name!r}: expected a function or class that makes a {kind}, "
            f"got {type(function).__name__}"
        )
    signature = inspect.signature(function)
    for key in asked:
        if key not in signature.parameters:
            raise SubspanError(
                f"{kind} {name!r} has no parameter {key}, its signature is {signature}: leave "
                f"--{key} {offered[key]} out"
            )
    arguments = {key: value for key, value in offered.items() if key in signature.parameters}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        names = " and ".join(filter(None, [", ".join(list(offered)[:-1]), *list(offered)[-1:]]))
        raise SubspanError(
            f"{kind} {name!r} is called with {names} if it has them, and with nothing "
            f"else, but its signature is {signature}: give the other arguments defaults"
        ) from error
    return function(**arguments)
