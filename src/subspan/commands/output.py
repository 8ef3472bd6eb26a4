"""The standard output, which may end before a command does: ``subspan train … | head -1``."""

from __future__ import annotations

import io
import os
import sys


def begin() -> None:
    """Let letters that the output's encoding lacks be written by their numbers, as errors are."""
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
        if sys.stdout is not None:  # there is none after >&-
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
