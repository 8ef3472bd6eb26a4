"""Runs that depend on the results of others, in stages, and the record of them all."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from subspan.errors import Stopped, SubspanError
from subspan.sweeps import backends
from subspan.sweeps.folder import SweepFolder
from subspan.sweeps.intrinsic import IntrinsicDimension, has_shares, intrinsic_dimension
from subspan.sweeps.job import FULL, Job, Outcome
from subspan.sweeps.point import Point
from subspan.sweeps.result import Failure, PointRecord, SweepRecord
from subspan.sweeps.runner import run_jobs
from subspan.sweeps.running import Running
from subspan.sweeps.worker import Worker
from subspan.training import own
from subspan.training.config import Training
from subspan.training.prepare import rehearse
from subspan.training.records import CompleteRun, plain
from subspan.training.schema import fitting
from subspan.training.score import ACCURACY, Score
from subspan.training.stop import Stop


class RunPlan(ABC):
    """Which runs there are, one stage after the other, and what is made of their records.

    Records of runs are kept at the points. The total is how many runs there are if none fails.
    """

    def __init__(
        self, training: Training, points: list[Point], total: int, processes: int = 1
    ) -> None:
        self.training, self.points = training, points
        self.total, self.processes = total, processes
        self.failed: dict[str, str] = {}  # why, by the names of runs
        self._point_of: dict[str, Point] = {}

    @abstractmethod
    def stages(self) -> Iterator[list[Job]]:
        """Yield runs that may be done side by side, once all before them have ended."""

    @abstractmethod
    def result(self, status: str) -> SweepRecord:
        """Make the record of the runs that have ended by now."""

    def jobs(self, runs: Iterable[tuple[Point, float, int]]) -> list[Job]:
        """Return the runs at some points, with these rates and seeds."""
        jobs = []
        for point, lr, seed in runs:
            jobs.append(point.job(lr, seed))
            self._point_of[jobs[-1].name] = point
        return jobs

    def records(self) -> Iterator[CompleteRun]:
        """Yield the records of all runs that are complete."""
        return (record for point in self.points for record in point.done.values())

    def take(self, outcome: Outcome) -> None:
        """Keep a run's record, or why it failed; refuse samples that its seed had not before."""
        if (record := outcome.record) is None:
            self.failed[outcome.job.name] = outcome.error
            return
        for other in self.records():
            known = None not in (other.digest, record.digest)  # older records do not say
            alike = all(other.config[key] == record.config[key] for key in ("net", "seed"))
            if known and alike and other.digest != record.digest:
                raise _other_samples(f"{outcome.job.name} was trained on other samples than runs")
        run = outcome.job.run
        self._point_of[outcome.job.name].done[run.lr, run.seed] = record

    def check_samples(self, point: Point) -> None:
        """Refuse seeds on other samples than those of the first, which is done at a point.

        Runs of two seeds cannot be compared: each has a validation part of its own.
        """
        (lr, seed), record = next(iter(point.done.items()))
        if record.digest not in (None, rehearse(point.job(lr, seed).run, self.processes).digest):
            raise _other_samples("the samples are others now than those of runs")

    @property
    def score(self) -> Score:
        """The score by which the runs are judged; accuracy, as long as none is complete."""
        return next((record.score for record in self.records()), ACCURACY)

    def make_record(
        self,
        status: str,
        config: dict[str, Any],
        baseline: PointRecord | None,
        rows: list[PointRecord],
        d_int: dict[str, IntrinsicDimension],
    ) -> SweepRecord:
        """Put together what :meth:`result` returns: its arguments, and what all plans have."""
        done = list(self.records())
        names = {name: None for record in done for name in record.versions}
        return SweepRecord(
            status=status,
            config=plain(config),
            score=self.score,
            baseline=baseline,
            rows=rows,
            d_int=d_int,
            failed=[Failure(name, error) for name, error in sorted(self.failed.items())],
            versions={
                name: _joined(record.versions.get(name) for record in done) for name in names
            },
            device=_joined(record.device for record in done),
        )


def dimension_of(
    rows: Sequence[PointRecord],
    baseline: PointRecord | None,
    threshold: float,
    score: Score,
    *,
    paired: bool = False,
) -> IntrinsicDimension | None:
    """Return the intrinsic dimension of one method, where it has points and there is a baseline."""
    if not rows or baseline is None or not has_shares(baseline.test_score, score):
        return None
    return intrinsic_dimension(
        [row.dim for row in rows],
        [row.test_score for row in rows],
        baseline.test_score,
        threshold=threshold,
        score=score,
        paired=paired,
    )


def _joined(values: Iterable[str | None]) -> str:
    """Put what records of runs say, of one machine or of several, into one text."""
    return "; ".join(sorted({value for value in values if value}))


def _other_samples(what: str) -> SubspanError:
    return SubspanError(
        f"{what} before, as if the data had changed: remove the folders of the runs on data "
        "that are no more, or give another --out"
    )


def carry_out(plan: RunPlan, out: str | os.PathLike[str], running: Running) -> SweepRecord:
    """Run everything that is not complete in ``out``, as :func:`subspan.sweeps.sweep.sweep` does.

    Runs are in ``out/runs``; ``sweep.json`` is brought up to date as they end, and returned.
    """
    out, running = Path(out), fitting(Running, running, "running")
    first, overwrite, say = plan.result("running"), running.overwrite, running.say
    SweepRecord.claim(out, first.config, overwrite=overwrite)  # refuses before Ray is started
    folder = SweepFolder(out.absolute())
    worker = Worker(folder, overwrite, plan.processes, running.log, own.remembered())

    def on_signal() -> None:
        folder.ask_to_stop()
        say("stopping: runs save where they are; a second signal does not wait for them")

    total = left = plan.total
    try:
        with (
            backends.open_backend(running, plan.training, total) as backend,
            folder.join(first, overwrite=overwrite, shown=out),
            Stop(on_signal) as stop,
        ):
            try:
                for todo in plan.stages():
                    for outcome in run_jobs(todo, worker, backend, stop, say):
                        left -= 1
                        plan.take(outcome)
                        folder.write(plan.result("running"))
                        running.on_run(outcome, left)
            except BaseException:
                with contextlib.suppress(OSError):
                    folder.write(plan.result("interrupted"))
                raise
            found = plan.result("complete")
            folder.write(found)
    except (Stopped, OSError) as error:
        done = f"{len(list(plan.records()))} of {total} runs are complete"
        again = "give the same command again"
        if isinstance(error, Stopped):
            raise Stopped(f"{error}, {done}; to go on, {again}", error.signal) from None
        if error.errno in FULL:
            words = f"{os.strerror(error.errno)}; {done} and kept: make room, and {again}"
            raise OSError(error.errno, words) from error
        raise
    return found
