"""The little that torch.distributed does not do: workers that must agree, and say who does not.

Only coordinates travel between workers. What they must have in common besides (bases, weights) is
compared by digests, so that a mistake is an error on every rank that names the rank, and no
silent divergence.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from subspan.errors import SubspanError

FEW = 4096  # numbers, 16 kB: where Gloo's ring begins to pay
BEAT = 1.0  # seconds
VERDICT = "subspan/lost"  # in the store


def meet_again(backend: str | None) -> None:
    """Start the process group of a job that torchrun has restarted; of any other, do nothing.

    torchrun keeps one store for all attempts (unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1), and
    Gloo would look there for a rank and find the address of the one that died: refused, or a hang.

    Args:
        backend: as of ``init_process_group``; None for PyTorch's choice.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or dist.is_initialized():
        return
    store, rank, world = next(rendezvous("env://"))
    own = PrefixStore(f"subspan/attempt-{attempt}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world)


def leave() -> None:
    """End the process group, if there is one, at the end of a program.

    Gloo's threads may still hold what was sent last. If Python ends before they do, they abort it.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """How many processes there are; 1 without a process group."""
    ready = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if ready else 1


def averaged_by_ddp(*parameters: Tensor) -> bool:
    """Whether a ``DistributedDataParallel`` averages the gradient of any of these.

    It leaves no mark on what it wraps: all objects of the process are looked through (0.1 s).
    """
    wanted = set(map(id, parameters))
    return any(
        issubclass(type(found), DistributedDataParallel)
        and not wanted.isdisjoint(map(id, found.parameters()))
        for found in gc.get_objects()
    )


def anywhere(true: bool, device: torch.device) -> bool:
    """Whether something is true in any process of the default group; all must ask."""
    found = torch.tensor(float(true), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def means(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor's mean over all processes of the default group, by one message."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


class Workers:
    """The processes of the default group.

    Args:
        mode: "shared": coordinates are averaged; "independent": they are gathered.

    Raises:
        SubspanError: if there is no process group.
    """

    def __init__(self, mode: Literal["shared", "independent"]) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise SubspanError(
                f"workers={mode!r} needs a process group: start with torchrun or accelerate "
                "launch, or call torch.distributed.init_process_group"
            )
        self.mode = mode
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._pulse = Pulse(self.rank)

    def combine(self, coordinates: Tensor, step: int) -> Tensor:
        """The coordinates of all workers: (1, d) means, or (world, d).

        Raises:
            SubspanError: if a worker is lost; the error names it.
        """

        def communicate() -> Tensor:
            if self.mode == "shared":
                return self._mean(coordinates).unsqueeze(0)
            return self._gathered(coordinates)

        return self._together(communicate, step)

    def check_start(self, agreement: Mapping[str, Any], device: torch.device) -> None:
        """Compare what all must have in common, before the first step.

        Raises:
            SubspanError: on every rank, naming what differs and where.
        """
        names = list(agreement)
        own = torch.tensor([_number(agreement[name]) for name in names], device=device)
        everyone = self._together(lambda: self._gathered(own), 0).tolist()
        for column, name in enumerate(names):
            values = [row[column] for row in everyone]
            if others := [rank for rank, value in enumerate(values) if value != values[0]]:
                differ = "differ" if len(others) > 1 else "differs"
                raise SubspanError(
                    f"{_ranks(others)} {differ} from rank 0 in {name}: build all from the same "
                    "seeds and options"
                )

    def check_same(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Compare the weights of all workers by a checksum of their bits.

        Raises:
            SubspanError: on every rank, naming those that differ from most.
        """
        own = checksum(tensors)
        found = self._together(lambda: self._gathered(own), step).tolist()
        usual = max(found, key=found.count)
        if others := [rank for rank, value in enumerate(found) if value != usual]:
            raise SubspanError(
                f"after step {step} the weights of {_ranks(others)} are not those of the others: "
                "something changes them besides the optimizer"
            )

    def _mean(self, own: Tensor) -> Tensor:
        """The mean of all workers' vectors, the same bits everywhere.

        A few hundred numbers are less than the headers of Gloo's ring, twice as many messages each
        way as there are workers: rank 0 adds up, and sends the mean out along a tree. It takes half
        the time and a third of the bytes. Many numbers would all pass through rank 0 so.
        """
        if own.device.type != "cpu" or own.numel() > FEW:
            total = own.clone()
            dist.all_reduce(total)
            return total / self.world
        found = [torch.empty_like(own) for _ in range(self.world)] if self.rank == 0 else None
        dist.gather(own, found)
        mean = torch.stack(found).mean(dim=0) if found else torch.empty_like(own)
        dist.broadcast(mean, 0)
        return mean

    def _gathered(self, own: Tensor) -> Tensor:
        found = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(found, own)
        return torch.stack(found)

    def _together(self, communicate: Callable[[], Tensor], step: int) -> Tensor:
        try:
            return communicate()
        except RuntimeError as error:  # DistBackendError is one, too
            lost = self._lost()
            who = f"{_ranks(lost)} {'is' if len(lost) == 1 else 'are'} lost" if lost else "a worker"
            raise SubspanError(
                f"step {step} cannot be finished: {who} ({error}); a journal lets a job of "
                "RandomBases go on from here (torchrun --max-restarts)"
            ) from error

    def _lost(self) -> list[int]:
        """The ranks whose heart has stopped."""
        with contextlib.suppress(Exception):  # the store may have gone with its process
            return self._pulse.lost(self.world)
        return []


class Pulse:
    """A thread that says every second, in the store through which all met, that this rank lives.

    It beats on while the rank waits for others, whose end makes the wait fail at one rank after
    another: who fails is not who is lost.
    """

    def __init__(self, rank: int) -> None:
        self._store = dist.distributed_c10d._get_default_store()
        self._stop = threading.Event()
        thread = threading.Thread(
            target=_beat, args=(self._store, _key(rank), self._stop), daemon=True
        )
        thread.start()
        # Before the interpreter ends, and with it what the thread calls.
        weakref.finalize(self, _end, self._stop, thread)

    def lost(self, world: int) -> list[int]:
        """The ranks without a pulse.

        Who finds out first leaves word: by the time that others fail, more ranks have ended.
        """
        if not self._store.check([VERDICT]):
            before = self._read(world)
            time.sleep(3 * BEAT)
            after = self._read(world)
            lost = [rank for rank in range(world) if before[rank] == after[rank]]
            if not self._store.check([VERDICT]):
                self._store.set(VERDICT, json.dumps(lost))
        return list(json.loads(self._store.get(VERDICT)))

    def _read(self, world: int) -> list[bytes]:
        """The last beat of every rank; of one that never began, nothing."""
        keys = [_key(rank) for rank in range(world)]
        return [self._store.get(key) if self._store.check([key]) else b"" for key in keys]


def _key(rank: int) -> str:
    return f"subspan/pulse/{rank}"


def _beat(store: Any, key: str, stop: threading.Event) -> None:
    with contextlib.suppress(Exception):  # the store has gone, and so will this process
        while True:
            store.set(key, str(time.time_ns()))
            if stop.wait(BEAT):
                return


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    thread.join(timeout=5)


def checksum(tensors: Mapping[str, Tensor]) -> Tensor:
    """(1,) int64 of the bits of all tensors, on the device of the first."""
    total: Tensor | None = None
    for tensor in tensors.values():
        flat = tensor.detach().reshape(-1)
        words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        own = flat.view(words).sum(dtype=torch.int64).reshape(1)
        # The order of tensors counts: an odd factor mixes what came before.
        total = own if total is None else total * 0x9E3779B1 + own.to(total.device)
    assert total is not None
    return total


def _number(value: Any) -> int:
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
