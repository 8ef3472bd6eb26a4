"""The JSON files that runs and sweeps leave behind, and what they say of the machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from subspan import __version__
from subspan.errors import SubspanError
from subspan.files import write_atomically

FORMAT = 2
# Format 1 knew no score but accuracy.
_RENAMED = {
    "test_accuracy": "test_score",
    "val_accuracy": "val_score",
    "mean_test_accuracy": "mean_test_score",
}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record, whole or not at all; keys keep their order, numbers all their digits."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text.encode() + b"\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """A record, or None where there is none.

    Raises:
        SubspanError: if the file is no record, or one of a newer format.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise SubspanError(
            f"{path} is damaged or no record of subspan ({error!r}): restore it"
        ) from None
    if type(version) is not int or version < 1:
        raise SubspanError(
            f"{path} is damaged or no record of subspan (its format is {version!r}): restore it"
        )
    if version > FORMAT:
        raise SubspanError(
            f"{path} has format {version}; this version reads up to {FORMAT}: upgrade"
        )
    if not isinstance(content.get("config"), dict) or not isinstance(content.get("status"), str):
        raise SubspanError(
            f"{path} is damaged or no record of subspan (it lacks config or status): restore it"
        )
    return dict(upgraded(content))


def upgraded(content: Any) -> Any:
    """A record of an older format, in the words of this one."""
    if isinstance(content, list):
        return [upgraded(item) for item in content]
    if isinstance(content, dict):
        return {_RENAMED.get(key, key): upgraded(value) for key, value in content.items()}
    return content


def claim(
    folder: Path, file: str, config: Mapping[str, Any], *, overwrite: bool
) -> dict[str, Any] | None:
    """Look whether an output folder is free for a configuration.

    Args:
        folder: the output folder, there or not.
        file: name of the record in it.
        config: of what is about to run.
        overwrite: whether a record of another configuration, or a damaged one, may be replaced.

    Returns:
        The record of the same configuration, if there is one.

    Raises:
        SubspanError: if the folder is a file, or belongs to another configuration.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise SubspanError(f"--out {folder}: {path} is a file: give a folder")
    for other in {"record.json", "sweep.json", "bench.json"} - {file}:
        if (folder / other).exists():
            raise SubspanError(f"{folder} has a {other} of something else: give another --out")
    try:
        record = read_json(folder / file)
    except SubspanError as error:
        if not overwrite:
            raise SubspanError(f"{error}, or give --overwrite to replace it") from None
        return None
    if record is None:
        return None
    different = differences(record["config"], config)
    if different and not overwrite:
        raise SubspanError(
            f"{folder} belongs to another configuration ({changes(different)}): give another "
            "--out, or --overwrite"
        )
    return None if different else record


MEASURED = (
    "test_score",
    "val_score",
    "seconds_total",
    "seconds_per_step",
    "peak_memory_bytes",
    "checkpoint_bytes",
    "trainable_parameters",
    "stored_parameters",
    "weights",
)


def damage(record: Mapping[str, Any]) -> str | None:
    """What a complete run lacks or has as no number, as after an edit by hand; None if well."""
    for name in MEASURED:
        value = record.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return f"{name} must be a number, got {value!r}"
    for name, usual in (("notes", []), ("score", {})):  # which format 1 did not have
        if not isinstance(value := record.get(name, usual), type(usual)):
            return f"{name} must be a {type(usual).__name__}, got {value!r}"
    return None


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two configurations say differently; what one does not know it leaves at null."""
    a, b = plain(theirs), plain(ours)
    return {k: (a.get(k), b.get(k)) for k in sorted(a | b) if a.get(k) != b.get(k)}


def changes(different: Mapping[str, tuple[Any, Any]]) -> str:
    """:func:`differences` for people: "epochs 3 → 4, lr 0.1 → 0.3"."""
    return ", ".join(f"{name} {a!r} → {b!r}" for name, (a, b) in different.items())


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as a file gives it back: through JSON, where tuples are lists."""
    found: dict[str, Any] = json.loads(json.dumps(config))
    return found


def versions() -> dict[str, str]:
    """Versions of what a result may depend on, PyTorch's with its build, as in 2.13.0+cu130.

    The registry's PyTorch is called 2.13.0 in its metadata: what was imported knows better.
    """
    found = {"python": platform.python_version(), "subspan": __version__}
    found["torch"] = str(torch.__version__)
    for name in ("numpy", "numba", "safetensors", "accelerate", "datasets"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def device_name(device: torch.device) -> str:
    """What a run ran on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} of {psutil.cpu_count()} cores"


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def grouped(
    rows: Iterable[dict[str, Any]], *keys: str
) -> list[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    """Rows with the same values under some keys together, in the order of the first of each."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.items())


def bytes_sent() -> int:
    """What this process has written so far, to sockets and to files; where Linux counts it."""
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
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status")
        if status.is_file():
            for line in status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return psutil.Process().memory_info().rss
