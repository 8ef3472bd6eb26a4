"""A few things about process groups that torch.distributed does not do."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer


def meet_again(backend: str | None) -> None:
    """Start the process group of a job that torchrun has restarted; of any other, do nothing.

    A workaround (pytorch/pytorch#135712): torchrun keeps one store for all attempts (unless
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1), so that Gloo would look there for a rank and find the
    address of the one that died. The connection is then refused, or hangs.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or dist.is_initialized():
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://"))
    own = PrefixStore(f"subspan/attempt-{attempt}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world)


def leave() -> None:
    """End the process group, if there is one, at the end of a program.

    A workaround (pytorch/pytorch#179291): Gloo's threads may still hold what was sent last, and
    abort Python if it ends before they do.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """Return the number of processes; 1 without a process group."""
    ready = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if ready else 1


def find_ddp(*parameters: Tensor) -> list[nn.Module]:
    """Return every ``DistributedDataParallel`` that averages the gradient of any of these.

    A workaround: DDP leaves no mark on the module that it wraps, so that all objects of the
    process are looked through (0.1 s).
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.nn.parallel import DistributedDataParallel

    wanted = set(map(id, parameters))
    return [
        item
        for item in gc.get_objects()
        if issubclass(type(item), DistributedDataParallel)
        and not wanted.isdisjoint(map(id, vars(item).get("_module_parameters", ())))
    ]


def has_share(optimizer: Optimizer) -> bool:
    """Return whether an optimizer is that of one process inside a ``ZeroRedundancyOptimizer``.

    A workaround: nothing in it says so, and all objects of the process are looked through (0.1 s).
    """
    module: Any = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    return module is not None and any(
        issubclass(type(item), module.ZeroRedundancyOptimizer)
        and getattr(item, "optim", None) is optimizer
        for item in gc.get_objects()
    )


def anywhere(true: bool, device: torch.device) -> bool:
    """Return whether something is true in any process of the default group; all must ask."""
    flag = torch.tensor(float(true), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def as_number(value: Any) -> int:
    """Return 64 bits of a digest of JSON, which processes can compare by a message of numbers."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def means(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return each tensor's mean over all processes of the default group, by one message."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


@torch.no_grad()
def share_buffers(net: nn.Module) -> None:
    """Give the buffers of the first process, of BatchNorm say, to all; all must ask."""
    for buffer in net.buffers():
        first = buffer.contiguous()
        dist.broadcast(first, src=0)
        if not torch.equal(first, buffer):
            buffer.copy_(first)
