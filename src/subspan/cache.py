"""What is worth keeping between calls."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
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
        """The arrays under ``key``, built at the first call and after they were dropped."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)  # newest last
                return self._items[key]
        found = build()  # outside the lock: two threads may both build, to the same effect
        with self._lock:
            self._drop(key)
            if self._bytes(found) <= self.budget:
                self._items[key] = found
                self.held += self._bytes(found)
            while self.held > self.budget:
                self._drop(next(iter(self._items)))
        return found

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._items.clear()
            self.held = 0

    def _drop(self, key: Any) -> None:
        self.held -= self._bytes(self._items.pop(key, ()))

    @staticmethod
    def _bytes(arrays: tuple[Kept, ...]) -> int:
        return sum(array.nbytes for array in arrays)


cache = Cache(budget=1 << 28)
