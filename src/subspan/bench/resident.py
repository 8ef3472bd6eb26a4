"""Peak memory of steps, beyond what was there when they began: of the process, or of the GPU.

Two measures of the same thing. A thread looks at what is resident every two milliseconds while a
step runs, and misses what lives for less; the kernel's own high-water mark misses nothing, where
it can be set back (Linux).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from subspan.training.machine import PeakMemory

STATM = Path("/proc/self/statm")
PERIOD = 0.002  # seconds between two looks


def resident(device: torch.device) -> int:
    """Bytes of this process that are in memory now; on a GPU, those that its tensors take."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if STATM.is_file():
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return int(psutil.Process().memory_info().rss)


class Beyond:
    """The peak beyond what is resident when this is made, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.start = device, resident(device)
        self.kernels = PeakMemory(device)
        self.most = self.start

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look every two milliseconds from a thread, as long as the block runs."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(PERIOD):
                self.most = max(self.most, resident(self.device))

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.most = max(self.most, resident(self.device))

    @property
    def sampled(self) -> int:
        """The peak that the thread saw, in bytes."""
        return self.most - self.start

    @property
    def peak(self) -> int:
        """The peak that the kernel counted (on a GPU PyTorch), or the thread's if that is more."""
        return max(self.kernels.read(), self.most) - self.start
