"""What users bring along: a network, a task, by the name ``package.module:function``."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from subspan.errors import SubspanError, unknown


def call(kind: str, name: str, offered: Mapping[str, Any], asked: Iterable[str] = ()) -> Any:
    """Import ``package.module`` and call ``function`` with what it asks for by name.

    Args:
        kind: what the function is to make, in errors.
        name: ``package.module:function``; a class will do, too.
        offered: arguments by name; the function gets those that it has.
        asked: which of them a user gave, so that it must have them.

    Raises:
        SubspanError: if it cannot be found, or be called with these.
    """
    match = re.fullmatch(r"(\w+(?:\.\w+)*):(\w+)", name)
    if match is None:
        raise SubspanError(
            f"expected a {kind} of your own as 'package.module:function', got {name!r}"
        )
    module_name, attribute = match.groups()
    # An installed command has its own folder first on sys.path, not the user's.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # An import that fails inside the user's module is the user's to see in full.
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise SubspanError(
            f"{kind} {name!r}: there is no module {error.name!r} in {os.getcwd()} or among the "
            "installed packages: run from the folder that holds it, or install it"
        ) from error
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
