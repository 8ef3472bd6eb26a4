"""All runs of a sweep through a backend, whatever becomes of its processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from subspan.sweeps.backends import Backend
from subspan.sweeps.job import Job, Outcome
from subspan.sweeps.worker import Worker
from subspan.training.stop import Stop

PAUSE = 1.0  # seconds between looks at the runs of another sweep
KILLED = (
    "its process was killed twice, the second time with no other beside it, for want of memory "
    "perhaps: give the same command again with fewer --jobs, or make the run smaller"
)


def run_jobs(
    jobs: Sequence[Job], worker: Worker, backend: Backend, stop: Stop, say: Callable[[str], None]
) -> Iterator[Outcome]:
    """Yield the final outcome of each run when it is known: it is "done", or has "failed".

    Complete runs are not repeated. Runs that another sweep trains are left to it, and looked at
    again when nothing else is left. Runs whose process was killed are tried once more, alone.

    Raises:
        Stopped: after a signal, when all runs have saved where they are.
        OSError: if the disk is full, likewise.
    """
    todo, busy, suspects, killed = list(jobs), list[Job](), list[Job](), set[str]()
    waiting = 0
    while (todo or suspects or busy) and not stop.requested:
        if suspects:
            batch = [suspects.pop(0)]
        elif todo:
            batch, todo = todo, []
        else:
            if len(busy) != waiting:
                waiting = len(busy)
                say(f"waiting for {waiting} run{'s'[: waiting > 1]} of another sweep")
            time.sleep(PAUSE)
            batch, busy = busy, []
        ready = dict[str, Job]()
        for job in batch:
            if complete := worker.find(job):
                yield complete
            elif worker.folder.is_busy(job.name):
                busy.append(job)
            else:
                ready[job.name] = job
        full, tried = 0, len(suspects)
        for outcome in backend(worker, list(ready.values()), stop):
            job = ready.pop(outcome.job.name)
            if outcome.status in ("done", "failed"):
                yield outcome
            elif outcome.status == "busy":
                busy.append(job)
            elif outcome.status == "full":
                full = outcome.errno
                worker.folder.ask_to_stop()
            elif outcome.status == "stopped" and (stop.requested or full):
                pass
            elif job.name in killed:
                yield replace(outcome, status="failed", error=KILLED)
            else:  # a process that was told to stop, but not by its sweep, is as good as killed
                killed.add(job.name)
                suspects.append(job)
        if full:
            raise OSError(full, os.strerror(full))
        todo += ready.values()  # which no process had begun when one of them was killed
        if len(suspects) > tried and not stop.requested:
            names = ", ".join(job.name for job in suspects)
            say(f"a worker process was killed; one at a time, once more: {names}")
    if stop.requested:
        raise stop.error("")
