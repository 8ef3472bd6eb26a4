"""Low-rank layers against dense ones: a training step, inference and memory by rank.

Source of the comparison: Schotthöfer et al., NeurIPS 2022, timings of a network of five hidden
layers of 5,120 units, where low rank paid below 2.5 % of the width in training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import nn
from torch.optim import SGD

from subspan.bench.bars import BLUE, GREEN, ORANGE
from subspan.bench.part import Measurement, Part, Quantity
from subspan.bench.settings import Bench
from subspan.bench.step import SHAPE, random_batch, training_step
from subspan.bench.subprocess import run_in_process
from subspan.bench.timing import interleaved
from subspan.layers import LowRankLinear
from subspan.optim import DLRT
from subspan.report.bars import show_number
from subspan.training.machine import PeakMemory

DENSE, HIDDEN = 0, 5  # the rank that a dense row has; hidden layers


def network(width: int, rank: int) -> nn.Module:
    """Make five hidden layers of a width, dense or of a rank from the start, and ten classes."""
    layers: list[nn.Module] = [nn.Flatten()]
    features = math.prod(SHAPE)
    for _ in range(HIDDEN):
        layers += [
            nn.Linear(features, width)
            if rank == DENSE
            else LowRankLinear(features, width, min(rank, features)),
            nn.ReLU(),
        ]
        features = width
    return nn.Sequential(*layers, nn.Linear(width, 10))


def make_optimizer(net: nn.Module, rank: int, adapting: bool = False) -> torch.optim.Optimizer:
    """Make SGD, or DLRT with SGD inside: at ranks that stay, or that may change at each step."""
    if rank == DENSE:
        return SGD(net.parameters(), lr=1e-3)
    # A tolerance of 0 with a bound truncates at every step and comes back to the same rank.
    return DLRT(net, 1e-3, tolerance=0.0 if adapting else None, max_rank=rank)


def _inference(net: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            net(x)

    return run


def peak(width: int, rank: int, batch_size: int, device: str) -> int:
    """Return the peak of two training steps in bytes, beyond what the libraries take."""
    place = torch.device(device)

    def two_steps(width: int, rank: int) -> None:
        net = network(width, rank).to(place)
        x, y = random_batch(batch_size, place)
        step = training_step(net, x, y, make_optimizer(net, rank))
        step()
        step()

    two_steps(32, min(rank, 8))  # starts threads, loads what is loaded on first use
    before = PeakMemory(place).read()
    memory = PeakMemory(place)
    two_steps(width, rank)
    return max(memory.read() - before, 1)  # a small one may fit into what is there


def break_even(rows: Sequence[Measurement]) -> float | None:
    """Find the rank at which the time of a step crosses the dense one's, between measured ranks.

    Returns:
        A rank, interpolated linearly; the greatest measured one if even that is faster, or None if
        none is.
    """
    times = {float(row["rank"]): row["step"]["median"] for row in rows}
    dense = times.pop(DENSE)
    ranks = sorted(times)
    faster = list(itertools.takewhile(lambda rank: times[rank] <= dense, ranks))
    if len(faster) in (0, len(ranks)):
        return faster[-1] if faster else None
    last, rank = faster[-1], ranks[len(faster)]
    return last + (rank - last) * (dense - times[last]) / (times[rank] - times[last])


class LowRankPart(Part):
    """Layers of low rank against dense ones."""

    name = "lowrank"
    help = "five layers of low rank against dense ones: a training step, inference, memory"
    shared = ("width",)
    quantities = (
        Quantity("step", "step ms", "a training step"),
        Quantity("adaptive", "ranks may change ms", "a step, ranks may change", against="step"),
        Quantity("inference", "inference ms", "inference"),
        Quantity("peak_bytes", "peak bytes", "peak memory"),
    )
    title = "five layers of {width:,}, batch {batch_size}: time by rank"
    heading = "five hidden layers of {width:,}, batch of {batch_size}, SGD inside"
    subject, base_name = "layers", "dense"

    def measure(self, settings: Bench, done: Callable[[str], None]) -> list[Measurement]:
        """Measure the dense network, and one of every rank.

        Returns:
            Rows with ``width``, ``rank`` (0: dense), ``batch_size``; the timings ``step`` (ranks
            stay), ``adaptive`` (ranks may change at each step) and ``inference``; ``peak_bytes`` of
            two training steps, in a process of its own.
        """
        width, batch_size, device = settings.width, settings.batch_size, settings.torch_device
        x, y = random_batch(batch_size, device)
        rows: list[Measurement] = []
        steps: dict[str, Callable[[], object]] = {}
        for rank in (DENSE, *settings.ranks):
            arguments = (width, rank, batch_size, str(device))
            bytes_ = run_in_process(peak, *arguments, memory_of=f"rank {rank}")
            rows.append(
                {"width": width, "rank": rank, "batch_size": batch_size, "peak_bytes": bytes_}
            )
            net = network(width, rank).to(device)
            steps[f"step {rank}"] = training_step(net, x, y, make_optimizer(net, rank))
            if rank != DENSE:
                other = network(width, rank).to(device)
                optimizer = make_optimizer(other, rank, adapting=True)
                steps[f"adaptive {rank}"] = training_step(other, x, y, optimizer)
            steps[f"inference {rank}"] = _inference(net, x)
        timings = interleaved(steps, settings.seconds, device)
        for row in rows:
            for key in ("step", "adaptive", "inference"):
                if f"{key} {row['rank']}" in timings:
                    row[key] = timings[f"{key} {row['rank']}"]
        done(f"low rank at width {width:,}")
        return rows

    def label(self, row: Measurement) -> str:
        """Name the rank."""
        return f"rank {row['rank']:,}" if row["rank"] else "dense"

    def draw(self, axes: Axes, rows: Sequence[Measurement]) -> None:
        """Draw times and peak memory by rank, and mark the rank at which a step breaks even."""
        factored = [row for row in rows if row["rank"] != DENSE]
        ranks = [row["rank"] for row in factored]
        step, adaptive, inference, memory = self.quantities
        for quantity, colour, line, label in (
            (step, GREEN, "o-", "training step, ranks stay"),
            (adaptive, ORANGE, "o-", "training step, ranks may change"),
            (inference, BLUE, "o-", "inference"),
            (memory, "0.5", "s:", "peak training memory"),
        ):
            ratios = [self.ratio(row, rows, quantity) or math.nan for row in factored]
            axes.plot(ranks, ratios, line, color=colour, label=label)
        even = break_even(rows)
        if even is not None:
            known = even < max(ranks)
            axes.axvline(even, color=GREEN, linewidth=0.8, linestyle="--")
            axes.annotate(
                f"a step breaks even at rank {even:,.0f}" if known else "no break-even up to here",
                (even, 0.03),
                xycoords=axes.get_xaxis_transform(),
                xytext=(-3, 0),
                textcoords="offset points",
                ha="right",
                fontsize=5.5,
            )
        axes.axhline(1, color="0.3", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda x, _: show_number(x)))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xticks(ranks)
        axes.set_xlabel("rank")
        axes.set_ylabel("times the dense network's")
        axes.legend(loc="upper left")


LowRankPart()
