"""What a folder holds: the record of a sweep or of a run."""

from __future__ import annotations

from pathlib import Path

from subspan.errors import SubspanError
from subspan.sweeps.result import SweepRecord
from subspan.training.records import RunRecord


def read(folder: Path) -> SweepRecord | RunRecord:
    """Read ``folder/sweep.json`` or, where there is none, ``folder/record.json``.

    Raises:
        SubspanError: neither is there; or the one found is damaged or of a later format.
    """
    found = SweepRecord.read(folder) or RunRecord.read(folder)
    if found is None:
        raise SubspanError(
            f"expected sweep.json or record.json in {str(folder)!r}, found neither: "
            "give the output folder of a sweep or of a run"
        )
    return found
