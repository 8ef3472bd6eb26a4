"""The standard output, which may end before a command does: ``subspan train … | head -1``."""

from __future__ import annotations

import io
import os
import sys


def begin() -> None:
    """Let there be an output, and letters that its encoding lacks be written by their numbers.

    After ``>&-`` there is none: workers of a sweep cannot be started without, and the next file
    that is opened would be taken for it.
    """
    for number, name in enumerate(("stdout", "stderr"), start=1):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            setattr(sys, name, os.fdopen(number, "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def write(text: str) -> None:
    """Print a text, or raise SystemExit."""
    try:
        print(text)
    except OSError as error:
        end(error)


def finish() -> None:
    """Write what is left of the output, or raise SystemExit."""
    try:
        sys.stdout.flush()
    except OSError as error:
        end(error)


def end(error: OSError) -> None:
    """Throw the output away from now on. Where nobody reads it any more, as head, that is all.

    If there is another reason why it cannot be written, raise SystemExit.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not isinstance(error, BrokenPipeError):
        raise SystemExit(f"subspan: error: the output cannot be written: {error}")
