"""Learning rates step by step."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR


def schedule(optimizer: Optimizer, name: str, steps: int) -> LRScheduler:
    """Return the learning rates step by step; the highest of a group is its rate at first."""
    if name == "onecycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, rates, total_steps=max(steps, 2), cycle_momentum=False)
    if name == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    return LambdaLR(optimizer, lambda _: 1.0)


def restart(optimizer: Optimizer, rates: Sequence[float], name: str, steps: int) -> LRScheduler:
    """Return a schedule from the first rates of all groups, each times its ``rate_factor``."""
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr * group.get("rate_factor", 1.0)
        group.pop("initial_lr", None)
    return schedule(optimizer, name, steps)
