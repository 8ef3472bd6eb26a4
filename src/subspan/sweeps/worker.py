"""Train one run of a sweep, in whichever process it is given to."""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass

from subspan.cache import cache
from subspan.errors import Stopped, SubspanError
from subspan.families import stored
from subspan.sweeps.folder import SweepFolder
from subspan.sweeps.job import Job, Outcome
from subspan.sweeps.processes import run_in_processes
from subspan.training import own
from subspan.training.stop import Stop
from subspan.training.train import completed, train


@dataclass(frozen=True)
class Worker:
    """Trains runs of a sweep; as a value it is sent to the processes that do."""

    folder: SweepFolder
    overwrite: bool = False  # what another configuration left in the folder of a run
    processes: int = 1  # that train one run together
    log: tuple[str, ...] = ()  # trackers that are told every epoch
    imports: tuple[str, ...] = ()  # modules of the user's that every process imports (--import)

    def find(self, job: Job) -> Outcome | None:
        """Return the outcome of a run that is complete already, or cannot be run in its folder."""
        try:
            record = completed(job.run, self.folder.run(job.name), overwrite=self.overwrite)
        except SubspanError as error:
            return Outcome.of_error(job, error)
        return Outcome(job, "done", record) if record else None

    def __call__(self, job: Job) -> Outcome:
        """Train a run in a process that is not the sweep's own."""
        if threading.current_thread() is threading.main_thread():
            # Ctrl-C reaches all processes of a terminal; between runs the sweep's alone answers.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Stop(elsewhere=self.folder.is_stopping) as stop:
            return self.run(job, stop)

    def run(self, job: Job, stop: Stop) -> Outcome:
        """Train a run in this process, or in several that it starts."""
        if stop.requested or self.folder.is_stopping():
            return Outcome(job, "stopped")
        if self.folder.is_busy(job.name):
            return Outcome(job, "busy")
        if self.processes == 1:
            return self.train(job, stop)
        try:
            return run_in_processes(self, job, self.processes)
        except (Exception, Stopped) as error:
            return Outcome.of_error(job, error)

    def train(self, job: Job, stop: Stop) -> Outcome:
        """Train a run in this process, which may be one of several."""
        try:
            own.remember(self.imports)
            own.load_remembered()
            folder = self.folder.run(job.name)
            record = train(job.run, folder, overwrite=self.overwrite, stop=stop, log=self.log)
            return Outcome(job, "done", record)
        except (Exception, Stopped) as error:  # it must not stop the other runs
            return Outcome.of_error(job, error)
        finally:  # or the next run in this process would count it as its own
            stored.forget()
            cache.clear()
