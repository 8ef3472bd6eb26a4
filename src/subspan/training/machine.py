"""The machine that a result was measured on: versions, device, memory, bytes that were sent."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import sys
from pathlib import Path

import psutil
import torch

from subspan import __version__


def versions() -> dict[str, str]:
    """Versions of what a result may depend on, PyTorch's with its build, as in 2.13.0+cu130.

    The registry's PyTorch is called 2.13.0 in its metadata: what was imported knows better.
    """
    found = {"python": platform.python_version(), "subspan": __version__}
    found["torch"] = str(torch.__version__)
    used = [name for name in ("transformers", "peft") if name in sys.modules]
    for name in ("numpy", "numba", "safetensors", "accelerate", "datasets", *used):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def device_name(device: torch.device) -> str:
    """Name the device in words, for the records."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} of {psutil.cpu_count()} cores"


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def bytes_sent() -> int:
    """Count the bytes that this process has written, to sockets and files; 0 if unknown."""
    file = Path("/proc/self/io")
    if not file.is_file():
        return 0
    return int(file.read_text().partition("wchar: ")[2].split()[0])


class PeakMemory:
    """Peak memory of this process since it was made, in bytes: of the GPU where there is one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):  # Linux starts the high-water mark anew
                Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        """Return the peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status")
        if status.is_file():
            for line in status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return psutil.Process().memory_info().rss
