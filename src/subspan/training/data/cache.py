"""Decoded data sets on disk, one safetensors file each."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from subspan.files import write_atomically


class Cached(Protocol):
    """The content of a set, that comes apart into tensors and JSON values."""

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Take it apart."""

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], told: dict[str, Any]) -> Self:
        """Put it together again; raise KeyError or TypeError if something is missing."""


Content = TypeVar("Content", bound=Cached)


def folder() -> Path:
    """``$SUBSPAN_CACHE``, or ``subspan`` in the user's cache folder (``$XDG_CACHE_HOME``)."""
    if chosen := os.environ.get("SUBSPAN_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subspan"


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
        return kind.unpack(tensors, told)
    content = build()
    with contextlib.suppress(OSError):
        tensors, told = content.pack()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(tensors, {"subspan": json.dumps(told)}))
    return content
