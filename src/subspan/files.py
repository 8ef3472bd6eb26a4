"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], data: bytes) -> int:
    """Write a file so that at every moment the old or the new one is there, whole.

    A temporary file in the same folder is written, synced and renamed; whatever goes wrong (a full
    disk, a folder that is not there) leaves nothing behind.

    Returns:
        The number of bytes.
    """
    path = Path(path)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
    ) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)  # temporary files are private, results are not
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return len(data)
