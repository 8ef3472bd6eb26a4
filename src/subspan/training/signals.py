"""SIGINT and SIGTERM as a request, which is met where all can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from subspan.errors import Stopped


class Signals:
    """Remembers the first SIGINT or SIGTERM; the second ends whatever is under way.

    As a context, in the main thread; in others, which cannot have handlers, it does nothing.

    Args:
        where: what the second interrupts, in its error.
        on_first: called with the first one's number, between any two lines of the program.
    """

    def __init__(self, where: str, on_first: Callable[[int], None] = lambda number: None) -> None:
        self.where, self.on_first = where, on_first
        self.seen = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.seen:
            raise Stopped(f"stopped {self.where}", number)
        self.seen = number
        self.on_first(number)
