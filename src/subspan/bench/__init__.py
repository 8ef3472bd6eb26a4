"""The benchmark: what it costs to generate P instead of storing it, or to train with Adam.

Every number is measured in one run of one machine, in turns with what it is compared with, so that
the ratios mean something where the times do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from subspan.bench.part import find_part
from subspan.bench.settings import Bench as Bench
from subspan.bench.timing import copy_bandwidth
from subspan.training import machine, records

FILE = "bench.json"


def bench(
    settings: Bench,
    out: Path,
    *,
    overwrite: bool = False,
    done: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure, and write ``bench.json`` after every part.

    Parts that a run of the same configuration has finished before are not repeated.

    Args:
        settings: what to measure.
        out: a folder.
        overwrite: measure again, and replace what is there.
        done: is called :func:`total` times with a line on what has just been measured.

    Returns:
        The content of ``bench.json``.

    Raises:
        SubspanError: for a folder of something else, or a measurement that fails.
    """
    config = asdict(settings)
    record = records.claim(out, FILE, config, overwrite=overwrite)
    if overwrite:
        record = None
    out.mkdir(parents=True, exist_ok=True)
    if record is None:
        record = {
            "format": records.FORMAT,
            "status": "running",
            "config": config,
            "machine": {
                "device": machine.device_name(settings.torch_device),
                "versions": machine.versions(),
                "copy_bytes_per_second": copy_bandwidth(settings.torch_device, settings.seconds),
            },
        }
        done("copy bandwidth")
    for name in settings.parts:
        if name not in record:
            record[name] = find_part(name).measure(settings, done)
            records.write_json(out / FILE, record)
    record["status"] = "complete"
    records.write_json(out / FILE, record)
    return record


def total(settings: Bench) -> int:
    """Return how often ``done`` is called if nothing was measured before."""
    return 1 + sum(find_part(name).count(settings) for name in settings.parts)
