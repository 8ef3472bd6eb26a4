"""Several runs, one after the other, by the processes of one launcher: its ``-m`` is this."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from subspan import distributed
from subspan.training.config import Run, Training
from subspan.training.tasks import Part, Task
from subspan.training.train import train
from tests.runs import a_run


class Groups(Task):
    """Numbers in groups, as texts of like length are: a step calls the network for each.

    Of the 5 samples that are left over, one process has 2 groups and the other 3. The network has a
    buffer that a gradient needs, as BERT's of positions.
    """

    def __init__(self, seed: int) -> None:
        self.x = torch.randn(37, 4, generator=torch.Generator().manual_seed(seed))

    def network(self) -> nn.Module:
        return Placed()

    def size(self) -> int:
        return len(self.x)

    def batch(self, index: Tensor) -> list[Tensor]:
        return list(self.x[index].chunk(4))

    def loss(self, net: nn.Module, batch: list[Tensor]) -> Tensor:
        scores = torch.cat([net(group) for group in batch])
        return cross_entropy(scores, (torch.cat(batch).sum(1) > 0).long())

    @torch.no_grad()
    def evaluate(self, net: nn.Module, part: Part) -> tuple[float, float]:
        right = net(self.x).argmax(1) == (self.x.sum(1) > 0)
        return float(self.loss(net, [self.x])), float(right.float().mean())


class Placed(nn.Module):
    """Linear layers, and an embedding of the positions of their input."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.out = nn.Embedding(4, 4), nn.Linear(4, 2)
        self.register_buffer("positions", torch.arange(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x[:, None] * self.places(self.positions)).sum(2).tanh())


def groups(seed: int) -> Groups:
    return Groups(seed)


# 1,317 images for training leave a last batch of 37, which neither two nor four share equally, and
# one of 1, which is not enough for them.
ODD = {"validation": 0.084, "epochs": 3}
RUNS = {
    "hash": a_run(dim=40, optimizer="sgd", lr=0.1, **ODD),
    "full": a_run("full", lr=0.003, **ODD),
    "one-left": a_run("full", lr=0.1, optimizer="sgd", batch_size=1316, **ODD),
    "rbd": a_run("rbd", dim=20, lr=0.5, **ODD),
    "groups": Run(
        Training(task="tests.training.together:groups", epochs=3, batch_size=8, optimizer="sgd"),
        "hash",
        {"dim": 10},
        0.5,
    ),
}

if __name__ == "__main__":
    for name, run in RUNS.items():
        train(run, Path(sys.argv[1]) / name)
    distributed.leave()
