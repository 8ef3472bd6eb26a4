"""Two processes, one training: a few numbers travel, not the weights.

``python examples/two_processes.py`` starts itself twice, as ``torchrun --nproc-per-node=2
examples/two_processes.py`` does.
"""

import os
import subprocess
import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam

import subspan
from subspan.optim import RandomBases
from subspan.training.machine import bytes_sent  # by this process so far; where Linux counts it

STEPS, DIM = 300, 300


def build() -> nn.Module:
    """The same weights in both processes: they draw from the same seed."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 160), nn.ReLU(), nn.Linear(160, 240), nn.ReLU(), nn.Linear(240, 10)
    )


def train(name: str, model: nn.Module, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """An ordinary loop; each process takes every second image."""
    rank, world = dist.get_rank(), dist.get_world_size()
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        if step == 10:  # the first steps compare what both must have in common
            before = bytes_sent()
        batch = torch.randint(1400, (128,), generator=order)[rank::world]
        optimizer.zero_grad()
        cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    sent = (bytes_sent() - before) / (STEPS - 10)
    with torch.no_grad():
        accuracy = 100 * (net(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
        weights = torch.cat([p.flatten() for p in net.parameters()])
    theirs = [torch.empty_like(weights) for _ in range(world)]
    dist.all_gather(theirs, weights)
    if rank == 0:
        same = all(torch.equal(weights, other) for other in theirs)
        print(f"{name:40}{sent:8,.0f} bytes a step  {accuracy:.1f} %  the same weights: {same}")


def main() -> None:
    """DDP of all weights, DDP of a subspace, and bases that both processes draw themselves."""
    dist.init_process_group("gloo")

    net = build()
    model = DistributedDataParallel(net)
    weights = subspan.count(net).dense
    train(f"DDP, {weights:,} weights", model, net, Adam(model.parameters(), lr=0.003))

    subspace = subspan.SubspaceModel(build(), DIM)
    model = DistributedDataParallel(subspace)
    train(f"DDP, SubspaceModel of {DIM}", model, subspace, Adam(model.parameters(), lr=0.1))

    net = build()  # no DDP
    train(
        f"RandomBases, {DIM} new directions a step",
        net,
        net,
        RandomBases(net, DIM, lr=12.0, workers="shared"),
    )

    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun started this
        main()
    else:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        one_thread = {"OMP_NUM_THREADS": "1"}  # each, or the two are in each other's way
        words = [*launch, "--nproc-per-node=2", __file__]
        sys.exit(subprocess.call(words, env=one_thread | os.environ))
