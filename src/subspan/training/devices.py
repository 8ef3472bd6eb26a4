"""The devices, processes and precision of a run: accelerate's."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from subspan import distributed
from subspan.training.config import Training


def on_cpu(training: Training) -> bool:
    """Return whether a run takes the processor: it was told to, or there is nothing else."""
    return training.device == "cpu" or not torch.accelerator.is_available()


def accelerator(training: Training, **more: Any) -> Accelerator:
    """Make the accelerator of a run: its devices, processes, precision and trackers."""
    # What accelerate knows of the run before this one would make it refuse other settings.
    AcceleratorState._reset_state(reset_partial_state=True)
    distributed.meet_again("gloo" if on_cpu(training) else None)
    # Processes of torchrun find each other on CPUs only if it is told that there is nothing else.
    precision = training.mixed_precision
    # DDP would send them with every call of the network. A step may be several calls, with tensors
    # of the first still wanted for its gradient, and not as many in every process.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    return Accelerator(
        cpu=on_cpu(training), mixed_precision=precision, kwargs_handlers=[ddp], **more
    )
