"""The picture of a benchmark: a panel for each table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from subspan.bench.part import measured
from subspan.report import pictures


def write(record: Mapping[str, Any], out: Path) -> list[Path]:
    """Write ``bench.png`` and ``bench.svg`` beside the record; returns the files."""
    return pictures.write(draw(record), out, "bench")


@pictures.styled
def draw(record: Mapping[str, Any]) -> Figure:
    """Draw all parts of a record, two panels in a row."""
    panels = [(part, some) for part, rows in measured(record) for some in part.groups(rows)]
    columns = min(2, max(1, len(panels)))
    lines = -(-max(1, len(panels)) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * lines), layout="constrained")
    for number, (part, rows) in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, number)
        axes.set_title(part.make_title(rows))
        part.draw(axes, rows)
    figure.suptitle(record["machine"]["device"], fontsize=6.5, color="0.4")
    return figure
