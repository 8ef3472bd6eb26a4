"""Workers: processes that train together, and say which of them does not fit or is lost.

Only coordinates or gradients of factors travel between workers. All else that they must have in
common (bases, settings, weights) is compared by digests, so that a mistake is an error on every
rank that names the rank, and no silent divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from subspan.distributed import as_number
from subspan.errors import SubspanError
from subspan.optim.heartbeat import HeartBeat
from subspan.subspace.parameters import digest_tensors

WorkerMode = Literal["shared", "independent"]

FEW = 4096  # numbers, 16 kB: where Gloo's ring begins to pay


class Workers:
    """The processes of the default group, which there must be.

    Args:
        mode: "shared": vectors are averaged; "independent": they are gathered.
        check_every: steps between comparisons of all workers' weights; 0: never.
    """

    def __init__(self, mode: WorkerMode, check_every: int) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise SubspanError(
                f"workers={mode!r} needs a process group: start with torchrun or accelerate "
                "launch, or call torch.distributed.init_process_group"
            )
        self.mode, self.check_every = mode, check_every
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._compared = False
        self._heart = HeartBeat(self.rank)

    def combine(self, vector: Tensor, step: int) -> Tensor:
        """Average the vectors (d,) of all workers to (1, d), or gather them to (world, d).

        An error names the ``step`` and the worker that is lost.
        """
        if self.mode == "shared":
            return self._together(lambda: self._mean(vector).unsqueeze(0), step)
        return self._together(lambda: self._gather(vector), step)

    # ---- agreement -------------------------------------------------------------------------------

    def compare_once(
        self, agreement: Callable[[], Mapping[str, Any]], tensors: Mapping[str, Tensor], steps: int
    ) -> None:
        """Compare what all must have in common, before the first step; later do nothing.

        That is JSON by the name that errors give it, the weights and the number of steps made. The
        error, on every rank, names what differs and where.
        """
        if self._compared:
            return
        common = {**agreement(), "the steps made": steps, "the weights": digest_tensors(tensors)}
        device = next(iter(tensors.values())).device
        own = torch.tensor([as_number(value) for value in common.values()], device=device)
        everyone = self._together(lambda: self._gather(own), 0).tolist()
        for column, name in enumerate(common):
            values = [row[column] for row in everyone]
            if others := [rank for rank, value in enumerate(values) if value != values[0]]:
                differ = "differ" if len(others) > 1 else "differs"
                raise SubspanError(
                    f"{_ranks(others)} {differ} from rank 0 in {name}: build all from the same "
                    "seeds and options"
                )
        self._compared = True

    def compare_weights(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Compare the weights of all workers by a checksum of their bits, every so many steps."""
        if not self.check_every or steps % self.check_every:
            return
        own = checksum(tensors)
        sums = self._together(lambda: self._gather(own), steps).tolist()
        usual = max(sums, key=sums.count)
        if others := [rank for rank, value in enumerate(sums) if value != usual]:
            raise SubspanError(
                f"after step {steps} the weights of {_ranks(others)} are not those of the others: "
                "something changes them besides the optimizer"
            )

    # ---- messages --------------------------------------------------------------------------------

    def _mean(self, own: Tensor) -> Tensor:
        """Return the mean of all workers' vectors, the same bits everywhere.

        A few hundred numbers are less than the headers of Gloo's ring, which sends twice as many
        messages each way as there are workers. So rank 0 adds few numbers up and sends the mean out
        along a tree, in half the time and a third of the bytes; many numbers, which would then all
        pass through rank 0, go by the ring.
        """
        if own.device.type != "cpu" or own.numel() > FEW:
            total = own.clone()
            dist.all_reduce(total)
            return total / self.world
        vectors = [torch.empty_like(own) for _ in range(self.world)] if self.rank == 0 else None
        dist.gather(own, vectors)
        mean = torch.stack(vectors).mean(dim=0) if vectors else torch.empty_like(own)
        dist.broadcast(mean, 0)
        return mean

    def _gather(self, own: Tensor) -> Tensor:
        """Return the vectors of all workers, (world, d)."""
        vectors = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(vectors, own)
        return torch.stack(vectors)

    def _together(self, communicate: Callable[[], Tensor], step: int) -> Tensor:
        """Communicate, and name the ranks that are lost if that fails."""
        try:
            return communicate()
        except RuntimeError as error:  # DistBackendError is one, too
            lost = self._heart.stopped(self.world)
            who = f"{_ranks(lost)} {'is' if len(lost) == 1 else 'are'} lost" if lost else "a worker"
            raise SubspanError(
                f"step {step} cannot be finished: {who} ({error}); a journal lets a job of "
                "RandomBases go on from here (torchrun --max-restarts)"
            ) from error


def checksum(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return (1,) int64 of the bits of all tensors, on the device of the first."""
    total: Tensor | None = None
    for tensor in tensors.values():
        flat = tensor.detach().reshape(-1)
        words = {2: torch.int16, 4: torch.int32}.get(flat.element_size(), torch.int64)
        own = flat.view(words).sum(dtype=torch.int64).reshape(1)
        # The order of tensors counts: an odd factor mixes what came before.
        total = own if total is None else total * 0x9E3779B1 + own.to(total.device)
    assert total is not None
    return total


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
