"""The time of a step in random bases, against the step of plain SGD on the same network."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.optim import SGD, Optimizer

from subspan.bench.part import Measurement
from subspan.bench.settings import Bench
from subspan.bench.step import StepPart, time_steps
from subspan.optim import RandomBases
from subspan.training.methods.subspace import STORED

PLAIN = "sgd"


class Optimizers(StepPart):
    """Steps in bases that are redrawn."""

    name = "optimizers"
    help = "steps in bases that are redrawn at every step, against plain SGD"
    title = "step in redrawn bases, {net} ({weights:,} weights), d = {dim:,}"
    heading = (
        "step in redrawn bases of {net}, {weights:,} weights, d = {dim:,}, batch of {batch_size}"
    )
    base_name = PLAIN
    unit = f"times the step of plain {PLAIN}"

    def measure(self, settings: Bench, done: Callable[[str], None]) -> list[Measurement]:
        """Time a step of every network in every family of bases, and one of plain SGD.

        Stored matrices are left out: nothing of a basis that is redrawn can be stored.
        """

        def prepare(net: nn.Module, method: str) -> tuple[nn.Module, Optimizer]:
            if method == PLAIN:
                return net, SGD(net.parameters(), lr=1e-3)
            return net, RandomBases(net, settings.dim, 1e-3, distribution=method)

        methods = (PLAIN, *(method for method in settings.candidates if method not in STORED))
        return time_steps(
            settings, methods, prepare, lambda net: done(f"steps in random bases of {net}")
        )


Optimizers()
