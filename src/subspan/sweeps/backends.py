"""Where a sweep's runs are spread: processes of this machine, or a Ray cluster, through joblib."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import joblib

from subspan.errors import SubspanError, unknown
from subspan.training.config import Training
from subspan.training.devices import on_cpu

Name = Literal["loky", "ray"]
ANSWER_WITHIN = 5.0  # seconds for the head of a cluster to accept a connection


@dataclass(frozen=True)
class Backend:
    """One of joblib's backends.

    Args:
        name: joblib's name for it.
        jobs: how many runs it takes at a time.
        deaths: what joblib raises when one of its processes has died.
        remote: whether processes may be on other machines, so that even one run at a time is
            given to them.
        options: joblib's, of this backend.
    """

    name: str
    jobs: int
    deaths: tuple[type[Exception], ...]
    remote: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def chosen(self) -> AbstractContextManager[Any]:
        """A context in which joblib takes this backend."""
        chosen: AbstractContextManager[Any] = joblib.parallel_config(self.name, **self.options)
        return chosen


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
def opened(
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
    if name == "loky":
        if jobs == -1:
            jobs = joblib.cpu_count() if on_cpu(training) else 1
        yield Backend("loky", jobs, (BrokenProcessPool,), options=_threads(min(jobs, runs)))
        return
    with ray_joined(address, jobs):
        yield _on_ray(training, jobs)


def _threads(many: int) -> dict[str, Any]:
    """Threads of each of so many processes, as joblib is told.

    By itself it would divide the cores by the runs that are left: those that go on after an
    interruption, or are tried again, would have other threads than before, and end with other bits.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"inner_max_num_threads": max(1, joblib.cpu_count() // many)}


@contextlib.contextmanager
def ray_joined(address: str | None, jobs: int) -> Iterator[None]:
    """Join a Ray cluster, or start one of this machine alone and end it afterwards.

    What is joined already stays so.

    Raises:
        SubspanError: if Ray is not installed, or does not answer.
    """
    # Before the import: an ended cluster is not begun again by whoever still asks for a result,
    # and nothing is reported to Ray's makers unless the user wants it.
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
    own: dict[str, Any] = {"include_dashboard": False, "num_cpus": max(2, jobs, joblib.cpu_count())}
    try:
        _knock(address)
        ray.init(
            address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(own if address == "local" else {}),
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
    """See whether anything is there, which Ray itself takes two minutes for."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=ANSWER_WITHIN).close()


def _on_ray(training: Training, jobs: int) -> Backend:
    """Ray's own backend of joblib, with what it lacks to hand over results one by one."""
    import ray
    from ray.exceptions import RayActorError
    from ray.util.joblib.ray_backend import RayBackend

    class Streaming(RayBackend):
        """Results as they come. Joblib's base class fears for pools that must be joined."""

        supports_return_generator = True
        _pool: Any = None

        def terminate(self) -> None:
            """Let processes end in order; of those that are killed Ray complains at length."""
            if self._pool is not None:
                self._pool.close()
                self._pool = None
            self.reset_batch_stats()

    joblib.register_parallel_backend("ray", Streaming)
    there = ray.cluster_resources()
    cpus, gpus = int(there.get("CPU", 0)), int(there.get("GPU", 0))
    on_gpu = training.device != "cpu" and gpus > 0
    slots = gpus if on_gpu else cpus
    if cpus < 2 or jobs > slots:
        raise SubspanError(
            f"this Ray cluster has {cpus} CPUs and {gpus} GPUs; expected two CPUs at least, and "
            f"{'a GPU' if on_gpu else 'a CPU'} for each of --jobs {jobs}"
        )
    # A process for each run: Ray's pool deals them out in turn, also to those that are busy. It
    # has two processes at least.
    each = {"num_gpus": min(1, gpus / 2)} if on_gpu else {"scheduling_strategy": "SPREAD"}
    return Backend(
        "ray",
        slots if jobs == -1 else jobs,
        (RayActorError,),
        remote=True,
        options={"maxtasksperchild": 1, "ray_remote_args": each},
    )
