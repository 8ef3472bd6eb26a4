"""A task of your own: a physics-informed network for a differential equation with known solution.

    subspan train --task examples.physics:task --dim 200
    subspan sweep --task examples.physics:task --dims 10,30,100,300,1000 --epochs 30

Poisson's equation on the unit square (Raissi, Perdikaris and Karniadakis 2019, in the form with
exact boundary values of Lagaris 1998):

    −Δu = 8π² sin(2πx) sin(2πy),  u = 0 on the boundary;  solution  u = sin(2πx) sin(2πy).

The score is the relative error in the mean square, of which less is better; u = 0 has error 1.
"""

import math

import torch
from torch import Tensor, nn

from subspan.training.score import Score
from subspan.training.tasks import Part, Task


def solution(points: Tensor) -> Tensor:
    """What is known: u (n, 1) at points (n, 2)."""
    return torch.sin(2 * math.pi * points).prod(dim=1, keepdim=True)


class Field(nn.Module):
    """u(x, y) = 16 x (1 − x) y (1 − y) N(x, y): zero on the boundary whatever the network N is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
        )

    def forward(self, points: Tensor) -> Tensor:
        """At points (n, 2)."""
        return 16 * (points * (1 - points)).prod(dim=1, keepdim=True) * self.net(points)


class Poisson(Task):
    """Points at which the equation is to hold, drawn once; the error is measured on others."""

    score = Score("relative error", higher_is_better=False, zero=1.0, percent=False)

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        points = torch.rand(2000 + 500 + 500, 2, generator=generator)
        self.train, self.validation, self.test = points.split([2000, 500, 500])

    def network(self) -> nn.Module:
        """From points (n, 2) to u (n, 1)."""
        return Field()

    def size(self) -> int:
        """How many points."""
        return len(self.train)

    def batch(self, index: Tensor) -> Tensor:
        """Points (n, 2)."""
        return self.train[index]

    def loss(self, net: nn.Module, batch: Tensor) -> Tensor:
        """The mean square of Δu + 8π² sin(2πx) sin(2πy), which the equation wants to be zero."""
        points = batch.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(points).sum(), points, create_graph=True)
        laplacian = sum(
            torch.autograd.grad(slope[:, i].sum(), points, create_graph=True)[0][:, i : i + 1]
            for i in range(2)
        )
        return (laplacian + 8 * math.pi**2 * solution(points)).square().mean()

    def evaluate(self, net: nn.Module, part: Part) -> tuple[float, float]:
        """The loss there, and |u − solution| / |solution|."""
        points = getattr(self, part)
        loss = float(self.loss(net, points).detach())
        with torch.no_grad():
            exact = solution(points)
            return loss, float((net(points) - exact).norm() / exact.norm())


def task(seed: int = 0) -> Poisson:
    """Its points are drawn by the run's seed."""
    return Poisson(seed)
