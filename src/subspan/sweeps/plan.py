"""Runs that depend on the results of others, in stages, and the record of them all."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from subspan.errors import Stopped, SubspanError
from subspan.sweeps import backends
from subspan.sweeps.folder import SweepFolder
from subspan.sweeps.intrinsic import IntrinsicDimension
from subspan.sweeps.job import FULL, Job, Outcome
from subspan.sweeps.point import Point
from subspan.sweeps.result import Failure, PointRecord, SweepRecord
from subspan.sweeps.runner import run_jobs
from subspan.sweeps.running import Running
from subspan.sweeps.worker import Worker
from subspan.training import own
from subspan.training.config import Training
from subspan.training.machine import versions
from subspan.training.prepare import rehearse
from subspan.training.records import CompleteRun, plain
from subspan.training.score import ACCURACY, Score
from subspan.training.stop import Stop


class RunPlan(ABC):
    """Which runs there are, one stage after the other, and what is made of their records.

    Attributes:
        training: which devices the runs take.
        total: how many runs there are if none fails.
        failed: why a run failed, by its name.
        processes: of each run.
    """

    training: Training
    total: int
    failed: dict[str, str]
    processes: int = 1

    @abstractmethod
    def stages(self) -> Iterator[list[Job]]:
        """Yield runs that may be done side by side, once all before them have ended."""

    @abstractmethod
    def keep(self, job: Job, record: CompleteRun) -> None:
        """Keep a run's record."""

    @abstractmethod
    def records(self) -> Iterator[CompleteRun]:
        """Yield the records of all runs that are complete."""

    @abstractmethod
    def result(self, status: str) -> SweepRecord:
        """Make the record of the runs that have ended by now."""

    def take(self, outcome: Outcome) -> None:
        """Keep a run's record, or why it failed.

        Raises:
            SubspanError: if it was trained on other samples than another run with its seed.
        """
        if (record := outcome.record) is None:
            self.failed[outcome.job.name] = outcome.error
            return
        for other in self.records():
            known = None not in (other.digest, record.digest)  # older records do not say
            alike = all(other.config[key] == record.config[key] for key in ("net", "seed"))
            if known and alike and other.digest != record.digest:
                raise _other_samples(f"{outcome.job.name} was trained on other samples than runs")
        self.keep(outcome.job, record)

    def check_samples(self, point: Point) -> None:
        """Refuse seeds on other samples than those of the first, which is done at a point.

        Runs of two seeds cannot be compared: each has a validation part of its own.

        Raises:
            SubspanError: if the data are others now.
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
        return SweepRecord(
            status=status,
            config=plain(config),
            score=self.score,
            baseline=baseline,
            rows=rows,
            d_int=d_int,
            failed=[Failure(name, error) for name, error in sorted(self.failed.items())],
            versions=versions(),
            device=next((record.device for record in self.records()), ""),
        )


def _other_samples(what: str) -> SubspanError:
    return SubspanError(
        f"{what} before, as if the data had changed: remove the folders of the runs on data "
        "that are no more, or give another --out"
    )


def carry_out(plan: RunPlan, out: str | os.PathLike[str], running: Running) -> SweepRecord:
    """Run everything that is not complete in ``out``; bring ``sweep.json`` up to date as runs end.

    Args:
        plan: the runs.
        out: output folder; runs are in ``out/runs``.
        running: how they are carried out.

    Returns:
        What ``sweep.json`` says.

    Raises:
        SubspanError: if the folder is not free; nothing is written then.
        Stopped: after SIGINT or SIGTERM, when the runs under way have saved where they are. A
            second signal does not wait for that.
        OSError: if the disk is full, likewise.
    """
    out = Path(out)
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
