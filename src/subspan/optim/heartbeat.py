"""Which ranks are lost when a collective fails: a workaround.

``torch.distributed`` raises at one rank after another when a process dies, and none of the errors
says which process it was. Each rank therefore has a heartbeat, a key in the store through which all
have met, that stops only with its process.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import weakref
from typing import Any

import torch.distributed as dist

BEAT = 1.0  # seconds
LOST = "subspan/lost"  # the key in the store for the list of lost ranks


class HeartBeat:
    """A thread that writes the time to the store every second, as long as this rank lives.

    The heartbeat continues while the rank is blocked in a collective, so that a rank that fails
    because of another one is not reported as lost.
    """

    def __init__(self, rank: int) -> None:
        self._store = dist.distributed_c10d._get_default_store()
        stop = threading.Event()
        thread = threading.Thread(target=_beat, args=(self._store, _key(rank), stop), daemon=True)
        thread.start()
        # The thread must end before the interpreter does, whose functions it calls.
        weakref.finalize(self, _end, stop, thread)

    def stopped(self, world: int) -> list[int]:
        """Return the ranks without a heartbeat; none where the store itself is lost.

        The first rank to detect a failure stores the list: later ones would also see ranks that
        have ended because of that failure.
        """
        with contextlib.suppress(Exception):  # the store ends with the process that holds it
            if not self._store.check([LOST]):
                before = self._read(world)
                time.sleep(3 * BEAT)
                after = self._read(world)
                lost = [rank for rank in range(world) if before[rank] == after[rank]]
                if not self._store.check([LOST]):
                    self._store.set(LOST, json.dumps(lost))
            return list(json.loads(self._store.get(LOST)))
        return []

    def _read(self, world: int) -> list[bytes]:
        """Return the last beat of every rank; an empty one where there was none."""
        keys = [_key(rank) for rank in range(world)]
        return [self._store.get(key) if self._store.check([key]) else b"" for key in keys]


def _key(rank: int) -> str:
    return f"subspan/pulse/{rank}"


def _beat(store: Any, key: str, stop: threading.Event) -> None:
    with contextlib.suppress(Exception):  # the store is gone, and this process is about to end
        while True:
            store.set(key, str(time.time_ns()))
            if stop.wait(BEAT):
                return


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    thread.join(timeout=5)
