"""Many runs: methods × dims × learning rates × seeds, in parallel, resumed run by run.

At every point (method, dim) the learning rate is chosen by the validation score of seed 0; the
other seeds run at that rate. The baseline is a point like the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from subspan.errors import SubspanError
from subspan.sweeps.intrinsic import IntrinsicDimension, has_shares, intrinsic_dimension
from subspan.sweeps.job import Job
from subspan.sweeps.plan import RunPlan, carry_out
from subspan.sweeps.point import Point
from subspan.sweeps.result import PointRecord, Provenance, Published, SweepRecord
from subspan.sweeps.running import Running
from subspan.training.config import Sweep
from subspan.training.methods import method
from subspan.training.prepare import complete_options, rehearse
from subspan.training.records import CompleteRun
from subspan.training.score import Score


@dataclass
class Grid(RunPlan):
    """The runs of a sweep: those of the first seed at all rates, then the others at the best.

    Args:
        config: what to run.
        experiment: the published one that this repeats, for the record.
        published: curves to hold it against, likewise.
        failed: why a run failed, by its name.
    """

    config: Sweep
    experiment: Provenance | None = None
    published: Sequence[Published] = ()
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.training, self.processes = self.config.training, self.config.processes
        self.points = _points(self.config)
        later = len(self.points) * (self.config.seeds - 1)
        self.total = sum(len(point.lrs) for point in self.points) + later
        self._point_of: dict[str, Point] = {}

    def stages(self) -> Iterator[list[Job]]:
        """Yield the jobs of the first seed at all rates, then those of others at the best.

        Points with many coordinates take longest: begin with them, so that none is left for the
        end.
        """
        points, later = self.points, range(1, self.config.seeds)
        yield self._jobs([(point, lr, 0) for point in points for lr in point.lrs][::-1])
        best = [(point, lr) for point in points if (lr := point.best_lr()) is not None]
        if best and later:
            self.check_samples(best[0][0])
        yield self._jobs([(point, lr, seed) for point, lr in best for seed in later])

    def _jobs(self, runs: Iterable[tuple[Point, float, int]]) -> list[Job]:
        jobs = []
        for point, lr, seed in runs:
            jobs.append(point.job(lr, seed))
            self._point_of[jobs[-1].name] = point
        return jobs

    def keep(self, job: Job, record: CompleteRun) -> None:
        """Keep a run's record."""
        self._point_of[job.name].keep(job.run, record)

    def records(self) -> Iterator[CompleteRun]:
        """Yield the records of all runs that are complete."""
        return (record for point in self.points for record in point.done.values())

    def result(self, status: str) -> SweepRecord:
        """Make the record of the runs that have ended by now."""
        config, rows = self.config, [row for point in self.points if (row := point.record())]
        baseline = next((r for r in rows if r.method == config.baseline and not r.small), None)
        rows = [row for row in rows if row is not baseline]
        d_int = _intrinsic(config, rows, baseline, self.score)
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
    points = []
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
    """Refuse all that can be refused before anything runs.

    Raises:
        SubspanError: for a configuration that cannot be run.
    """
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


def _intrinsic(
    config: Sweep, rows: list[PointRecord], baseline: PointRecord | None, score: Score
) -> dict[str, IntrinsicDimension]:
    """Return the intrinsic dimension by method, where there is a curve and a baseline."""
    if baseline is None or not has_shares(baseline.test_score, score):
        return {}
    found = {}
    for name in config.methods:
        how = method(name)
        own = [row for row in rows if row.method == name and how.axis and not how.adapts]
        if own:
            found[name] = intrinsic_dimension(
                [row.dim for row in own],
                [row.test_score for row in own],
                baseline.test_score,
                threshold=config.threshold,
                score=score,
            )
    return found
