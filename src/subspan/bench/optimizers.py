"""The time of a step in random bases, against the step of plain SGD on the same network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import SGD

from subspan.bench.steps import SHAPE, a_batch, training_step
from subspan.bench.timing import interleaved
from subspan.optim import RandomBases
from subspan.training import nets
from subspan.training.methods.subspace import STORED

PLAIN = "sgd"


def measure(
    methods: Sequence[str],
    net_names: Sequence[str],
    dim: int,
    batch_size: int,
    seconds: float,
    device: torch.device,
    done: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row for every network and family of bases, redrawn at every step; and one for plain SGD.

    Args:
        methods: families; stored matrices are left out, for nothing of a basis can be stored.
        net_names: networks by name, for images of 28 by 28 pixels.
        dim: d of all of them.
        batch_size: images in a step.
        seconds: to spend on each.
        device: where.
        done: is told about every network that is done.

    Returns:
        Rows as of :func:`subspan.bench.steps.measure`, with "sgd" for the plain step.
    """
    rows = []
    for name in net_names:
        weights = nets.weights(name, SHAPE)
        x, y = a_batch(batch_size, device)
        steps = {}
        for method in (PLAIN, *(m for m in methods if m not in STORED)):
            net = nets.build(name, SHAPE).to(device)
            optimizer = (
                SGD(net.parameters(), lr=1e-3)
                if method == PLAIN
                else RandomBases(net, dim, 1e-3, distribution=method)
            )
            steps[method] = training_step(net, x, y, optimizer)
        for method, timing in interleaved(steps, seconds, device).items():
            rows.append(
                {
                    "net": name,
                    "weights": weights,
                    "projection": method,
                    "dim": dim,
                    "batch_size": batch_size,
                    "step": timing,
                }
            )
        done(f"steps in random bases of {name}")
    return rows
