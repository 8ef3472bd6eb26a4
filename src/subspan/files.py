"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from subspan.errors import SubspanError


def readable(name: str) -> str:
    """Return a name as that of a file or folder, where "package.module:function" has a colon."""
    return re.sub(r"[^\w.-]+", "-", name)


def refuse_what_is_no_file(path: str | os.PathLike[str]) -> None:
    """Refuse a path that no file can be written to, before the work that would fill it.

    Raises:
        SubspanError: if it is a folder, or lies in one that does not exist.
    """
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise SubspanError(f"{path} cannot be a file: give a file name in a folder that exists")


def refuse_what_is_no_folder(path: Path) -> None:
    """Refuse a path of an output folder that is a file, or lies in one.

    Raises:
        SubspanError: it is.
    """
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise SubspanError(f"--out {path}: {part} is a file: give a folder")


def write_atomically(path: str | os.PathLike[str], data: bytes) -> int:
    """Write a file so that at every moment the old or the new one is there, whole.

    A temporary file in the same folder is written, synced and renamed; whatever goes wrong (a full
    disk, a folder that is not there) leaves nothing behind.

    Returns:
        The number of bytes.
    """
    return write_together({Path(path): data})


def write_together(files: Mapping[Path, bytes]) -> int:
    """Write files that belong together: none is renamed before all of them are on the disk.

    Returns:
        The number of bytes of all.
    """
    with contextlib.ExitStack() as stack:
        new = {path: stack.enter_context(_beside(path, data)) for path, data in files.items()}
        for path, name in new.items():
            with _named(path):
                os.replace(name, path)
    return sum(map(len, files.values()))


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let an error name the file that was to be written, in place of none, or of a hidden one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def _beside(path: Path, data: bytes) -> Iterator[str]:
    """Write a temporary file, which is gone if anything fails inside of the ``with``."""
    with _named(path):
        temporary = tempfile.NamedTemporaryFile(  # noqa: SIM115 (entered below)
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
        )
    with temporary as file:
        try:
            with _named(path):
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o644)  # temporary files are private, results are not
            yield file.name
        except BaseException:
            with contextlib.suppress(OSError):  # which would hide the first, for it writes again
                file.close()
            with contextlib.suppress(FileNotFoundError):  # Ctrl-C just after the renaming
                os.unlink(file.name)
            raise


def remove_unfinished(path: str | os.PathLike[str]) -> None:
    """Remove what :func:`write_atomically` left beside a file when it was killed half-way.

    Only for a file that no other process is writing.
    """
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)
