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
from subspan.report.page import Column, Section, cell, or_none, section, template
from subspan.report.pareto import CAPTION, TITLES
from subspan.report.points import SIZES, MeasuredPoint, frontier
from subspan.training.score import ACCURACY


def text(
    folders: Sequence[Path],
    out: Path,
    points: Mapping[str, Sequence[MeasuredPoint]],
    known: Mapping[str, Sequence[KnownResult]],
) -> str:
    """Return the page as Markdown, with links relative to its folder ``out``.

    The records were looked for in ``folders``; what was measured, and what others reached, is given
    by the name of the data.
    """
    sections = [
        {
            "title": TITLES.get(data, data),
            "measured": _measured(own, out),
            "known": _known(known.get(data, ())),
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


def _measured(points: Sequence[MeasuredPoint], out: Path) -> Section:
    best = {size: frontier(points, size) for size in SIZES}
    columns: list[Column] = [
        ("numbers", lambda p: f"{p.numbers:,}"),
        ("bytes", lambda p: or_none("{:,}".format, p.bytes)),
        ("accuracy, %", lambda p: ACCURACY.summary([score / 100 for score in p.scores])),
        ("seeds", lambda p: str(len(p.scores))),
        ("method", lambda p: cell(_method(p))),
        ("network", lambda p: cell(p.net)),
        ("on the frontier of", lambda p: ", ".join(size for size in SIZES if p in best[size])),
        ("record", lambda p: _link(p.folder, out)),
    ]
    return section("Measured here", columns, points)


def _method(point: MeasuredPoint) -> str:
    """Name the method and its setting, where that says more than the numbers do."""
    axis = axis_name(point.method)
    told = point.label not in ("", str(point.numbers))
    return f"{point.method}, {axis} = {point.label}" if axis and told else point.method


def _link(folder: Path, out: Path) -> str:
    path = Path(os.path.relpath(folder, out.resolve())).as_posix()
    name = cell(path.removeprefix("../"))
    return f"[{name}]({quote(path)})"


def _known(works: Sequence[KnownResult]) -> Section:
    columns = ["numbers", "bytes", "accuracy, %", "work", "what it is", "source", "figures"]
    rows = [
        (
            or_none("{:,.0f}".format, numbers),
            or_none("{:,.0f}".format, count),
            f"{accuracy:.2f}",
            cell(work.name),
            cell(work.how),
            cell(work.source),
            "read at the source" if work.status == "read" else "quoted",
        )
        for work in works
        for accuracy, numbers, count in work.points
    ]
    return Section("Reached by others", columns, rows)
