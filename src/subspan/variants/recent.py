"""A store of what was made for the latest uses, kept for the next."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from subspan.subspace.variant import Variant
from subspan.variants.stored import StoredVariant

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
