"""Locks of the operating system, which die with the process that holds them.

A file alone says nothing about who holds it: one that a killed process left is free.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from subspan.errors import SubspanError

TRAINING = ".lock"  # in the folder of a run, while it is trained


class BusyError(SubspanError):
    """Another process trains in this folder."""


@contextlib.contextmanager
def held(path: Path) -> Iterator[bool]:
    """Hold a lock if it is free; says whether it was."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def trained_in(out: Path) -> bool:
    """Whether a process, on whichever machine, trains in this folder now."""
    if not (out / TRAINING).exists():
        return False
    with held(out / TRAINING) as free:
        return not free


def refuse_if_trained_in(out: Path) -> None:
    """As :func:`training_in` would.

    Raises:
        BusyError: if a process trains in this folder now.
    """
    if trained_in(out):
        raise _busy(out)


@contextlib.contextmanager
def training_in(out: Path) -> Iterator[None]:
    """Be the only one who trains in a folder, which is made; one that stays empty is removed.

    Raises:
        BusyError: if another process does already.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        with held(out / TRAINING) as free:
            if not free:
                raise _busy(out)
            try:
                yield
            finally:  # while it is held: who waits for it then looks for the file again
                with contextlib.suppress(OSError):  # Windows keeps what is open
                    (out / TRAINING).unlink()
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _busy(out: Path) -> BusyError:
    return BusyError(
        f"another process trains in {out} (it holds {out / TRAINING}): wait for its end, or give "
        "another --out"
    )
