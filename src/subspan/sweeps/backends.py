"""Backends that run the jobs of a sweep: this process, processes of this machine, or Ray."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import joblib

from subspan.sweeps import cluster
from subspan.sweeps.job import Job, Outcome
from subspan.sweeps.running import Running
from subspan.sweeps.worker import Worker
from subspan.training.config import Training
from subspan.training.devices import on_cpu
from subspan.training.stop import Stop

Backend = Callable[[Worker, Sequence[Job], Stop], Iterator[Outcome]]
"""Yields the outcomes of runs as they end. A run whose process was killed has "died"; runs that no
process had begun by then may be missing."""


@contextlib.contextmanager
def open_backend(running: Running, training: Training, runs: int) -> Iterator[Backend]:
    """Make a backend ready for so many runs; a cluster that it starts lasts as long as this."""
    jobs = running.jobs
    if running.backend == "ray":
        with cluster.join(running.ray_address, jobs):
            many, options = cluster.reserve(training, jobs)
            yield partial(cluster.run_on_ray, many=many, options=options)
        return
    if jobs == -1:
        jobs = joblib.cpu_count() if on_cpu(training) else 1
    if jobs == 1:
        yield run_here
        return
    # By itself joblib would divide the cores by the runs that are left: those that go on after an
    # interruption, or are tried again, would have other threads than before, and other bits.
    threads = max(1, joblib.cpu_count() // min(jobs, runs))
    threads_by_us = {} if "OMP_NUM_THREADS" in os.environ else {"inner_max_num_threads": threads}
    yield partial(run_in_workers, many=jobs, options=threads_by_us)


def run_here(worker: Worker, jobs: Sequence[Job], stop: Stop) -> Iterator[Outcome]:
    """Yield the outcome of one run after the other, in this process."""
    return (worker.run(job, stop) for job in jobs)


def run_in_workers(
    worker: Worker, jobs: Sequence[Job], stop: Stop, *, many: int, options: dict[str, int]
) -> Iterator[Outcome]:
    """So many runs at a time in processes of this machine, with joblib's options.

    When a process is killed joblib ends the others, too: all runs that were under way have died.
    """
    if not jobs:
        return
    with joblib.parallel_config("loky", **options):
        parallel = joblib.Parallel(
            n_jobs=max(2, min(many, len(jobs))),  # joblib has no process for a single run
            return_as="generator_unordered",
            batch_size=1,
            pre_dispatch=min(many, len(jobs)),
        )
    outcomes = parallel(joblib.delayed(worker)(job) for job in jobs)
    left = {job.name: job for job in jobs}
    try:
        for outcome in outcomes:
            del left[outcome.job.name]
            yield outcome
    except BrokenProcessPool:  # joblib has given away runs in order, one for each that ended
        yield from (Outcome(job, "died") for job in list(left.values())[:many])
    finally:
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")  # of the runs that are given up
            outcomes.close()
