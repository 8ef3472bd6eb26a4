"""Numba kernels for float32 vectors on the CPU, one file per family or group of families.

Sums run in an order that depends on sizes only: results do not change with the number of threads.

A forked process has none of its parent's threads. There GNU OpenMP waits for them for ever, and
Numba ends a process that would call it, even for one thread. The families' own torch code on one
thread needs none.
"""

from __future__ import annotations

import os
import sys

import torch

from subspan.kernels import collect

KERNELS = collect(sys.modules[__name__])


def _do_without() -> None:
    """Leave a forked process to torch on one thread, as the workers of a DataLoader are anyway."""
    KERNELS.clear()
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # not on Windows, where no process is forked
    os.register_at_fork(after_in_child=_do_without)
