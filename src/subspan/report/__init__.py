"""Pictures and a page of a sweep or of a single run, from the JSON that it left on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from subspan.errors import SubspanError
from subspan.files import refuse_what_is_no_folder, write_atomically
from subspan.sweeps.result import SweepRecord
from subspan.training.records import RunRecord


def read(folder: str | os.PathLike[str]) -> SweepRecord | RunRecord:
    """Read ``folder/sweep.json`` or, where there is none, ``folder/record.json``.

    Raises:
        SubspanError: neither is there; or the one found is damaged or of a later format.
    """
    folder = Path(folder)
    found = SweepRecord.read(folder) or RunRecord.read(folder)
    if found is None:
        raise SubspanError(
            f"expected sweep.json or record.json in {str(folder)!r}, found neither: "
            "give the output folder of a sweep or of a run"
        )
    return found


def write(folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``curve.png``, ``curve.svg`` and ``report.html`` beside the record they show.

    A sweep (``sweep.json``) gives accuracy against d with the intrinsic dimensions marked, or at a
    single d what its methods reach and cost; a single run (``record.json``), where there is no
    sweep, its losses and accuracy by epoch.
    The page is self-contained: it loads nothing from anywhere.

    Args:
        folder: the output folder of the sweep or run.

    Returns:
        The files written.

    Raises:
        SubspanError: neither record is in the folder, or the one found is damaged or of a later
            format; nothing is written then.
    """
    folder = Path(folder)
    found = read(folder)
    from subspan.report import bars, page, pictures

    if isinstance(found, SweepRecord):
        figure = bars.figure(found) if bars.suits(found) else pictures.sweep_figure(found)
        contents = page.of_sweep(found, bars.CAPTION if bars.suits(found) else pictures.CAPTION)
    else:
        figure, contents = pictures.run_figure(found), page.of_run(found)
    svg = pictures.svg(figure)
    files = {
        folder / "curve.png": pictures.png(figure),
        folder / "curve.svg": svg,
        folder / "report.html": page.render(contents, svg).encode(),
    }
    for path, content in files.items():
        write_atomically(path, content)
    return list(files)


def write_comparison(out: Path, parts: Mapping[str, SweepRecord]) -> list[Path]:
    """Write ``comparison.png`` and ``comparison.svg``: the curves of networks, by their names."""
    from subspan.report import pictures

    return pictures.write(pictures.comparison_figure(parts), out, "comparison")


def write_pareto(
    folders: Sequence[str | os.PathLike[str]], data: Sequence[str], out: str | os.PathLike[str]
) -> list[Path]:
    """Write ``pareto.png``, ``pareto.svg`` and ``pareto.md``: accuracy against numbers and bytes.

    Args:
        folders: with records of sweeps and runs at any depth.
        data: sets of images, a row of the picture for each.
        out: a folder, made if it is not there.

    Returns:
        The files written.

    Raises:
        SubspanError: for a folder or data without a complete record, and a damaged record; nothing
            is written then.
    """
    from subspan.report import pareto, pareto_page, pictures
    from subspan.report.known import known_results
    from subspan.report.points import measured_points

    out, where = Path(out), list(map(Path, folders))
    refuse_what_is_no_folder(out)
    points, known = measured_points(where, data), known_results()
    figure, page = pareto.draw(points, known), pareto_page.text(where, out, points, known)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "pareto.md", page.encode())
    return [*pictures.write(figure, out, "pareto"), out / "pareto.md"]
