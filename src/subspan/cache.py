"""Memory between calls: integers derived from a seed, and the memory of large tensors."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

Kept = Tensor | np.ndarray


class Cache:
    """Integers derived from a seed, kept between calls up to a budget of bytes, oldest out first.

    Only what is O(D) at most may go in; nothing of it is ever saved. Threads may share it.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.held = 0  # bytes
        self._items: OrderedDict[Any, tuple[Any, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any, build: Callable[[], tuple[Kept, ...]]) -> tuple[Any, ...]:
        """Return the arrays under ``key``, built at the first call and after they were dropped."""
        with suppress(KeyError):
            self._items.move_to_end(key)  # newest last
            return self._items[key]
        arrays = build()  # two threads may both build, to the same effect
        if not self._lock.acquire(blocking=False):  # a signal's handler would wait for itself
            return arrays
        try:
            self.held -= self._bytes(self._items.pop(key, ()))
            if self._bytes(arrays) <= self.budget:
                self._items[key] = arrays
                self.held += self._bytes(arrays)
            while self.held > self.budget:
                self.held -= self._bytes(self._items.popitem(last=False)[1])
        finally:
            self._lock.release()
        return arrays

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._items.clear()
            self.held = 0

    @staticmethod
    def _bytes(arrays: tuple[Kept, ...]) -> int:
        return sum(array.nbytes for array in arrays)


cache = Cache(budget=1 << 28)


class Rooms(threading.local):
    """Memory that is lent again once nobody has it, up to a budget of bytes in each thread.

    Fresh memory is slow: the system clears every page when it is first written to, which takes
    longer than computing a projection into it.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._rooms: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []  # newest last

    def take(self, size: int) -> Tensor:
        """Lend ``size`` bytes until the last tensor that shares them has gone."""
        for place, (room, borrower) in enumerate(self._rooms):
            if room.nbytes == size and borrower() is None:
                del self._rooms[place]
                break
        else:
            room = np.frombuffer(_pages(size), np.uint8)
        lent = room.view()  # torch holds on to this object as long as it uses the memory
        self._rooms.append((room, weakref.ref(lent)))
        while sum(room.nbytes for room, _ in self._rooms) > self.budget:
            self._rooms.pop(0)
        return torch.from_numpy(lent)


def _pages(size: int) -> mmap.mmap:
    """Fresh memory from the system itself, which leaves no holes among what malloc keeps."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # on Windows
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a fork's are its own
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel that has none
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


rooms = Rooms(budget=1 << 26)
