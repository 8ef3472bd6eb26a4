"""The table of an experiment: published and measured side by side, all parts in one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from subspan.report.curves import axis_name
from subspan.report.page import NONE, mean, shown
from subspan.sweeps.result import PointRecord, Published, SweepRecord
from subspan.training.score import ACCURACY, Score


@dataclass(frozen=True)
class Table:
    """Names of columns, and rows of as many cells; the first columns are words, not figures."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int


def of_sweeps(parts: Mapping[str, SweepRecord], *, timed: bool = False) -> Table:
    """Make the table of an experiment's sweeps, by part: each result beside the published one.

    Columns in which nothing would stand are left out, and those of times and memory, unless the
    experiment is ``timed``: they are a result then.
    """
    points = [row for sweep in parts.values() for row in sweep.points]
    sources = [source.label for sweep in parts.values() for source in sweep.published]
    one = len(set(sources)) == 1
    score = next(iter(parts.values())).score  # parts are judged alike
    unit = ", %" if score == ACCURACY else f", {score.name}{score.unit}"
    lines = [
        {"part": part} | cells
        for part, sweep in parts.items()
        for cells in (*_measured(sweep, one), *_only_published(sweep, one))
    ]
    wanted = {
        "part": any(parts),
        "method": True,
        "at": any(line["at"] for line in lines),
        "numbers trained": True,
        "and of the head": any(row.head_parameters for row in points),
        "measured": True,
        "seeds": True,
        "published": bool(sources),
        "ms per step": timed,
        "memory, MB": timed,
        "bytes sent per step": any(row.bytes_sent for row in points),
    }
    columns = [name for name in wanted if wanted[name]]
    heads = {
        "measured": f"measured{unit}",
        "published": (sources[0] if one else "published") + unit,
    }
    return Table(
        tuple(heads.get(name, name) for name in columns),
        tuple(tuple(line.get(name, NONE) for name in columns) for line in lines),
        words=sum(name in ("part", "method", "at") for name in columns),
    )


def _measured(sweep: SweepRecord, one: bool) -> Iterator[dict[str, str]]:
    """Yield the cells of measured rows, without the part."""
    for row in sweep.points:
        own = row.trainable_parameters - row.head_parameters
        yield {
            "method": row.method,
            "at": _at(row),
            "numbers trained": f"{own if row is sweep.baseline else row.dim:,}",
            "and of the head": f"{row.head_parameters:,}",
            "measured": shown(row.test_score, sweep.score),
            "seeds": str(len(row.test_score)),
            "published": "; ".join(dict.fromkeys(_beside(row, sweep, one))) or NONE,
            "ms per step": mean(row.seconds_per_step, 1e3),
            "memory, MB": mean(row.peak_memory_bytes, 1e-6),
            "bytes sent per step": mean(row.bytes_sent),
        }


def _only_published(sweep: SweepRecord, one: bool) -> Iterator[dict[str, str]]:
    """Yield the cells of published points that were not measured here."""
    for source in sweep.published:
        here = {source.place(row) for row in sweep.rows} - {None}
        if not here:
            continue  # it belongs to another part
        for place, (at, accuracy) in enumerate(source.points):
            if at not in here:
                yield {
                    "method": source.method or "",
                    "at": source.labels[place] if source.labels else "",
                    "numbers trained": f"{source.dims[place]:,}" if source.dims else NONE,
                    "published": _published(accuracy, source, sweep.score, one),
                }


def _at(row: PointRecord) -> str:
    """Return the value of the method's axis, where it says more than the count of numbers does."""
    axis = axis_name(row.method)
    told = row.label not in ("", row.method, str(row.dim))
    return f"{axis} = {row.label}" if axis and told else ""


def _beside(row: PointRecord, sweep: SweepRecord, one: bool) -> Iterator[str]:
    """Yield the published scores that a row is to be compared with."""
    for source, dim, score in sweep.published_for(row):
        there = "" if dim in (None, row.dim) else f" at {dim:,}"
        # Sources of one paper share a baseline, which stands there once, without any of them.
        yield _published(score, source, sweep.score, one or row is sweep.baseline, there)


def _published(value: float, source: Published, score: Score, one: bool, at: str = "") -> str:
    whose = "" if one else f" ({source.label})"
    return f"{shown([value], score)}{at}{whose}"
