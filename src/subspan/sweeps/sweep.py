"""Many runs: methods × dims × learning rates × seeds, in parallel, resumed run by run.

At every point (method, dim) the learning rate is chosen by the validation score of seed 0; the
other seeds run at that rate. The baseline is a point like the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

from subspan.errors import SubspanError
from subspan.sweeps.job import Job
from subspan.sweeps.plan import RunPlan, carry_out, dimension_of
from subspan.sweeps.point import Point
from subspan.sweeps.result import Provenance, Published, SweepRecord
from subspan.sweeps.running import Running
from subspan.training.config import Sweep
from subspan.training.methods import method
from subspan.training.prepare import complete_options, rehearse
from subspan.training.schema import fitting


class Grid(RunPlan):
    """The runs of a sweep: those of the first seed at all rates, then the others at the best.

    The record names the published experiment that this repeats, and the curves to compare with.
    """

    def __init__(
        self,
        config: Sweep,
        experiment: Provenance | None = None,
        published: Sequence[Published] = (),
    ) -> None:
        points = _points(config)
        later = len(points) * (config.seeds - 1)
        total = sum(len(point.lrs) for point in points) + later
        super().__init__(config.training, points, total, config.processes)
        self.config, self.experiment, self.published = config, experiment, published

    def stages(self) -> Iterator[list[Job]]:
        """Yield the jobs of the first seed at all rates, then those of others at the best.

        Points with many coordinates take longest: begin with them, so that none is left for the
        end.
        """
        points, later = self.points, range(1, self.config.seeds)
        yield self.jobs([(point, lr, 0) for point in points for lr in point.lrs][::-1])
        best = [(point, lr) for point in points if (lr := point.best_lr()) is not None]
        if best and later:
            self.check_samples(best[0][0])
        yield self.jobs([(point, lr, seed) for point, lr in best for seed in later])

    def result(self, status: str) -> SweepRecord:
        """Make the record of the runs that have ended by now."""
        config, rows = self.config, [row for point in self.points if (row := point.record())]
        baseline = next((r for r in rows if r.method == config.baseline and not r.small), None)
        rows = [row for row in rows if row is not baseline]
        d_int = {}
        for name in config.methods:
            how = method(name)
            own = [row for row in rows if row.method == name and how.axis and not how.adapts]
            if dimension := dimension_of(own, baseline, config.threshold, self.score):
                d_int[name] = dimension
        found = self.make_record(status, config.as_dict(), baseline, rows, d_int)
        return replace(found, experiment=self.experiment, published=list(self.published))


def sweep(
    config: Sweep,
    out: str | os.PathLike[str],
    running: Running | None = None,
    *,
    experiment: Provenance | None = None,
    published: Sequence[Published] = (),
) -> SweepRecord:
    """Run everything that is not complete in ``out``; bring ``sweep.json`` up to date as runs end.

    Several sweeps of one configuration may share a folder, at once, and divide the runs.

    Args:
        config: what to run.
        out: output folder; runs are in ``out/runs``.
        running: how the runs are carried out; by default one per core, in silence.
        experiment: the published one that this repeats, for ``sweep.json``.
        published: curves to hold it against, likewise.

    Returns:
        What ``sweep.json`` says.

    Raises:
        SubspanError: for a configuration that cannot be run, with nothing written. A run that
            fails is listed in the result, and the others go on.
        Stopped: after SIGINT or SIGTERM, when the runs under way have saved where they are. A
            second signal does not wait for that.
        OSError: if the disk is full, likewise.
    """
    check(config)
    return carry_out(Grid(config, experiment, published), out, running or Running())


def total_runs(config: Sweep) -> int:
    """Count the runs of a sweep if none fails."""
    return Grid(config).total


def _points(config: Sweep) -> list[Point]:
    """List the baseline, then every method at every value of its axis, then smaller networks."""
    points, config = [], fitting(Sweep, config, "config")
    names = [config.baseline] if config.baseline else []
    for name in [*names, *(m for m in config.methods if m != config.baseline)]:
        how = method(name)
        own = {option.name for option in how.options}
        options = {key: value for key, value in config.options.items() if key in own}
        for value in [""] if how.axis is None else config.dims_of(name):
            there = complete_options(options, how, config.training) | how.at(value)
            lrs = config.lrs_of(name) or how.tried_rates(there)
            if config.processes > 1:  # as the command line of each of them will read it
                there = {k: int(v) if str(v).isdecimal() else v for k, v in there.items()}
            points.append(Point(config.training, name, f"{how.axis or ''}{value}", there, lrs))
    for net in config.small:
        lrs = config.baseline_lrs or method("full").tried_rates({})
        points.append(Point(replace(config.training, net=net), "full", "", {}, lrs, small=net))
    return points


def check(config: Sweep) -> None:
    """Refuse all that can be refused before anything runs."""
    points = _points(config)
    if config.baseline and (axis := method(config.baseline).axis):
        raise SubspanError(
            f"baseline {config.baseline!r} is varied by {axis} and has no one accuracy: use full, "
            "or null for none"
        )
    known = {option.name for name in config.methods for option in method(name).options}
    for option in config.options:
        if option not in known:
            for name in config.methods:
                method(name).check([option])
    labels: dict[tuple[str, int], str] = {}
    for point in points:
        ready = rehearse(point.job(point.lrs[0], 0).run, config.processes)
        if point.small:
            continue
        at = point.method, ready.method.counts(ready.model)["trainable_parameters"]
        if at in labels and not ready.method.adapts:
            raise SubspanError(
                f"{labels[at]} and {point.label} are one point of the curve of {point.method}, "
                f"{at[1]} numbers trained: leave one out"
            )
        labels[at] = point.label
