"""What is worth keeping between calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Cache:
    """Integers derived from a seed, kept between calls up to a budget of bytes, oldest out first.

    Only what is O(D) at most may go in; nothing of it is ever saved.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._items: dict[Any, tuple[Tensor, ...]] = {}

    def get(self, key: Any, build: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The tensors under ``key``, built at the first call and after they were dropped."""
        found = self._items.pop(key, None)
        if found is None:
            found = build()
            if self._bytes(found) > self.budget:
                return found
        self._items[key] = found  # newest last
        while sum(map(self._bytes, self._items.values())) > self.budget:
            del self._items[next(iter(self._items))]
        return found

    @staticmethod
    def _bytes(tensors: tuple[Tensor, ...]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)


cache = Cache(budget=1 << 28)
