"""The time of a whole training step in a subspace, against the ordinary one of that network."""

from __future__ import annotations

from collections.abc import Callable

from subspan.bench import candidates
from subspan.bench.part import Measurement
from subspan.bench.settings import Bench
from subspan.bench.step import SHAPE, StepPart, random_batch, training_step
from subspan.bench.timing import interleaved
from subspan.families import stored
from subspan.subspace.model import SubspaceModel
from subspan.training import nets


class Steps(StepPart):
    """Steps of training in a fixed subspace."""

    name = "steps"
    help = "steps of training in a fixed subspace, against plain Adam on all weights"
    title = "training step, {net} ({weights:,} weights), d = {dim:,}"
    heading = "training step of {net}, {weights:,} weights, d = {dim:,}, batch of {batch_size}"
    base_name = "adam"
    unit = "times the step of plain adam"

    def measure(self, settings: Bench, done: Callable[[str], None]) -> list[Measurement]:
        """Time a step of every network in every projection, and one of plain Adam.

        Returns:
            Rows with ``net``, ``weights``, ``projection`` ("adam" for the ordinary training),
            ``dim``, ``batch_size`` and the timing ``step``.
        """
        rows, device, dim = [], settings.torch_device, settings.dim
        for name in settings.nets:
            weights = nets.weights(name, SHAPE)
            x, y = random_batch(settings.batch_size, device)
            timed, steps = {}, {}
            for method in (candidates.PLAIN, *settings.candidates):
                row: Measurement = {
                    "net": name,
                    "weights": weights,
                    "projection": method,
                    "dim": dim,
                    "batch_size": settings.batch_size,
                }
                rows.append(row)
                net = nets.build(name, SHAPE)
                if method != candidates.PLAIN:
                    if reason := candidates.too_large(method, weights, dim, device):
                        row["skipped"] = reason
                        continue
                    net = SubspaceModel(net, dim, **candidates.options(method))
                timed[method], steps[method] = row, training_step(net.to(device), x, y)
            for method, timing in interleaved(steps, settings.seconds, device).items():
                timed[method]["step"] = timing
            stored.forget()
            done(f"training steps of {name}")
        return rows


Steps()
