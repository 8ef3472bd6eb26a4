"""The benchmark: what it costs to generate P instead of storing it, or to train with Adam.

Every number is measured in one run of one machine, in turns with what it is compared with, so that
the ratios mean something where the times do not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from subspan.bench.part import find_part, measured
from subspan.bench.settings import Bench as Bench
from subspan.bench.timing import copy_bandwidth
from subspan.errors import SubspanError
from subspan.training import machine, records
from subspan.training.schema import MisfitError, fitting, from_json

FILE = "bench.json"


def bench(
    settings: Bench,
    out: str | os.PathLike[str],
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
    config, out = asdict(fitting(Bench, settings, "settings")), Path(out)
    record = records.claim(out, FILE, config, overwrite=overwrite)
    if overwrite:
        record = None
    here = {
        "device": machine.device_name(settings.torch_device),
        "versions": machine.versions(),
    }
    if record is not None:
        _check(record, out / FILE)
        if record["status"] != "complete":
            _check_machine(record["machine"], here, out / FILE)
    out.mkdir(parents=True, exist_ok=True)
    if record is None:
        copied = copy_bandwidth(settings.torch_device, settings.seconds)
        record = {
            "format": records.FORMAT,
            "status": "running",
            "config": config,
            "machine": here | {"copy_bytes_per_second": copied},
        }
        done("copy bandwidth")
    for name in settings.parts:
        if name not in record:
            part = find_part(name)
            record[name] = part.checked(part.measure(settings, done), record["machine"])
            records.write_json(out / FILE, record)
    record["status"] = "complete"
    records.write_json(out / FILE, record)
    return record


def total(settings: Bench) -> int:
    """Return how often ``done`` is called if nothing was measured before."""
    return 1 + sum(find_part(name).count(settings) for name in settings.parts)


def _check(record: Mapping[str, Any], path: Path) -> None:
    """Refuse a damaged record, which cannot be shown."""
    try:
        from_json(_Machine, record.get("machine"), ("machine",))
        for part, rows in measured(record):
            part.checked(rows, record["machine"])
    except (SubspanError, MisfitError) as error:
        raise SubspanError(
            f"{path} is damaged ({error}): restore it, or give --overwrite to measure again"
        ) from None


def _check_machine(begun: Mapping[str, Any], here: Mapping[str, Any], path: Path) -> None:
    """Refuse to add what is measured here to what another machine, or other versions, measured."""
    old, new = ({"device": on["device"], **on.get("versions", {})} for on in (begun, here))
    both = old.keys() & new.keys()  # a package counts among the versions once it is imported
    if different := records.differences(*({name: on[name] for name in both} for on in (old, new))):
        raise SubspanError(
            f"{path} was begun elsewhere ({records.changes(different)}), and times of two places "
            "cannot be compared: finish it there, or give --overwrite to measure again"
        )


@dataclass(frozen=True)
class _Machine:
    device: str
    copy_bytes_per_second: float
