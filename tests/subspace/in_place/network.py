"""A network with what people write around their layers, in a subspace and merged."""

import asyncio

import pytest
import torch
from torch import nn

from subspan import SubspaceModel, SubspanError
from tests.nets import scatter


class Net(nn.Module):
    """A wrapper that people write around their layers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
        self.head = nn.Linear(16, 4)
        self.flag = False

    def forward(self, x, depth=0):
        x = self.head(self.body(x)) * (2 if self.flag else 1)
        return x if depth == 0 else self(torch.cat([x, x], -1), depth - 1)

    @property
    def scale(self):
        return self.head.weight.norm()

    def stream(self, x):
        for layer in (self.body, self.head):
            x = layer(x)
            yield x

    async def answer(self, x):
        await asyncio.sleep(0)
        return self.head(self.body(x))

    def penalty(self):
        return sum(p.square().sum() for p in self.parameters())

    def part_penalty(self):
        return sum(p.square().sum() for p in self.body.parameters())

    @property
    def kind(self):
        return next(self.parameters()).device, next(p.dtype for p in self.parameters())

    def save_pretrained(self, path):
        torch.save({name: value for name, value in self.state_dict().items()}, path)  # noqa: C416

    def reset_classifier(self, classes):
        self.head = nn.Linear(16, classes)


def pair(**options):
    """A model whose coordinates are not zero, and its merged network; evaluation mode."""
    torch.manual_seed(0)
    model = scatter(SubspaceModel(Net(), 20, **options)).eval()
    return model, model.merge(), torch.randn(5, 8)


class Bag(nn.Module):
    """Embeddings with padding, by rows and in bags."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(11, 6, padding_idx=0, sparse=True)
        self.bags = nn.EmbeddingBag(11, 6, padding_idx=2)
        self.gru = nn.GRU(6, 6, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.gru(self.rows(x))[0].sum(1).add(self.bags(x).repeat(1, 2))


def same_function(model, x, run):
    """Whether a refusal leaves the model as it was."""
    want, names = model(x), list(model.body.state_dict())
    with pytest.raises(SubspanError) as refusal:
        run()
    assert torch.equal(model(x), want)
    assert list(model.body.state_dict()) == names
    return str(refusal.value)
