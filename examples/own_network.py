"""A network of yours, in a training loop of yours, through 500 numbers.

SubspaceModel is an ordinary module: its parameters are the numbers, and the optimizer, the loss and
the loop are what they were. ``python examples/own_network.py``
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import subspan

OUT = Path("runs/own_network")


class Net(nn.Module):
    """Any module will do: here a few convolutions with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Linear(64 * 2 * 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) to scores (N, 10)."""
        return self.head(self.features(x).flatten(1))


def train(model: nn.Module, x: Tensor, y: Tensor, lr: float, epochs: int = 15) -> None:
    """A loop as you have written it a hundred times; nothing in it knows of subspan."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In percent."""
    model.eval()
    return 100 * (model(x).argmax(1) == y).float().mean().item()


def main() -> None:
    """Train all weights, then 500 numbers; save both and compare."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    train_x, train_y, test_x, test_y = x[:1400], y[:1400], x[1400:], y[1400:]
    OUT.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    net = Net()
    train(net, train_x, train_y, lr=0.003)
    size = subspan.save(net, OUT / "all.safetensors")
    weights = subspan.count(net).dense
    print(f"{weights:,} weights: {accuracy(net, test_x, test_y):.1f} % in {size:,} bytes")

    torch.manual_seed(0)
    model = subspan.SubspaceModel(Net(), 500)
    train(model, train_x, train_y, lr=0.05)  # good rates are between 1/√d and 9/√d
    size = subspan.save(model, OUT / "few.safetensors")
    print(f"500 numbers: {accuracy(model, test_x, test_y):.1f} % in {size:,} bytes")

    # The file goes around the initial weights that the training began with, and refuses others.
    torch.manual_seed(0)
    again = subspan.load(OUT / "few.safetensors", Net())
    print(f"loaded again: {accuracy(again, test_x, test_y):.1f} %")
    try:
        subspan.load(OUT / "few.safetensors", Net())  # the next random numbers: another network
    except subspan.SubspanError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main()
