"""How runs are carried out, whichever they are: how many at a time, where, and who is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from subspan.errors import SubspanError
from subspan.sweeps.job import Outcome
from subspan.training import trackers
from subspan.training.schema import check_fields


@dataclass(frozen=True)
class Running:
    """How the runs of a sweep, or of several, are carried out.

    Args:
        jobs: runs at a time; -1: one per core, or one where they take the GPU of this machine; of
            a Ray cluster, one per core, or per GPU where it has any.
        backend: loky: processes of this machine; ray: those of a Ray cluster (pip install
            'subspan[ray]'). All its machines must see --out, and the data, under the same path.
            The same command given on several machines that share --out divides the runs without
            Ray.
        ray_address: host:port of a cluster's head; null starts Ray on this machine alone.
        overwrite: whether what another configuration left in a folder is replaced.
        log: trackers that are told every epoch of every run.
        on_run: called with each final outcome, and with the number of runs that are left.
        say: called with a sentence on what else happens: a process died, another sweep is waited
            for.

    Raises:
        SubspanError: for a value of another type, an unknown backend or tracker, an address without
            Ray, or a number of jobs that is none.
    """

    jobs: int = -1
    backend: Literal["loky", "ray"] = "loky"
    ray_address: str | None = None
    overwrite: bool = False
    log: tuple[str, ...] = ()
    on_run: Callable[[Outcome, int], None] = lambda outcome, left: None
    say: Callable[[str], None] = lambda what: None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.ray_address is not None and self.backend != "ray":
            raise SubspanError(
                f"--ray-address {self.ray_address} is for --backend ray, got --backend "
                f"{self.backend}: give ray, or leave the address out"
            )
        if self.jobs != -1 and self.jobs < 1:
            raise SubspanError(f"jobs must be at least 1, or -1 for one per core, got {self.jobs}")
        trackers.check(self.log)
