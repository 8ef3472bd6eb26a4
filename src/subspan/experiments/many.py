"""Several sweeps one after the other, each with a folder and a report of its own, and one picture.

The parts of a published experiment are such, and so are the networks of a comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from subspan import report
from subspan.errors import SubspanError
from subspan.sweeps import cluster
from subspan.sweeps.job import Outcome
from subspan.sweeps.plan import carry_out
from subspan.sweeps.result import Provenance, Published, SweepRecord
from subspan.sweeps.running import Running
from subspan.sweeps.sweep import Grid, check
from subspan.training.config import Sweep


def sweep_parts(
    parts: Mapping[str, Sweep],
    out: Path,
    running: Running,
    *,
    experiment: Provenance | None = None,
    published: Mapping[str, Sequence[Published]] | None = None,
    places: Mapping[str, str] | None = None,
) -> dict[str, SweepRecord]:
    """Run sweeps, those that are complete excepted, and write the report of each.

    Their folders in ``out`` have the names of the parts; "" is ``out`` itself. Runs that are left
    are counted over all parts, which share one cluster. The ``experiment`` is the published one
    whose parts these are, with the ``published`` curves to hold each against; errors call a part by
    its place, a file and a line perhaps, if ``places`` has one.

    Return what ``sweep.json`` says, by part; for errors see :func:`subspan.sweeps.sweep.sweep`.
    """
    for part, config in parts.items():  # all: what is wrong in the last one is not for hours later
        try:
            check(config)
        except SubspanError as error:
            place = (places or {}).get(part, part)
            raise SubspanError(f"{place}: {error}" if place else str(error)) from error
    results, curves = {}, published or {}
    grids = {
        part: Grid(config, experiment and replace(experiment, part=part), curves.get(part, ()))
        for part, config in parts.items()
    }
    left = sum(grid.total for grid in grids.values())
    on_ray = running.backend == "ray"
    with cluster.join(running.ray_address, running.jobs) if on_ray else nullcontext():
        for part, grid in grids.items():
            left -= grid.total

            def one_run(outcome: Outcome, left_in_part: int, later: int = left) -> None:
                running.on_run(outcome, left_in_part + later)

            results[part] = carry_out(grid, out / part, replace(running, on_run=one_run))
            report.write(out / part)
    return results
