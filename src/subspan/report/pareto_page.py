"""The page of the Pareto picture: every point of it in a table, with the folder of its record."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from subspan.report.curves import axis_name
from subspan.report.known import KnownResult
from subspan.report.page import cell, or_none, template
from subspan.report.pareto import CAPTION, TITLES
from subspan.report.points import SIZES, MeasuredPoint, frontier
from subspan.report.tables import Table
from subspan.training.score import ACCURACY

MEASURED = (
    *("numbers", "bytes", "accuracy, %", "seeds"),
    *("method", "network", "on the frontier of", "record"),
)
KNOWN = ("numbers", "bytes", "accuracy, %", "work", "what it is", "source", "figures")


def text(
    folders: Sequence[Path],
    out: Path,
    points: Mapping[str, Sequence[MeasuredPoint]],
    known: Mapping[str, Sequence[KnownResult]],
) -> str:
    """Return the page as Markdown.

    Args:
        folders: where the records were looked for.
        out: the folder of the page; links are relative to it.
        points: what was measured, by the name of the data.
        known: what others reached, likewise.
    """
    sections = [
        {
            "title": TITLES.get(data, data),
            "measured": Table(MEASURED, _measured(own, out), words=0),
            "known": Table(KNOWN, _known(known.get(data, ())), words=0),
        }
        for data, own in points.items()
    ]
    content: dict[str, Any] = {
        "sections": sections,
        "command": _command(folders, out, points),
        "caption": CAPTION,
        "cell": cell,
    }
    return template("pareto.md", escape=False).render(content)


def _command(folders: Sequence[Path], out: Path, data: Mapping[str, Any]) -> str:
    """Return the command that makes the page, from the folder that holds all of its folders."""
    here = os.path.commonpath([path.resolve().parent for path in (*folders, out)])
    *places, there = (
        shlex.quote(os.path.relpath(path.resolve(), here)) for path in (*folders, out)
    )
    return f"subspan pareto {' '.join(places)} --data {shlex.quote(','.join(data))} --out {there}"


def _measured(points: Sequence[MeasuredPoint], out: Path) -> list[tuple[str, ...]]:
    best = {size: frontier(points, size) for size in SIZES}
    return [
        (
            f"{p.numbers:,}",
            or_none("{:,}".format, p.bytes),
            ACCURACY.summary([score / 100 for score in p.scores]),
            str(len(p.scores)),
            cell(_method(p)),
            cell(p.net),
            ", ".join(size for size in SIZES if p in best[size]),
            _link(p.folder, out),
        )
        for p in points
    ]


def _method(point: MeasuredPoint) -> str:
    """Name the method and its setting, where that says more than the numbers do."""
    axis = axis_name(point.method)
    told = point.label not in ("", str(point.numbers))
    return f"{point.method}, {axis} = {point.label}" if axis and told else point.method


def _link(folder: Path, out: Path) -> str:
    path = Path(os.path.relpath(folder, out.resolve())).as_posix()
    name = cell(path.removeprefix("../"))
    return f"[{name}]({quote(path)})"


def _known(works: Sequence[KnownResult]) -> list[tuple[str, ...]]:
    rows = [(work, point) for work in works for point in work.points]
    return [
        (
            or_none("{:,.0f}".format, numbers),
            or_none("{:,.0f}".format, count),
            f"{accuracy:.2f}",
            cell(work.name),
            cell(work.how),
            cell(work.source),
            "read at the source" if work.status == "read" else "quoted",
        )
        for work, (accuracy, numbers, count) in rows
    ]
