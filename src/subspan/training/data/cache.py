"""Decoded data sets on disk, one safetensors file each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from subspan.files import expanded, readable, write_atomically
from subspan.training.data.tensors import Raw

Content = TypeVar("Content", bound=Raw)


def folder() -> Path:
    """``$SUBSPAN_CACHE``, or ``subspan`` in the user's cache folder (``$XDG_CACHE_HOME``).

    A user without a home, as in a container, has none that could be written.
    """
    if chosen := os.environ.get("SUBSPAN_CACHE"):
        return expanded(chosen)
    home = expanded("~")
    usual = home / ".cache" if home.is_absolute() else Path(os.devnull)
    return Path(os.environ.get("XDG_CACHE_HOME") or usual) / "subspan"


def fetch(key: str, kind: type[Content], build: Callable[[], Content]) -> Content:
    """Return what is stored under ``key``; build and store it if nothing is.

    A file that cannot be read is built anew, and a folder that cannot be written is no error.
    Processes that build at once each replace the file as a whole, by the same content.
    """
    path = folder() / f"{key}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, KeyError, TypeError, ValueError):
        with safe_open(path, framework="pt") as file:
            told = json.loads(file.metadata()["subspan"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return kind.unpack(tensors, {"outside": False} | told)  # earlier versions do not say
    content = build()
    if content.outside:
        return content
    with contextlib.suppress(OSError):
        tensors, told = content.pack()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(tensors, {"subspan": json.dumps(told)}))
    return content


def fetch_set(
    name: str,
    version: int,
    identity: Sequence[Any],
    kind: type[Content],
    read: Callable[[], Content],
) -> Content:
    """Return the content of a set; where it is not stored, it is read, and the terminal says so.

    The content depends on the version of what reading makes of a source, and on its identity, JSON
    whose first entry is where the source is.
    """

    def build() -> Content:
        from rich.console import Console

        with Console(stderr=True).status(f"reading {name}"):
            return read()

    key = f"{readable(Path(identity[0]).name)}-{digest(json.dumps([version, *identity]))}"
    return fetch(key, kind, build)


def digest(text: str) -> str:
    """Return 16 hexadecimal digits that tell a text from others."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
