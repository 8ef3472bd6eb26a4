"""The time of a step in random bases, against the step of plain SGD on the same network."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import SGD

from subspan.bench.part import Measurement
from subspan.bench.settings import Bench
from subspan.bench.step import SHAPE, StepPart, random_batch, training_step
from subspan.bench.timing import interleaved
from subspan.optim import RandomBases
from subspan.training import nets
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

        Returns:
            Rows as of the part ``steps``, with "sgd" for the plain step.
        """
        rows: list[Measurement] = []
        device, dim = settings.torch_device, settings.dim
        for name in settings.nets:
            x, y = random_batch(settings.batch_size, device)
            steps = {}
            for method in (PLAIN, *(m for m in settings.candidates if m not in STORED)):
                net = nets.build(name, SHAPE).to(device)
                optimizer = (
                    SGD(net.parameters(), lr=1e-3)
                    if method == PLAIN
                    else RandomBases(net, dim, 1e-3, distribution=method)
                )
                steps[method] = training_step(net, x, y, optimizer)
            rows += [
                {
                    "net": name,
                    "weights": nets.weights(name, SHAPE),
                    "projection": method,
                    "dim": dim,
                    "batch_size": settings.batch_size,
                    "step": timing,
                }
                for method, timing in interleaved(steps, settings.seconds, device).items()
            ]
            done(f"steps in random bases of {name}")
        return rows


Optimizers()
