"""The request to stop at the next safe point, where everything can be saved."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from subspan.errors import Stopped

LOOK_EVERY = 0.5  # seconds


class Stop:
    """The one request to stop of a process: by SIGINT, by SIGTERM, or from elsewhere.

    As a context in the main thread it takes both signals: the first is the request, the second
    raises :class:`Stopped` between any two lines of the program. Contexts may be nested. Other
    threads cannot take signals.

    Args:
        on_signal: called at the first signal.
        elsewhere: whether something else asks for a stop; it is called twice a second at most.

    Attributes:
        signal: the number of the first signal, 0 before.
    """

    def __init__(
        self,
        on_signal: Callable[[], None] = lambda: None,
        elsewhere: Callable[[], bool] = lambda: False,
    ) -> None:
        self.signal = 0
        self._on_signal, self._elsewhere = on_signal, elsewhere
        self._asked, self._due = False, 0.0
        self._handlers: list[list[tuple[int, Any]]] = []  # to restore, for each nested context

    def __enter__(self) -> Stop:
        in_main = threading.current_thread() is threading.main_thread()
        # What is no handler of Python's (None) could not be given back.
        ours = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not None]
        numbers = ours if in_main else ()
        self._handlers.append([(n, signal.signal(n, self._receive)) for n in numbers])
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.pop():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether to save and stop now. Once it is true it stays so."""
        now = time.monotonic()
        if not self._asked and now >= self._due:
            self._due = now + LOOK_EVERY
            self._asked = self._elsewhere()
        return self._asked or bool(self.signal)

    def error(self, words: str) -> Stopped:
        """Make the exception to raise when all is saved; its message begins with "stopped"."""
        return Stopped(f"stopped {words}".rstrip(), self.signal or signal.SIGTERM)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise Stopped("stopped at once", number)
        self.signal = number
        self._on_signal()
