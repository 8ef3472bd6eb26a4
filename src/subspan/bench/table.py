"""The table of a benchmark in the gallery: every row as multiples of what it is held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subspan.bench.part import measured
from subspan.report.bars import show_number
from subspan.report.page import or_none
from subspan.report.tables import Table


def of_bench(record: Mapping[str, Any]) -> Table:
    """Make one table of all parts of a benchmark, from the content of ``bench.json``."""
    found = measured(record)
    groups = [(part, some) for part, rows in found for some in part.groups(rows)]
    words = list(
        dict.fromkeys(
            quantity.words
            for part, rows in groups
            for quantity in part.quantities
            if any(quantity.key in row for row in rows)
        )
    )
    lines = []
    for part, rows in groups:
        for row in rows:
            ratios = {q.words: part.ratio(row, rows, q) for q in part.quantities}
            cells = [ratios.get(word) for word in words]
            shown = [or_none(show_number, cell) for cell in cells]
            lines.append((part.name, part.full_label(row), *shown))
    several = len(found) > 1
    columns = ("part", "what", *(f"{word}, ×" for word in words))
    first = 0 if several else 1
    return Table(columns[first:], [line[first:] for line in lines], words=1 + several)
