"""Many runs: methods × dims × learning rates × seeds, in parallel, resumed run by run.

At every point (method, dim) the learning rate is chosen by the validation score of seed 0; the
other seeds run at that rate. The baseline is a point like the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from subspan.errors import SubspanError
from subspan.files import readable
from subspan.sweeps import backends
from subspan.sweeps.intrinsic import IntrinsicDimension, has_shares, intrinsic_dimension
from subspan.sweeps.job import Job, Outcome
from subspan.sweeps.plan import RunPlan, carry_out
from subspan.sweeps.result import Failure, PointRecord, Provenance, Published, SweepRecord
from subspan.training import records, trackers
from subspan.training.config import Run, Sweep, Training
from subspan.training.machine import versions
from subspan.training.methods import method
from subspan.training.prepare import complete, rehearse
from subspan.training.records import CompleteRun
from subspan.training.score import ACCURACY, Score


@dataclass
class Point:
    """One method at one value of its axis, and the runs that are done there.

    Or a smaller network, all of whose weights are trained.
    """

    method: str
    label: str
    options: dict[str, Any]
    lrs: tuple[float, ...]
    small: str = ""
    done: dict[tuple[float, int], CompleteRun] = field(default_factory=dict)

    def job(self, sweep: Sweep, lr: float, seed: int) -> Job:
        """Return the run with this learning rate and seed."""
        at = f"-{self.label}" if self.label else ""
        net = f"{readable(self.small)}-" if self.small else ""
        name = f"{net}{self.method}{at}-lr{lr:g}-seed{seed}"
        options = self.options
        if sweep.processes > 1:  # as the command line of each of them will read it
            options = {k: int(v) if str(v).isdecimal() else v for k, v in options.items()}
        return Job(name, Run(self.training(sweep), self.method, options, lr, seed))

    def training(self, sweep: Sweep) -> Training:
        """Return the sweep's training, with the smaller network if this point has one."""
        return replace(sweep.training, net=self.small) if self.small else sweep.training

    def best_lr(self) -> float | None:
        """Choose the learning rate with the best validation score of seed 0, the first of equals.

        None if no run succeeded.
        """
        best = None
        for lr in self.lrs:
            found = self.done.get((lr, 0))
            if found and (
                best is None or found.score.better(found.val_score, self.done[best, 0].val_score)
            ):
                best = lr
        return best


@dataclass
class Grid(RunPlan):
    """The runs of a sweep: those of the first seed at all rates, then the others at the best."""

    config: Sweep
    points: list[Point]
    experiment: Provenance | None = None
    published: Sequence[Published] = ()
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.training, self.processes = self.config.training, self.config.processes
        self.total = total_runs(self.config)
        self._where: dict[str, tuple[Point, float, int]] = {}

    def stages(self) -> Iterator[list[Job]]:
        """Yield the jobs of the first seed, then those of others."""
        for stage in _stages(self.config, self.points):
            self._where = {job.name: (point, lr, seed) for job, point, lr, seed in stage}
            yield [job for job, *_ in stage]

    def take(self, outcome: Outcome) -> None:
        """Keep the record of a run, or why it failed."""
        point, lr, seed = self._where[outcome.job.name]
        if outcome.record is not None:
            point.done[lr, seed] = outcome.record
        else:
            self.failed[outcome.job.name] = outcome.error

    def done(self) -> int:
        """Count the runs that are complete."""
        return sum(len(point.done) for point in self.points)

    def result(self, status: str) -> SweepRecord:
        """Make the record of the runs that have ended by now."""
        found = _result(self.config, self.points, self.failed, status)
        return replace(found, experiment=self.experiment, published=list(self.published))


def sweep(
    config: Sweep,
    out: Path,
    *,
    jobs: int = -1,
    overwrite: bool = False,
    on_run: Callable[[Outcome, int], None] | None = None,
    experiment: Provenance | None = None,
    published: Sequence[Published] = (),
    backend: str = "loky",
    ray_address: str | None = None,
    say: Callable[[str], None] = lambda what: None,
    log: Sequence[str] = (),
    checked: bool = False,
) -> SweepRecord:
    """Run everything that is not complete in ``out``; bring ``sweep.json`` up to date as runs end.

    Several sweeps of one configuration may share a folder, at once, and divide the runs.

    Args:
        config: what to run.
        out: output folder; runs are in ``out/runs``.
        jobs: as of :func:`~subspan.sweeps.plan.carry_out`, as are the others below.
        overwrite: as there.
        on_run: as there.
        experiment: the published one that this repeats, for ``sweep.json``.
        published: curves to hold it against, likewise.
        backend: as there.
        ray_address: as there.
        say: as there.
        log: as there.
        checked: whether :func:`check` has been called.

    Returns:
        What ``sweep.json`` says.

    Raises:
        SubspanError: for a configuration that cannot be run, with nothing written. A run that
            fails is listed in the result, and the others go on.
        Stopped: after SIGINT or SIGTERM, when the runs under way have saved where they are. A
            second signal does not wait for that.
        OSError: if the disk is full, likewise.
    """
    if not checked:
        check(config, jobs=jobs, backend=backend, ray_address=ray_address, log=log)
    return carry_out(
        Grid(config, _points(config), experiment, published),
        out,
        jobs=jobs,
        overwrite=overwrite,
        on_run=on_run,
        backend=backend,
        ray_address=ray_address,
        say=say,
        log=log,
    )


def _stages(config: Sweep, points: list[Point]) -> Iterator[list[tuple[Job, Point, float, int]]]:
    """Yield the jobs of the first seed at all rates, then those of others at the best.

    Points with many coordinates take longest: begin with them, so that none is left for the end.
    """
    first = [(point.job(config, lr, 0), point, lr, 0) for point in points for lr in point.lrs]
    yield first[::-1]
    yield [
        (point.job(config, lr, seed), point, lr, seed)
        for point in points
        for seed in range(1, config.seeds)
        if (lr := point.best_lr()) is not None
    ]


def total_runs(config: Sweep) -> int:
    """Count the runs of a sweep if none fails."""
    points = _points(config)
    return sum(len(point.lrs) for point in points) + len(points) * (config.seeds - 1)


def _points(config: Sweep) -> list[Point]:
    """List the baseline first, then every method at every value of its axis."""
    points = []
    names = [config.baseline] if config.baseline else []
    for name in [*names, *(m for m in config.methods if m != config.baseline)]:
        how = method(name)
        own = {option.name for option in how.options}
        options = {key: value for key, value in config.options.items() if key in own}
        for value in [""] if how.axis is None else config.dims_of(name):
            there = complete(options, how, config.training) | how.at(value)
            lrs = config.lrs_of(name) or how.tried_rates(there)
            points.append(Point(name, f"{how.axis or ''}{value}", there, lrs))
    for net in config.small:
        lrs = config.baseline_lrs or method("full").tried_rates({})
        points.append(Point("full", "", {}, lrs, small=net))
    return points


def check(
    config: Sweep,
    *,
    jobs: int = -1,
    backend: str = "loky",
    ray_address: str | None = None,
    log: Sequence[str] = (),
) -> None:
    """Refuse all that can be refused before anything runs.

    Args, and what is raised: as of :func:`sweep`.
    """
    backends.check(backend, ray_address, jobs)
    trackers.check(log)
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
        ready = rehearse(point.job(config, point.lrs[0], 0).run, config.processes)
        if point.small:
            continue
        at = point.method, ready.method.counts(ready.model)["trainable_parameters"]
        if at in labels and not ready.method.adapts:
            raise SubspanError(
                f"{labels[at]} and {point.label} are one point of the curve of {point.method}, "
                f"{at[1]} numbers trained: leave one out"
            )
        labels[at] = point.label


def _result(
    config: Sweep, points: list[Point], failed: Mapping[str, str], status: str
) -> SweepRecord:
    """Make the sweep's record of the runs that have ended by now."""
    rows = [row for point in points if (row := _row(point)) is not None]
    baseline = next((row for row in rows if row.method == config.baseline and not row.small), None)
    rows = [row for row in rows if row is not baseline]
    some = next((record for point in points for record in point.done.values()), None)
    score = some.score if some else ACCURACY
    return SweepRecord(
        status=status,
        config=records.plain(config.as_dict()),
        score=score,
        baseline=baseline,
        rows=rows,
        d_int=_intrinsic(config, rows, baseline, score),
        failed=[Failure(name, error) for name, error in sorted(failed.items())],
        versions=versions(),
        device=some.device if some else "",
    )


def _row(point: Point) -> PointRecord | None:
    """Make the record of a point from its seeds at the chosen learning rate; None without any."""
    lr = point.best_lr()
    if lr is None:
        return None
    done = sorted(point.done.items())
    label = point.label.removeprefix(method(point.method).axis or "") or point.method
    return PointRecord.from_runs(
        [record for (rate, _), record in done if rate == lr],
        point.small or label,
        small=point.small,
        tried_lrs={f"{rate:g}": record.val_score for (rate, seed), record in done if seed == 0},
    )


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
