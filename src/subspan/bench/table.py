"""The table of a benchmark: every row as multiples of what it is held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subspan.bench import PARTS
from subspan.bench.candidates import DENSE
from subspan.report.tables import NONE, Table
from subspan.training.records import grouped

_KEYS = {  # by which the rows of a part belong together
    "products": ("out_dim", "in_dim"),
    "memory": ("out_dim", "in_dim"),
    "steps": ("net",),
    "optimizers": ("net",),
    "lowrank": ("width",),
    "sums": ("what",),
    "laboratory": ("net", "method"),
    "blocks": ("batch_size", "allocator"),
    "transformer": ("dtype",),
}
_WORDS = {
    "forward": "P w",
    "backward": "Pᵀ g",
    "step": "a training step",
    "adaptive": "a step, ranks may change",
    "inference": "inference",
    "peak_bytes": "peak memory",
}


def of_bench(record: Mapping[str, Any]) -> Table:
    """What a benchmark measured, as multiples of what it is held against.

    Args:
        record: of ``bench.json``.
    """
    groups = [
        (part, rows) for part in PARTS for _, rows in grouped(record.get(part, ()), *_KEYS[part])
    ]
    found = [key for key in _WORDS if any(key in row for _, rows in groups for row in rows)]
    lines = []
    for part, rows in groups:
        base = next((row for row in rows if row.get("projection") == DENSE), rows[0])
        for row in rows:
            # A step whose ranks may change is held against the dense one, which has no ranks.
            ratios = [_ratio(row, base, key, "step" if key == "adaptive" else key) for key in found]
            lines.append((part, _name(row), *ratios))
    apart = len({part for part, _ in groups}) > 1
    columns = ("part", "what", *(f"{_WORDS[key]}, ×" for key in found))
    return Table(columns[not apart :], [line[not apart :] for line in lines], words=1 + apart)


def _name(row: Mapping[str, Any]) -> str:
    if "projection" in row:
        return ", ".join(str(row[key]) for key in ("projection", "method") if key in row)
    return f"rank {row['rank']:,}" if row["rank"] else "dense"


def _ratio(row: Mapping[str, Any], base: Mapping[str, Any], key: str, of: str) -> str:
    if key not in row or of not in base:
        return NONE
    ours, theirs = (x["median"] if isinstance(x, dict) else x for x in (row[key], base[of]))
    return f"{ours / theirs:.3g}"
