"""The time of a whole training step in a subspace, against the ordinary one of that network."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.optim import Adam, Optimizer

from subspan.bench import candidates
from subspan.bench.part import Measurement
from subspan.bench.settings import Bench
from subspan.bench.step import StepPart, time_steps
from subspan.subspace.model import SubspaceModel


class Steps(StepPart):
    """Steps of training in a fixed subspace."""

    name = "steps"
    help = "steps of training in a fixed subspace, against plain Adam on all weights"
    title = "training step, {net} ({weights:,} weights), d = {dim:,}"
    heading = "training step of {net}, {weights:,} weights, d = {dim:,}, batch of {batch_size}"
    base_name = "adam"
    unit = "times the step of plain adam"

    def measure(self, settings: Bench, done: Callable[[str], None]) -> list[Measurement]:
        """Time a step of every network in every projection, and one of plain Adam."""

        def prepare(net: nn.Module, method: str) -> tuple[nn.Module, Optimizer]:
            if method != candidates.PLAIN:
                net = SubspaceModel(net, settings.dim, **candidates.options(method))
            return net, Adam(net.parameters(), lr=1e-3)

        methods = (candidates.PLAIN, *settings.candidates)
        return time_steps(settings, methods, prepare, lambda net: done(f"training steps of {net}"))


Steps()
