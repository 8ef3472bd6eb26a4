"""Where the runs of a sweep are spread: this process, processes of this machine, or Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import joblib

from subspan.errors import SubspanError, unknown
from subspan.sweeps.job import Job, Outcome
from subspan.sweeps.worker import Worker
from subspan.training.config import Training
from subspan.training.loop import on_cpu
from subspan.training.stop import Stop

Name = Literal["loky", "ray"]
ANSWER_WITHIN = 5.0  # seconds for the head of a cluster to accept a connection
LOOK_EVERY = 1.0  # seconds between chances for a signal while Ray is waited for


@dataclass(frozen=True)
class Backend(ABC):
    """A way to spread runs.

    Args:
        jobs: how many runs it takes at a time.
    """

    jobs: int

    @abstractmethod
    def spread(self, worker: Worker, jobs: Sequence[Job], stop: Stop) -> Iterator[Outcome]:
        """Yield the outcomes of runs as they end.

        A run whose process was killed has "died". Runs that nobody had begun by then may be
        missing.
        """


class InThisProcess(Backend):
    """One run after the other, in the process of the sweep."""

    def spread(self, worker: Worker, jobs: Sequence[Job], stop: Stop) -> Iterator[Outcome]:
        """Yield the outcomes, in order."""
        return (worker.run(job, stop) for job in jobs)


@dataclass(frozen=True)
class Loky(Backend):
    """Processes of this machine, by joblib.

    Args:
        threads: of each process; None if the environment says it.
    """

    threads: int | None = None

    def spread(self, worker: Worker, jobs: Sequence[Job], stop: Stop) -> Iterator[Outcome]:
        """Yield the outcomes as runs end, and those that were under way as died if one was."""
        if not jobs:
            return
        options = {} if self.threads is None else {"inner_max_num_threads": self.threads}
        many = max(2, min(self.jobs, len(jobs)))  # joblib has no process for a single one
        with joblib.parallel_config("loky", **options):
            parallel = joblib.Parallel(
                n_jobs=many,
                return_as="generator_unordered",
                batch_size=1,
                pre_dispatch=min(self.jobs, many),
            )
        outcomes = parallel(joblib.delayed(worker)(job) for job in jobs)
        left = {job.name: job for job in jobs}
        try:
            for outcome in outcomes:
                del left[outcome.job.name]
                yield outcome
        except BrokenProcessPool:  # joblib gives runs away in order, one for each that ends
            yield from (Outcome(job, "died") for job in list(left.values())[: self.jobs])
        finally:
            with warnings.catch_warnings(), contextlib.suppress(Exception):
                warnings.simplefilter("ignore")  # of the runs that are given up
                outcomes.close()


@dataclass(frozen=True)
class OnRay(Backend):
    """Processes of a Ray cluster, which may be on other machines.

    Args:
        options: what Ray is to reserve for each run.
    """

    options: Mapping[str, Any] = field(default_factory=dict)

    def spread(self, worker: Worker, jobs: Sequence[Job], stop: Stop) -> Iterator[Outcome]:
        """Yield the outcomes as runs end."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        task = ray.remote(max_retries=0, **self.options)(_perform)
        waiting, running = list(jobs), dict[Any, Job]()
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    job = waiting.pop(0)
                    running[task.remote(worker, job)] = job
                ended, _ = ray.wait(list(running), timeout=LOOK_EVERY)
                for reference in ended:
                    job = running.pop(reference)
                    try:
                        yield ray.get(reference)
                    except RayTaskError as error:  # the worker itself could not be called
                        yield replace(Outcome.of_error(job, error.cause), traceback=str(error))
                    except RayError:
                        yield Outcome(job, "died")
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _perform(worker: Worker, job: Job) -> Outcome:
    return worker(job)


def check(name: str, address: str | None, jobs: int) -> None:
    """Refuse what no backend can do.

    Raises:
        SubspanError: for an unknown name, an address without Ray, or a number of jobs that is none.
    """
    if name not in get_args(Name):
        raise unknown("backend", name, get_args(Name))
    if address is not None and name != "ray":
        raise SubspanError(
            f"--ray-address {address} is for --backend ray, got --backend {name}: give ray, or "
            "leave the address out"
        )
    if jobs != -1 and jobs < 1:
        raise SubspanError(f"jobs must be at least 1, or -1 for one per core, got {jobs}")


@contextlib.contextmanager
def open_backend(
    name: str, address: str | None, jobs: int, training: Training, runs: int
) -> Iterator[Backend]:
    """A backend, ready for runs.

    Args:
        name: loky, processes of this machine; ray, those of a cluster.
        address: of the cluster; None starts one on this machine for as long as this lasts.
        jobs: runs at a time, or -1.
        training: of the runs.
        runs: how many there are in all.

    Raises:
        SubspanError: if Ray is not installed or does not answer, or has too few processors.
    """
    if name == "ray":
        with join_ray(address, jobs):
            yield _on_ray(training, jobs)
        return
    if jobs == -1:
        jobs = joblib.cpu_count() if on_cpu(training) else 1
    if jobs == 1:
        yield InThisProcess(1)
        return
    # By itself joblib would divide the cores by the runs that are left: those that go on after an
    # interruption, or are tried again, would have other threads than before, and other bits.
    threads = max(1, joblib.cpu_count() // min(jobs, runs))
    yield Loky(jobs, None if "OMP_NUM_THREADS" in os.environ else threads)


@contextlib.contextmanager
def join_ray(address: str | None, jobs: int) -> Iterator[None]:
    """Join a Ray cluster, or start one of this machine alone and end it afterwards.

    A cluster that is joined already stays so.

    Raises:
        SubspanError: if Ray is not installed, or does not answer.
    """
    # Before the import: Ray must not start another cluster when one has ended, nor report to its
    # makers unless the user wants it.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise SubspanError("--backend ray needs Ray: pip install 'subspan[ray]'") from None
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    local: dict[str, Any] = {
        "include_dashboard": False,
        "num_cpus": max(2, jobs, joblib.cpu_count()),
    }
    try:
        _knock(address)
        ray.init(
            address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(local if address == "local" else {}),
        )
    except (Exception, SystemExit) as error:  # after two minutes Ray would end this process
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SubspanError(
            f"no Ray answers at {address} ({reason}): give the host:port that 'ray start --head' "
            "names (and, where it wants one, its token: RAY_AUTH_MODE=token, RAY_AUTH_TOKEN=...), "
            "or no --ray-address to start one on this machine"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Connect to an address, or raise OSError; Ray itself would try for two minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=ANSWER_WITHIN).close()


def _on_ray(training: Training, jobs: int) -> Backend:
    """A run for each GPU of the cluster that was joined, or for each of its CPUs."""
    import ray

    cluster = ray.cluster_resources()
    cpus, gpus = int(cluster.get("CPU", 0)), int(cluster.get("GPU", 0))
    on_gpu = training.device != "cpu" and gpus > 0
    slots = gpus if on_gpu else cpus
    if slots < max(1, jobs):
        raise SubspanError(
            f"this Ray cluster has {cpus} CPUs and {gpus} GPUs; expected {'GPUs' if on_gpu else 'CPUs'}"
            f" for {max(1, jobs)} at a time (--jobs)"
        )
    each = {"num_gpus": 1, "num_cpus": 0} if on_gpu else {"scheduling_strategy": "SPREAD"}
    return OnRay(slots if jobs == -1 else jobs, each)
