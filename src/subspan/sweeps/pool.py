"""The processes that a sweep's runs are spread over, and what becomes of the runs if they die."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import joblib

from subspan.errors import Stopped, SubspanError
from subspan.sweeps.backends import Backend
from subspan.sweeps.claims import Claim
from subspan.sweeps.jobs import Job, Outcome, Pending, perform
from subspan.training.records import CompleteRun
from subspan.training.signals import Signals
from subspan.training.train import completed

PAUSE = 1.0  # seconds between looks at the runs of another sweep
KILLED = (
    "its process was killed twice, the second time with no other beside it, for want of memory "
    "perhaps: give the same command again with fewer --jobs, or make the run smaller"
)


@dataclass
class Pool:
    """Runs of a sweep, many at a time.

    Args:
        claim: of the sweep.
        backend: which processes, and how many at a time.
        overwrite: as of :func:`subspan.training.train.train`.
        processes: of each run.
        say: told what people should know besides outcomes.
        log: trackers of each run.
    """

    claim: Claim
    backend: Backend
    overwrite: bool
    processes: int
    say: Callable[[str], None]
    log: Sequence[str] = ()
    stopped_by: int = 0
    """The number of the signal that asked for the end."""

    def __post_init__(self) -> None:
        self._signals = Signals("at once", self._note)

    def __enter__(self) -> Pool:
        self._signals.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._signals.__exit__(*error)

    def _note(self, number: int) -> None:
        self._stop(number)
        self.say("stopping: runs save where they are; a second signal does not wait for them")

    def _stop(self, number: int) -> None:
        self.stopped_by = number
        self.claim.ask_to_stop()

    def outcomes(self, jobs: list[Job]) -> Iterator[Outcome]:
        """What comes of runs, as it comes.

        Those that are complete are not repeated. Those that another sweep has under way are left
        to it, and looked at again when nothing else is left. Those whose process died are tried
        once more, alone.

        Raises:
            Stopped: after a signal, when all runs have saved where they are.
            OSError: if the disk is full, likewise.
        """
        todo, elsewhere = list(jobs), list[Job]()
        suspects, killed = list[Job](), set[str]()
        waiting = deaths = 0
        while todo or suspects or elsewhere:
            self._end_if_asked()
            if suspects:
                batch, suspects = suspects[:1], suspects[1:]
            elif todo:
                batch, todo = todo, []
            else:
                if len(elsewhere) != waiting:
                    waiting = len(elsewhere)
                    self.say(f"waiting for {waiting} run{'s'[: waiting > 1]} of another sweep")
                time.sleep(PAUSE)
                batch, elsewhere = elsewhere, []
            ready = list[Job]()
            for job in batch:
                if (known := self._known(job)) is not None:
                    yield job, known
                else:
                    (ready if self.claim.place.is_free(job.name) else elsewhere).append(job)
            full, died = 0, False
            for job, found in self._stream(ready):
                if not isinstance(found, Pending):
                    yield job, found
                elif found.why == "elsewhere":
                    elsewhere.append(job)
                elif found.why == "full":
                    full = found.number
                    self.claim.ask_to_stop()
                elif found.why == "not begun":
                    todo.append(job)
                    died = True
                elif found.why == "stopped" and (self.stopped_by or full):
                    pass
                elif found.why == "stopped" and not self._apart:  # it was this process's signal
                    self._stop(found.number)
                elif job.name in killed:
                    yield job, KILLED
                else:
                    killed.add(job.name)
                    suspects.append(job)
            if full:
                raise OSError(full, os.strerror(full))
            deaths = deaths + 1 if died and not suspects else 0
            if deaths > 2:
                raise SubspanError(
                    "worker processes die before they begin a run, three times in a row: see "
                    "whether 'subspan train' can do one of the runs alone"
                )
            if suspects and not self.stopped_by:
                names = ", ".join(job.name for job in suspects)
                self.say(f"a worker process was killed; one at a time, once more: {names}")
        self._end_if_asked()

    @property
    def _apart(self) -> bool:
        """Whether runs have processes of their own."""
        return self.backend.jobs > 1 or self.backend.remote

    def _end_if_asked(self) -> None:
        if self.stopped_by:
            raise Stopped("stopped", self.stopped_by)

    def _known(self, job: Job) -> CompleteRun | str | None:
        """The outcome of a run that needs no process: it is complete, or cannot be run."""
        try:
            return completed(job.run, self.claim.out / "runs" / job.name, overwrite=self.overwrite)
        except SubspanError as error:
            return str(error)

    def _stream(self, jobs: list[Job]) -> Iterator[tuple[Job, CompleteRun | str | Pending]]:
        """Each run once, in processes of the backend; if one dies all that are left are pending."""
        if not jobs:
            return
        workers = min(self.backend.jobs, len(jobs))
        if self._apart:  # joblib has no process for a single one
            workers = max(2, workers)
        lost = {job.name: job for job in jobs}
        with self.backend.chosen():
            parallel = joblib.Parallel(
                n_jobs=workers,
                return_as="generator_unordered",
                batch_size=1,
                pre_dispatch=min(self.backend.jobs, workers),
            )
        options = {
            "overwrite": self.overwrite,
            "processes": self.processes,
            "apart": self._apart,
            "log": self.log,
        }
        outcomes = parallel(
            joblib.delayed(perform)(job, self.claim.place, **options) for job in jobs
        )
        try:
            for job, found in outcomes:
                del lost[job.name]
                yield job, found
        except self.backend.deaths:
            for job in lost.values():
                begun = self.claim.place.begun(job.name)
                yield job, Pending("killed" if begun else "not begun")
        finally:
            with warnings.catch_warnings(), contextlib.suppress(Exception):
                warnings.simplefilter("ignore")  # of the rest, which an error gives up
                outcomes.close()
