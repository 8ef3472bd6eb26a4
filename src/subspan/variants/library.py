"""The variants that are in memory, those of a folder, and what was made for the latest uses."""

from __future__ import annotations

import difflib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from subspan.errors import SubspanError
from subspan.subspace.variant import Variant
from subspan.variants.stored import Source, StoredVariant

ENDS = (".safetensors", ".subspan")  # the latter of compact files
Stamp = tuple[int, ...] | None  # of a file: when it was written and changed, its size, which it is
Key = tuple[StoredVariant | None, ...]  # the variant of each row, or of all; None is the base


class Recent:
    """The variants of the latest uses, so many as ``size``, with the θ that was formed for them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: OrderedDict[Key, tuple[Any, Variant]] = OrderedDict()  # latest used last
        self._lock = threading.RLock()  # a signal's handler may come in between

    def get(self, key: Key, state: Any, make: Callable[[], Variant]) -> Variant:
        """Return the variant of a key, made anew if the state is another or it was written to."""
        with self._lock:
            known = self._kept.get(key)
            if known is not None and known[0] == state and not known[1].written:
                self._kept.move_to_end(key)
                return known[1]
        variant = make()  # two threads may both do so, to the same effect
        with self._lock:
            self._kept[key] = state, variant
            self._kept.move_to_end(key)
            while len(self._kept) > self.size:
                self._kept.popitem(last=False)
        return variant

    def forget(self, stored: Iterable[StoredVariant]) -> None:
        """Drop whatever was made of these."""
        gone = set(stored)
        with self._lock:
            for key in [key for key in self._kept if not gone.isdisjoint(key)]:
                del self._kept[key]


class Library:
    """Variants by name; threads may add, remove, replace and load at once.

    ``take`` makes of a source what is stored; ``resident`` of the folder's variants stay in memory.
    """

    def __init__(
        self,
        take: Callable[[Source], StoredVariant],
        folder: str | os.PathLike[str] | None,
        resident: int,
    ) -> None:
        self._take, self._resident = take, resident
        self._files = {} if folder is None else _find_files(folder)
        self._added: dict[str, StoredVariant] = {}
        # From files, each with the state of its file; latest used last.
        self._read: OrderedDict[str, tuple[Stamp, StoredVariant]] = OrderedDict()
        self._lock = threading.RLock()  # a signal's handler may come in between

    def names(self) -> list[str]:
        """Return all names."""
        with self._lock:
            return [*self._files, *self._added]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._added or name in self._files)

    def add(self, name: str, source: Source) -> None:
        """Add a variant under a name that is free."""
        if not isinstance(name, str) or not name:
            raise SubspanError(f"a variant's name is a text of one letter or more, got {name!r}")
        self._refuse_taken(name)
        stored = self._take(source)
        with self._lock:
            self._refuse_taken(name)  # by another thread meanwhile
            self._added[name] = stored

    def replace(self, name: str, source: Source) -> list[StoredVariant]:
        """Put another variant in the place of one; return what there was in memory."""
        self._check_known(name)
        stored = self._take(source)
        with self._lock:
            was = self._drop(name)
            self._added[name] = stored
        return was

    def remove(self, name: str) -> list[StoredVariant]:
        """Remove a variant, not its file; return what there was in memory."""
        with self._lock:
            return self._drop(name)

    def load(self, name: str) -> StoredVariant:
        """Return a variant, from its file if it is not in memory."""
        with self._lock:
            self._check_known(name)
            if name in self._added:
                return self._added[name]
            path = self._files[name]
        stamp = _stamp(path)
        with self._lock:
            kept = self._read.get(name)
            if kept is not None and stamp in (None, kept[0]):
                self._read.move_to_end(name)
                return kept[1]
        stored = self._take(path)  # other threads need not wait
        with self._lock:
            if self._files.get(name) is path:
                self._read[name] = stamp, stored
                self._read.move_to_end(name)
            while len(self._read) > self._resident:
                self._read.popitem(last=False)
        return stored

    def _drop(self, name: str) -> list[StoredVariant]:
        self._check_known(name)
        self._files.pop(name, None)
        _, read = self._read.pop(name, (None, None))
        return [each for each in (self._added.pop(name, None), read) if each is not None]

    def _refuse_taken(self, name: str) -> None:
        if name in self:
            raise SubspanError(f"there is a variant {name!r}: use replace(), or remove() it first")

    def _check_known(self, name: object) -> None:
        if name in self:
            return
        known = [*self._files, *self._added]
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "add() it first"
        raise SubspanError(f"unknown variant {name!r} among {len(known):,}: {hint}")


def _stamp(path: Path) -> Stamp:
    """Tell the states of a file apart; None of one that is gone, whose variant may be in memory."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino


def _find_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Find the checkpoints of a folder, at least one, by the names of their variants."""
    files: dict[str, Path] = {}
    for path in sorted(path for end in ENDS for path in Path(folder).glob(f"*{end}")):
        if (other := files.setdefault(path.stem, path)) is not path:
            raise SubspanError(
                f"{other} and {path} would both be the variant {path.stem!r}: take one away"
            )
    if not files:
        raise SubspanError(
            f"{folder} has no checkpoints ({', '.join(f'*{end}' for end in ENDS)}): give a folder "
            "of files of subspan.save"
        )
    return files
