"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from subspan.errors import SubspanError


def readable(name: str) -> str:
    """Return a name as that of a file or folder, where "package.module:function" has a colon."""
    return re.sub(r"[^\w.-]+", "-", name)


def expanded(name: str) -> Path:
    """Return a path with the home folder for ~; where there is none it stays, as in a shell."""
    return Path(os.path.expanduser(name))


def refuse_what_is_no_file(path: str | os.PathLike[str]) -> None:
    """Refuse a path that no file can be written to, before the work that would fill it.

    Raises:
        SubspanError: if it is a folder or a device, or lies in a folder that does not exist.
        PermissionError: if it is a file that is protected.
    """
    _refuse_what_renaming_would_take(Path(path))
    if not _behind_links(path).parent.is_dir():
        raise SubspanError(f"{path} cannot be a file: give a file name in a folder that exists")


def refuse_what_is_no_folder(path: Path) -> None:
    """Refuse a path of an output folder that is a file, or lies in one."""
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise SubspanError(f"--out {path}: {part} is a file: give a folder")


def write_atomically(path: str | os.PathLike[str], data: bytes) -> int:
    """Write a file so that at every moment the old or the new one is there, whole.

    A temporary file in the same folder is written, synced and renamed; whatever goes wrong (a full
    disk, a folder that is not there) leaves nothing behind. Otherwise it is as if the file had been
    opened and written: a link stays, and what it leads to is written; a file that was there keeps
    its permissions, and a new one has those that new files have; what is no file, or is protected,
    is refused. The number of bytes is returned.

    Raises:
        SubspanError: if something is there that is no file.
        OSError: if it cannot be written.
    """
    return write_together({Path(path): data})


def write_together(files: Mapping[Path, bytes]) -> int:
    """Write files as :func:`write_atomically`, and rename none before all are on the disk.

    The number of bytes of all is returned.
    """
    for path in files:
        _refuse_what_renaming_would_take(path)
    with contextlib.ExitStack() as stack:
        new = {path: stack.enter_context(_beside(path, data)) for path, data in files.items()}
        for path, name in new.items():
            with _named(path):
                os.replace(name, _behind_links(path))
    return sum(map(len, files.values()))


def _behind_links(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(path))


def _refuse_what_renaming_would_take(path: Path) -> None:
    """Refuse to put a file in the place of a device, or of a file that may not be written."""
    if not path.exists():
        return
    if not path.is_file():
        raise SubspanError(f"{path} cannot be a file: give a file name in a folder that exists")
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


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
    target = _behind_links(path)
    name = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with _named(path):
        file = name.open("xb")
    with file:
        try:
            with _named(path):
                if target.exists():
                    os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield str(name)
        except BaseException:
            with contextlib.suppress(OSError):  # which would hide the first, for it writes again
                file.close()
            with contextlib.suppress(FileNotFoundError):  # Ctrl-C just after the renaming
                os.unlink(name)
            raise


def remove_unfinished(path: str | os.PathLike[str]) -> None:
    """Remove what :func:`write_atomically` left beside a file when it was killed half-way.

    Only for a file that no other process is writing.
    """
    path = _behind_links(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)
