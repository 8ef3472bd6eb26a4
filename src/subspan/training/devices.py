"""The devices, processes and precision of a run: accelerate's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs

from subspan import distributed
from subspan.training.config import Training


def on_cpu(training: Training) -> bool:
    """Return whether a run takes the processor: it was told to, or there is nothing else."""
    return training.device == "cpu" or not torch.accelerator.is_available()


@contextmanager
def accelerate_aside() -> Iterator[None]:
    """Let accelerate know afterwards what it knew before.

    It has one state for a process: an accelerator of the caller's would go on with the precision of
    a run, and would not accumulate its gradients any more.
    """
    states = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in states]
    try:
        yield
    finally:
        for state, known in zip(states, before, strict=True):
            state.clear()
            state.update(known)


def accelerator(training: Training, **more: Any) -> Accelerator:
    """Make the accelerator of a run, with its devices, processes and precision."""
    # What accelerate knows of the run before this one would make it refuse other settings.
    AcceleratorState._reset_state(reset_partial_state=True)
    distributed.meet_again("gloo" if on_cpu(training) else None)
    # DDP would send buffers with every call of the network. A step may be several calls, with
    # tensors of the first still wanted for its gradient, and not as many in every process.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    return Accelerator(
        # Without this processes of torchrun would not find each other where there are only CPUs.
        cpu=on_cpu(training),
        mixed_precision=training.mixed_precision,
        kwargs_handlers=[ddp],
        **more,
    )
