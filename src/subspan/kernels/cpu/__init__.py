"""Numba kernels for float32 vectors on the CPU, one file per family or group of families.

Sums run in an order that depends on sizes only: results do not change with the number of threads.

A forked process has none of its parent's threads. There GNU OpenMP waits for them for ever, and
Numba ends a process that would call it, even for one thread. The families' own torch code on one
thread needs none.

Where there is neither OpenMP nor TBB Numba has threads of its own ("workqueue"), and ends a process
in which two threads of Python call them at once. There products wait for each other.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import numba
import torch

from subspan.kernels import Kernel, collect

_turn = threading.RLock()


@functools.cache
def _has_turns() -> bool:
    """Return whether Numba's threads serve one thread of Python at a time."""
    wanted = torch.get_num_threads()
    numba.get_num_threads()  # starts them, which may reset the OpenMP that torch shares with them
    torch.set_num_threads(wanted)
    return bool(numba.threading_layer() == "workqueue")  # type: ignore[attr-defined]


def _in_turn(product: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(product)
    def run(*arguments: Any) -> Any:
        if not _has_turns():
            return product(*arguments)
        with _turn:
            return product(*arguments)

    return run


if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT is set")

KERNELS = {
    family: Kernel(*(product and _in_turn(product) for product in kernel))  # type: ignore[arg-type]
    for family, kernel in collect(sys.modules[__name__]).items()
}


def _do_without() -> None:
    """Leave a forked process to torch on one thread, as the workers of a DataLoader are anyway."""
    KERNELS.clear()
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # not on Windows, where no process is forked
    os.register_at_fork(after_in_child=_do_without)
