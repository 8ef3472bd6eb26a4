"""Many runs: methods × dims × learning rates × seeds, in parallel, resumed run by run.

At every point (method, dim) the learning rate is chosen by the validation score of seed 0; the
other seeds run at that rate. The baseline is a point like the others.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from subspan.errors import Stopped, SubspanError
from subspan.files import readable
from subspan.sweeps import backends
from subspan.sweeps.folder import SweepFolder
from subspan.sweeps.intrinsic import IntrinsicDimension, intrinsic_dimension
from subspan.sweeps.job import FULL, Job, Outcome
from subspan.sweeps.result import Failure, PointRecord, Provenance, Published, SweepRecord
from subspan.sweeps.runner import run_jobs
from subspan.sweeps.worker import Worker
from subspan.training import own, records, trackers
from subspan.training.config import Run, Sweep, Training
from subspan.training.machine import versions
from subspan.training.methods import method
from subspan.training.prepare import complete, prepare
from subspan.training.records import CompleteRun
from subspan.training.score import ACCURACY, Score
from subspan.training.stop import Stop


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
        jobs: runs at a time; -1 for one per core, or one in all where they take a GPU.
        overwrite: replace what another configuration left there.
        on_run: called with each final outcome and the number of runs still to do.
        experiment: the published one that this repeats, for ``sweep.json``.
        published: curves to hold it against, likewise.
        backend: "loky" for processes of this machine, "ray" for those of a Ray cluster, all of
            which must see ``out`` under this path.
        ray_address: of a cluster; None starts one on this machine.
        say: told in a sentence what else happens: a process died, another sweep is waited for.
        log: trackers that are told every epoch of every run.
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
    points = _points(config)
    failed: dict[str, str] = {}

    def result(status: str) -> SweepRecord:
        found = _result(config, points, failed, status)
        return replace(found, experiment=experiment, published=list(published))

    first = result("running")
    SweepRecord.claim(out, first.config, overwrite=overwrite)  # refuses before Ray is started
    folder = SweepFolder(out.absolute())
    worker = Worker(folder, overwrite, config.processes, tuple(log), own.remembered())

    def on_signal() -> None:
        folder.ask_to_stop()
        say("stopping: runs save where they are; a second signal does not wait for them")

    total = left = total_runs(config)
    try:
        with (
            backends.open_backend(backend, ray_address, jobs, config.training, total) as opened,
            folder.join(first, overwrite=overwrite, shown=out),
            Stop(on_signal) as stop,
        ):
            try:
                for stage in _stages(config, points):
                    where = {job.name: (point, lr, seed) for job, point, lr, seed in stage}
                    todo = [job for job, *_ in stage]
                    for outcome in run_jobs(todo, worker, opened, stop, say):
                        left -= 1
                        point, lr, seed = where[outcome.job.name]
                        if outcome.record is not None:
                            point.done[lr, seed] = outcome.record
                        else:
                            failed[outcome.job.name] = outcome.error
                        folder.write(result("running"))
                        if on_run:
                            on_run(outcome, left)
            except BaseException:
                with contextlib.suppress(OSError):
                    folder.write(result("interrupted"))
                raise
            found = result("complete")
            folder.write(found)
    except (Stopped, OSError) as error:
        done = f"{sum(len(point.done) for point in points)} of {total} runs are complete"
        again = "give the same command again"
        if isinstance(error, Stopped):
            raise Stopped(f"{error}, {done}; to go on, {again}", error.signal) from None
        if error.errno in FULL:
            words = f"{os.strerror(error.errno)}; {done} and kept: make room, and {again}"
            raise OSError(error.errno, words) from error
        raise
    return found


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
            lrs = config.lrs_of(name) or how.rates(there)
            points.append(Point(name, f"{how.axis or ''}{value}", there, lrs))
    for net in config.small:
        lrs = config.baseline_lrs or method("full").rates({})
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
        ready = prepare(point.job(config, point.lrs[0], 0).run)
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
    if baseline is None:
        return {}
    if not score.better(statistics.fmean(baseline.test_score), score.zero):
        return {}  # there is no way to take a share of
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
