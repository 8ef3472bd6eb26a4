"""The errors of bad input and of signals, and the sentences for unknown names."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from inspect import Parameter, signature
from typing import TypeGuard


class SubspanError(ValueError):
    """Input that cannot be used: the message says what was expected, what came, and the remedy.

    The command line prints the message alone and exits with code 2; anything else that
    escapes is a bug and keeps its traceback.
    """


class Stopped(KeyboardInterrupt):
    """A signal asked a training run to end, and it has saved where it stands.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def unknown(
    kind: str, name: object, known: Iterable[str], presets: Sequence[str] = ()
) -> SubspanError:
    """Make the error for a ``name`` that is none of the ``known``, with the nearest names first.

    The kind is a singular ("projection", "net", …). Presets stand for several of the known.
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), [*presets, *known], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    names = f"known are {', '.join(known)}" if known else "there is none"
    names += f"; presets are {', '.join(presets)}" if presets else ""
    return SubspanError(f"unknown {kind} {str(name)!r}: {hint}{names}")


def is_integer(value: object, least: int, most: float = math.inf) -> TypeGuard[int]:
    """Return whether a value is an integer from ``least`` to ``most``, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def check_options(
    owner: str,
    options: Iterable[str],
    make: Callable[..., object],
    apart: Collection[str] = ("n", "m"),
) -> None:
    """Refuse options that a function does not have, and the lack of one that it needs.

    The owner is named as its users call it. Parameters ``apart`` of the function are no options.
    """
    every = {k: v for k, v in signature(make).parameters.items() if k not in apart}
    parameters = {k: v for k, v in every.items() if v.kind is not Parameter.VAR_KEYWORD}
    given, takes_any = list(options), len(parameters) < len(every)
    for option in given:
        if option not in parameters and not takes_any:
            if not parameters:
                raise SubspanError(f"{owner} has no options, got {option!r}")
            raise unknown(f"option of {owner}", option, parameters)
    for name, parameter in parameters.items():
        if parameter.default is Parameter.empty and name not in given:
            raise SubspanError(f"{owner} needs {name}")
