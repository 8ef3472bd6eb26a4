"""The cost of the laboratory: an epoch of its own loop against one of a bare loop.

The bare loop is what a person would write: normalise, forward, cross entropy, backward, Adam, the
schedule, and a look at the validation part after each epoch. The laboratory's is that of ``subspan
train``, with its checks, files and states. Both go through the same batches. They take turns of a
few steps, so that whatever else the machine does meets both, and an epoch is the sum of its turns,
each the median over all epochs: a burst of other work is then no part of it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR

from subspan.bench.part import Measurement, Quantity
from subspan.bench.settings import Bench
from subspan.bench.step import StepPart
from subspan.bench.timing import Quartiles, rounds_in
from subspan.training import data, devices, nets
from subspan.training.config import Run, Training
from subspan.training.data.images import statistics
from subspan.training.data.order import BATCHES, permutation
from subspan.training.loop import Loop
from subspan.training.methods import method
from subspan.training.prepare import Prepared
from subspan.training.records import Epoch
from subspan.training.tasks.classification import Classification

IMAGES, HELD_OUT = 60_000, 5_000  # of MNIST's size, random
TURN = 8  # steps
METHODS = ("full", "hash")
LOOPS = ("bare", "laboratory")
RATE = 1e-3


def random_images(device: torch.device) -> data.ImageData:
    """Noise with random labels; nothing can be learnt from it, and that takes as long."""

    def split(size: int) -> data.Split:
        images = torch.randint(0, 256, (size, 1, 28, 28), dtype=torch.uint8)
        return data.Split(images, torch.randint(0, 10, (size,)))

    train = split(IMAGES)
    mean, std = statistics(train.images)
    return data.ImageData(
        train,
        split(HELD_OUT),
        classes=10,
        name="noise",
        image_shape=(1, 28, 28),
        validation=split(HELD_OUT),
        mean=mean,
        std=std,
    ).to(device)


def bare(
    model: nn.Module, images: data.ImageData, batch_size: int, orders: Sequence[Tensor]
) -> Iterator[None]:
    """Train, an epoch for each order of the images, with a pause after every turn and epoch."""
    optimizer = Adam(model.parameters(), RATE)
    size = len(images.train)
    steps = -(-size // batch_size)
    schedule = OneCycleLR(optimizer, RATE, total_steps=steps * len(orders), cycle_momentum=False)
    mean, std = images.mean[:, None, None], images.std[:, None, None]
    inputs, labels = images.train.images, images.train.labels
    for order in orders:
        model.train()
        for step in range(steps):
            batch = order[step * batch_size :][:batch_size]
            optimizer.zero_grad()
            x = (inputs.index_select(0, batch).float() / 255 - mean) / std
            cross_entropy(model(x), labels.index_select(0, batch)).backward()
            optimizer.step()
            schedule.step()
            if (step + 1) % TURN == 0:
                yield
        model.eval()
        correct = 0
        with torch.no_grad():
            for some, truth in zip(
                images.validation.images.split(1000),
                images.validation.labels.split(1000),
                strict=True,
            ):
                scores = model((some.float() / 255 - mean) / std)
                correct += int((scores.argmax(dim=1) == truth).sum())
        yield


def _interleaved(
    net: str,
    name: str,
    options: dict[str, Any],
    images: data.ImageData,
    settings: Bench,
) -> dict[str, Quartiles]:
    how, device, batch_size = method(name), settings.torch_device, settings.batch_size

    def model() -> nn.Module:
        return how.wrap(nets.build(net, images.image_shape), 0, options).to(device)

    def orders(epochs: int) -> list[Tensor]:
        size = len(images.train)
        return [
            permutation(size, seed=0, stream=BATCHES, epoch=epoch, device=device)
            for epoch in range(1, epochs + 1)
        ]

    clock, steps = Clock(device), 0
    for _ in bare(model(), images, batch_size, orders(1)):
        pass
    epochs = 1 + rounds_in(settings.seconds, clock.lap())
    other = bare(model(), images, batch_size, orders(epochs))
    turns: list[tuple[float, float]] = []
    ends: list[int] = []

    def change_over() -> None:
        ours = clock.lap()
        next(other)
        turns.append((clock.lap(), ours))

    def on_step() -> None:
        nonlocal steps
        steps += 1
        if steps % TURN == 0:
            change_over()

    def report(row: Epoch) -> None:
        nonlocal steps
        steps = 0
        change_over()
        ends.append(len(turns))

    place: Any = device.type
    training = Training(net, "noise", epochs=epochs, batch_size=batch_size, device=place)
    run = Run(training, name, options, RATE)
    task = Classification(images, net)
    ready = Prepared(run, task, how, model(), init_seed=None)
    with tempfile.TemporaryDirectory() as folder:
        accelerator = devices.accelerator(training)
        loop = Loop(ready, accelerator, Path(folder), None, report, on_step)
        loop.open()
        clock.lap()
        loop.fit()
    # Epochs after the first, which finds nothing in the caches: (epochs, turns, loops).
    measured = np.array(turns[ends[0] :]).reshape(epochs - 1, ends[0], 2)
    low, median, high = np.quantile(measured, (0.25, 0.5, 0.75), axis=0).sum(axis=1).tolist()
    return {
        name: {"median": median[i], "low": low[i], "high": high[i], "calls": epochs - 1}
        for i, name in enumerate(LOOPS)
    }


class Clock:
    """A clock that waits for a device to finish before it is read."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.last = device, time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.last = self.last, time.perf_counter()
        return self.last - before


class Laboratory(StepPart):
    """Epochs of ``subspan train`` against those of a bare loop."""

    name = "laboratory"
    help = "an epoch of subspan train, as it is and in a subspace, against one of a bare loop"
    shared, subject, base_name = ("net", "method"), "loop", "bare"
    quantities = (Quantity("step", "epoch ms", "an epoch"),)
    title = "epoch of {net}, {method}, batch {batch_size}"
    heading = "epoch of {net}, {method}: {images:,} images, batch of {batch_size}"
    unit = "times the bare loop"

    def count(self, settings: Bench) -> int:
        """Count the networks, each with its methods."""
        return len(settings.nets) * len(METHODS)

    def measure(self, settings: Bench, done: Callable[[str], None]) -> list[Measurement]:
        """Time epochs of every network, trained as it is and in a subspace (hash).

        Returns:
            Rows with ``net``, ``method``, ``projection`` (whose loop: "bare", "laboratory"),
            ``batch_size``, ``images`` and the timing ``step`` of an epoch.
        """
        rows: list[Measurement] = []
        images = random_images(settings.torch_device)
        for net in settings.nets:
            for name in METHODS:
                options = {} if name == "full" else {"dim": settings.dim}
                timings = _interleaved(net, name, options, images, settings)
                rows += [
                    {
                        "net": net,
                        "method": name,
                        "projection": loop,
                        "batch_size": settings.batch_size,
                        "images": len(images.train),
                        "step": timing,
                    }
                    for loop, timing in timings.items()
                ]
                done(f"epochs of {net}, {name}")
        return rows

    def full_label(self, row: Measurement) -> str:
        """Name the loop and the method."""
        return f"{row['projection']}, {row['method']}"


Laboratory()
