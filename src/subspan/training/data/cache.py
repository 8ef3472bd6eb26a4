"""Decoded data sets on disk, one safetensors file each."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from subspan.files import write_atomically
from subspan.training.data.images import RawData, Split


def folder() -> Path:
    """``$SUBSPAN_CACHE``, or ``subspan`` in the user's cache folder (``$XDG_CACHE_HOME``)."""
    if chosen := os.environ.get("SUBSPAN_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subspan"


def fetch(key: str, build: Callable[[], RawData]) -> RawData:
    """Return what is stored under ``key``; build and store it if nothing is.

    A file that cannot be read is built anew, and a folder that cannot be written is no error.
    Processes that build at once each replace the file as a whole, by the same content.
    """
    path = folder() / f"{key}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, KeyError, TypeError, ValueError):
        return _read(path)
    data = build()
    with contextlib.suppress(OSError):
        _write(path, data)
    return data


def _read(path: Path) -> RawData:
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["subspan"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return RawData(
        train=Split(tensors["train.images"], tensors["train.labels"]),
        test=Split(tensors["test.images"], tensors["test.labels"]),
        classes=metadata["classes"],
        notes=tuple(metadata["notes"]),
        names=tuple(metadata["names"]),
        depth=metadata["depth"],
    )


def _write(path: Path, data: RawData) -> None:
    tensors = {
        "train.images": data.train.images,
        "train.labels": data.train.labels,
        "test.images": data.test.images,
        "test.labels": data.test.labels,
    }
    told = {name: getattr(data, name) for name in ("classes", "notes", "names", "depth")}
    metadata = {"subspan": json.dumps(told)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(tensors, metadata))
