"""What moves accuracy per number: one change at a time of a training in a small subspace.

    SUBSPAN_DATA=… python benchmarks/few_numbers.py --out benchmarks/results/few-numbers

The base is the recipe golf on MNIST with fewer epochs: separable convolutions (1,714 weights)
through d = 500 numbers of ``hash``, Adam, one cycle of the rate, batches of 128. Each row changes
one thing, and is judged by the accuracy on the validation part (a twelfth of the training images)
over seeds, which draw θ₀, P and the batches; the test part is not looked at. All rows but that of
the constant rate have the rate that was chosen for the base. Trainings that are complete in
``--out`` are not repeated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrize

import subspan
from subspan.files import write_atomically
from subspan.subspace import init
from subspan.training import machine, tasks
from subspan.training.config import Training
from subspan.training.evaluate import evaluate
from subspan.training.schedule import schedule

DIM, RATE, BATCH = 500, 0.055, 128
GOLF, WIDE = "separable-8-16-16-16-16", "separable-16-32-32-32-32"
CHANGES: dict[str, dict[str, Any]] = {
    "base": {},
    "a wider network (5,210 weights)": {"net": WIDE},
    "θ₀ times 0.7": {"start": 0.7},
    "θ₀ times 1.4": {"start": 1.4},
    "rows of P times 1/fan_in^¼": {"fan_in": True},
    "coordinates of each layer, by √size": {"compartments": "layer"},
    "a constant rate, a third as high": {"schedule": "constant", "lr": RATE / 3},
    "affine changes of the images": {"augment": "affine"},
    "d grows: 125, 250, 500": {"dims": (125, 250, 500)},
    "distilled from all weights of the wider network": {"teacher": True},
}


class Times(nn.Module):
    """A weight that is a constant times what is trained."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return the weight."""
        return self.factor * x

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return what is trained."""
        return weight / self.factor


def scale_rows(net: nn.Module) -> None:
    """Scale the rows of P by 1/fan_in^¼ of their tensors, and all rows so that ‖P w‖ stays."""
    weights = [(m, m.weight) for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    sizes = {m: weight.numel() for m, weight in weights}
    factors = {m: weight[0].numel() ** -0.25 for m, weight in weights}
    mean = sum(sizes[m] * factors[m] ** 2 for m in sizes) / sum(sizes.values())
    for m, factor in factors.items():
        parametrize.register_parametrization(m, "weight", Times(factor / mean**0.5))


def batches(size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Yield the samples of every step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(size, generator=generator).split(BATCH)


def teach(training: Training, folder: Path, epochs: int) -> nn.Module:
    """Return the wider network with all weights trained, of seed 0; it is trained once."""
    task = tasks.load(replace(training, net=WIDE), 0)
    net, file = init.build(task.network, 0), folder / "teacher.pt"
    if file.exists():
        net.load_state_dict(torch.load(file, weights_only=True))
        return net.eval()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.005)
    rates = schedule(optimizer, "onecycle", epochs * -(-task.size() // BATCH))
    for index in batches(task.size(), epochs, seed=0):
        optimizer.zero_grad()
        task.loss(net, task.batch(index)).backward()
        optimizer.step()
        rates.step()
    torch.save(net.state_dict(), file)
    return net.eval()


def train(name: str, seed: int, epochs: int, folder: Path) -> dict[str, Any]:
    """Train one row with one seed.

    Returns:
        Validation accuracies: of the last coordinates, and of their mean over the last quarter of
        the steps ("averaged").
    """
    torch.set_num_threads(1)
    how = CHANGES[name]
    options = {"augment": how["augment"]} if "augment" in how else {}
    training = Training(net=how.get("net", GOLF), data="mnist", task_options=options)
    task = tasks.load(training, seed)
    net = init.build(task.network, seed)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(how.get("start", 1.0))
    if how.get("fan_in"):
        scale_rows(net)
    dims = how.get("dims", (DIM,))
    compartments = how.get("compartments", "global")
    model = subspan.SubspaceModel(net, dims[0], compartments=compartments, seed=seed)
    teacher = teach(training, folder, epochs) if how.get("teacher") else None

    def loss(batch: Any) -> Tensor:
        if teacher is None:
            return task.loss(model, batch)
        x = task.images.normalize(batch.images)  # type: ignore[attr-defined]
        with torch.no_grad():
            told = F.log_softmax(teacher(x) / 2, dim=1)
        y = model(x)
        soft = F.kl_div(F.log_softmax(y / 2, dim=1), told, log_target=True, reduction="batchmean")
        return (4 * soft + F.cross_entropy(y, batch.labels)) / 2

    torch.manual_seed(seed)
    total = epochs * -(-task.size() // BATCH)
    ends = [total * (n + 1) // len(dims) for n in range(len(dims))]
    optimizer = rates = None
    mean, count = torch.zeros(DIM), 0
    for step, index in enumerate(batches(task.size(), epochs, seed)):
        if step == 0 or step in ends:  # a cycle of the rate for every d
            stage = ends.index(step) + 1 if step else 0
            if step:
                subspan.grow(model, dims[stage])
            lr = how.get("lr", RATE) * (DIM / dims[stage]) ** 0.5
            optimizer = torch.optim.Adam(model.parameters(), lr=lr)
            rates = schedule(optimizer, how.get("schedule", "onecycle"), total // len(dims) + 1)
        assert optimizer is not None
        assert rates is not None
        optimizer.zero_grad()
        loss(task.batch(index)).backward()
        optimizer.step()
        rates.step()
        if step >= 0.75 * total and len(dims) == 1:
            w = torch.cat([p.detach() for p in model.parameters()])
            mean, count = mean + w, count + 1
    scores = {"last": evaluate(model, task, "validation")[1]}
    if count:
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(mean / count, model.parameters())
        scores["averaged"] = evaluate(model, task, "validation")[1]
    return scores


def run(job: tuple[str, int], epochs: int, folder: Path) -> tuple[str, int, dict[str, Any]]:
    """Train, and say which it was."""
    name, seed = job
    return name, seed, train(name, seed, epochs, folder)


def main() -> None:
    """Train all rows, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder of the record")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="rows with this in their name")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "results.json"
    asked = {"dim": DIM, "lr": RATE, "batch_size": BATCH, "net": GOLF, "epochs": given.epochs}
    record: dict[str, Any] = {"config": asked, "scores": {}}
    if file.exists():
        record = json.loads(file.read_text())
        if record["config"] != asked:
            parser.error(f"{file} is of other epochs: give another --out")
    record |= {"versions": machine.versions(), "device": machine.device_name(torch.device("cpu"))}
    scores = record["scores"]
    rows = [name for name in CHANGES if given.only in name]
    jobs = [(name, seed) for seed in range(given.seeds) for name in rows]
    jobs = [(name, seed) for name, seed in jobs if str(seed) not in scores.get(name, {})]
    if any(name.startswith("distilled") for name, _ in jobs):  # before there are several processes
        teach(Training(net=GOLF, data="mnist"), given.out, given.epochs)
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        work = partial(run, epochs=given.epochs, folder=given.out)
        for name, seed, found in pool.imap_unordered(work, jobs):
            scores.setdefault(name, {})[str(seed)] = found
            write_atomically(file, json.dumps(record, indent=1, ensure_ascii=False).encode())
            print(f"{name}, seed {seed}: {found}", flush=True)
    print("\n| change | validation, % | coordinates averaged |\n| --- | --- | --- |")
    for name in rows:
        columns = []
        for which in ("last", "averaged"):
            values = [100 * s[which] for s in scores[name].values() if which in s]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            columns.append(f"{statistics.mean(values):.2f} ± {spread:.2f}" if values else "")
        print(f"| {name} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
