"""Small networks of every kind that a wrapper must cope with, and a batch for each."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Adam

from subspan import SubspaceModel
from subspan.subspace.parameters import saved_buffers


class MLP(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


class CNN(nn.Module):
    """Convolutions and BatchNorm: buffers that training changes."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(144, 4)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


class LSTM(nn.Module):
    """A layer that keeps its weights in a second place."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 7, 2, batch_first=True), nn.Linear(7, 4)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Encoder(nn.Module):
    """A Transformer encoder."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class Tied(nn.Module):
    """A Parameter in two modules, and a module under two names."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.output = nn.Linear(6, 11, bias=False)
        self.output.weight = self.embedding.weight
        self.again = self.hidden

    def forward(self, x):
        return self.output(self.again(self.hidden(self.embedding(x)).tanh()))


class Raw(nn.Module):
    """Parameters of the outermost module itself, one of them a scalar."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3, 4))
        self.linear = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.linear(x * self.scale.mean(0)) * self.gain


NETS = {"mlp": MLP, "cnn": CNN, "lstm": LSTM, "encoder": Encoder, "tied": Tied, "raw": Raw}
SHAPES = {
    "mlp": (5, 8),
    "cnn": (5, 1, 8, 8),
    "lstm": (5, 6, 5),
    "encoder": (5, 6, 16),
    "raw": (5, 4),
}
DIM = 12
PROJECTIONS = ("hash", "rademacher", "orthogonal", "fastfood")  # by rows and by all rows at once
COMPARTMENTS = ("global", "layer", "tensor", "uniform:3", {".*weight.*": 8, ".*": 4})


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights at each call; torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return NETS[name]().to(dtype)


def batch(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if name == "tied":
        return torch.randint(0, 11, (5,), generator=generator)
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64).to(dtype)


def dim_for(name: str, compartments: object) -> int | None:
    """Enough coordinates for these compartments; None where they say it themselves."""
    if isinstance(compartments, dict):
        return None
    return 40 if name == "encoder" and compartments in ("layer", "tensor") else DIM


def wrap(
    name: str,
    compartments: object = "global",
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> SubspaceModel:
    dim = dim_for(name, compartments)
    return SubspaceModel(build(name, dtype), dim, compartments=compartments, **options)


def fit(model: nn.Module, x: Tensor, steps: int = 3) -> list[float]:
    """The losses of a few steps of Adam."""
    optimizer, losses = Adam(model.parameters(), lr=0.1), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def scatter(net: nn.Module, scale: float = 0.3) -> nn.Module:
    """Move parameters and buffers as training might, always in the same way."""
    generator = torch.Generator().manual_seed(3)
    for p in net.parameters():
        p += scale * torch.randn(p.shape, generator=generator)
    for buffer in saved_buffers(net).values():
        if buffer.is_floating_point():
            buffer *= 1.5
    return net
