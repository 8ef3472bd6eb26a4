"""Several sweeps one after the other, each with a folder and a report of its own, and one picture.

The parts of a published experiment are such, and so are the networks of a comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from subspan import report
from subspan.errors import SubspanError
from subspan.sweeps import cluster
from subspan.sweeps.job import Outcome
from subspan.sweeps.plan import carry_out
from subspan.sweeps.result import Provenance, Published, SweepRecord
from subspan.sweeps.sweep import Grid, check, total_runs
from subspan.training.config import Sweep


def sweep_parts(
    parts: Mapping[str, Sweep],
    out: Path,
    *,
    jobs: int = -1,
    backend: str = "loky",
    ray_address: str | None = None,
    on_run: Callable[[Outcome, int], None] | None = None,
    experiment: Provenance | None = None,
    published: Mapping[str, Sequence[Published]] | None = None,
    places: Mapping[str, str] | None = None,
    log: Sequence[str] = (),
    **how: Any,
) -> dict[str, SweepRecord]:
    """Run sweeps, those that are complete excepted, and write the report of each.

    Args:
        parts: by the name of their folder in ``out``; "" is ``out`` itself.
        out: output folder.
        jobs: as of :func:`subspan.sweeps.sweep.sweep`.
        backend: likewise; parts share one cluster.
        ray_address: likewise.
        on_run: called after each run, with how many are left in all parts.
        experiment: the published one whose parts these are.
        published: curves to hold each part against.
        places: what errors call a part, where that is not its name: a file and a line, perhaps.
        log: as of :func:`subspan.sweeps.sweep.sweep`.
        how: the other arguments of :func:`subspan.sweeps.sweep.sweep`.

    Returns:
        What ``sweep.json`` says, by part.

    Raises:
        SubspanError: as :func:`subspan.sweeps.sweep.sweep`.
    """
    shared: dict[str, Any] = {"jobs": jobs, "backend": backend, "ray_address": ray_address}
    for part, config in parts.items():  # all: what is wrong in the last one is not for hours later
        try:
            check(config, **shared, log=log)
        except SubspanError as error:
            place = (places or {}).get(part, part)
            raise SubspanError(f"{place}: {error}" if place else str(error)) from error
    results = {}
    left = sum(map(total_runs, parts.values()))
    with cluster.join(ray_address, jobs) if backend == "ray" else nullcontext():
        for part, config in parts.items():
            left -= total_runs(config)

            def one_run(outcome: Outcome, left_in_part: int, later: int = left) -> None:
                if on_run:
                    on_run(outcome, left_in_part + later)

            told = experiment and replace(experiment, part=part)
            grid = Grid(config, told, (published or {}).get(part, ()))
            results[part] = carry_out(grid, out / part, on_run=one_run, log=log, **shared, **how)
            report.write(out / part)
    return results
