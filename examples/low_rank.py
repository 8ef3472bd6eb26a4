"""A trained network made small afterwards: truncated, mended by DLRT, and plain PyTorch again.

What comes out needs no subspan: two ordinary layers in the place of one.
``python examples/low_rank.py``
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Optimizer

import subspan
from subspan import layers
from subspan.optim import DLRT


def train(net: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, epochs: int) -> None:
    """An ordinary loop."""
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """In percent."""
    with torch.no_grad():
        return 100 * (net(x).argmax(1) == y).float().mean().item()


def main() -> None:
    """Train, cut the ranks, go on at these ranks, and hand over a plain network."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train_x, train_y, test = x[:1400], y[:1400], (x[1400:], y[1400:])

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10)
    )
    train(net, Adam(net.parameters(), lr=0.001), train_x, train_y, epochs=15)
    print(f"trained: {subspan.count(net).dense:,} weights, {accuracy(net, *test):.1f} %")

    layers.factorize(net, rank=6, exclude="4")  # W ≈ U S Vᵀ, the best of this rank
    print(f"truncated to rank 6: {accuracy(net, *test):.1f} %")

    optimizer = DLRT(net, lr=0.002, base="adam")  # U and V stay orthonormal while they turn
    train(net, optimizer, train_x, train_y, epochs=5)
    print(f"after five epochs of DLRT: {accuracy(net, *test):.1f} %")

    layers.merge(net, factors=True)
    numbers = sum(p.numel() for p in net.parameters())
    foreign = {
        type(m).__name__ for m in net.modules() if not type(m).__module__.startswith("torch")
    }
    print(
        f"handed over: {numbers:,} numbers, {accuracy(net, *test):.1f} %, "
        f"modules that are not PyTorch's: {foreign or 'none'}"
    )
    print(net)


if __name__ == "__main__":
    main()
