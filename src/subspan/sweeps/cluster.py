"""Runs of a sweep on a Ray cluster, whose processes may be on other machines."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import joblib

from subspan.errors import SubspanError
from subspan.sweeps.job import Job, Outcome
from subspan.sweeps.worker import Worker
from subspan.training.config import Training
from subspan.training.stop import Stop

ANSWER_WITHIN = 5.0  # seconds for the head of a cluster to accept a connection
LOOK_EVERY = 1.0  # seconds between chances for a signal while Ray is waited for


@contextlib.contextmanager
def join(address: str | None, jobs: int) -> Iterator[None]:
    """Join a Ray cluster, or start one of this machine alone and end it afterwards.

    A cluster that is joined already stays so. Where Ray is not installed, or does not answer, that
    is said.
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


def reserve(training: Training, jobs: int) -> tuple[int, dict[str, Any]]:
    """Return how many runs the cluster takes at a time, and what Ray reserves for each.

    Ray reserves a GPU or a CPU; a cluster with fewer of them than jobs is refused.
    """
    import ray

    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    on_gpu = training.device != "cpu" and gpus > 0
    slots, kind = (gpus, "GPUs") if on_gpu else (cpus, "CPUs")
    if slots < max(1, jobs):
        raise SubspanError(
            f"this Ray cluster has {cpus} CPUs and {gpus} GPUs; expected at least {max(1, jobs)} "
            f"{kind}, one for each run at a time: give fewer --jobs, or another cluster"
        )
    each = {"num_gpus": 1, "num_cpus": 0} if on_gpu else {"scheduling_strategy": "SPREAD"}
    return slots if jobs == -1 else jobs, each


def run_on_ray(
    worker: Worker, jobs: Sequence[Job], stop: Stop, *, many: int, options: Mapping[str, Any]
) -> Iterator[Outcome]:
    """So many runs at a time, each a task of Ray's with these options."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    task = ray.remote(max_retries=0, **options)(_perform)
    waiting, running = list(jobs), dict[Any, Job]()
    try:
        while waiting or running:
            while waiting and len(running) < many:
                job = waiting.pop(0)
                running[task.remote(worker, job)] = job
            ended, _ = ray.wait(list(running), timeout=LOOK_EVERY)
            for reference in ended:
                job = running.pop(reference)
                try:
                    outcome = ray.get(reference)
                except RayTaskError as error:  # the worker itself could not be called
                    outcome = replace(Outcome.of_error(job, error.cause), traceback=str(error))
                except RayError:
                    outcome = Outcome(job, "died")
                yield outcome
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _perform(worker: Worker, job: Job) -> Outcome:
    return worker(job)
