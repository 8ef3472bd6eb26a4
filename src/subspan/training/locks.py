"""Locks of folders, which the operating system frees when their process ends, however it ends.

A lock file alone says nothing: one that a killed process left behind is free.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from subspan.errors import SubspanError

FILE = ".lock"  # in the folder of a run, while it is trained


class BusyError(SubspanError):
    """Another process trains in this folder."""


@contextlib.contextmanager
def lock_file(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock on a file, whose folder exists, or wait for it; yield whether it was free."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Return whether a process, on whichever machine, holds the lock on this file now."""
    if not path.exists():
        return False
    with lock_file(path) as free:
        return not free


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Be the only process that trains in a folder, or raise BusyError.

    The folder is made, and removed if it stays empty.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock_file(folder / FILE) as free:
            if not free:
                raise BusyError(
                    f"another process trains in {folder} (it holds {folder / FILE}): wait for its "
                    "end, or give another --out"
                )
            try:
                yield
            finally:  # before the release: a process that waits for the lock makes a new file
                with contextlib.suppress(OSError):  # Windows keeps files that are open
                    (folder / FILE).unlink()
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()
