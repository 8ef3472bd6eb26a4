"""What bad input raises, what a signal raises, and the sentence for an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


def unknown(kind: str, name: object, known: Iterable[str]) -> SubspanError:
    """Error for a ``name`` that is none of the ``known``, with the nearest names first.

    Args:
        kind: what was looked for, in the singular ("projection", "net", …).
        name: what was asked for.
        known: every name that would have been right.
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return SubspanError(f"unknown {kind} {str(name)!r}: {hint}known are {', '.join(known)}")
