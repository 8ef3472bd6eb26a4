"""Small networks with linear layers, and models of their LoRA factors."""

from __future__ import annotations

import torch
from torch import nn

import subspan
from subspan import SubspaceModel
from tests.nets import scatter


class Block(nn.Module):
    """Words, two linear layers, a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.down = nn.Linear(12, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.norm(self.up(self.words(x))).relu()).mean(1))


WORDS = torch.arange(15).view(3, 5) % 11
LORA = {"rank": 2, "alpha": 3, "targets": ["up", "down"], "train_fully": ["head"]}


def block(dtype: torch.dtype = torch.float32) -> Block:
    """The same weights at each call; torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Block().to(dtype)


def lora(dtype: torch.dtype = torch.float32, dim: int = 10, **options: object) -> SubspaceModel:
    """A model with coordinates that are not zero."""
    model = subspan.lora(block(dtype), dim, **LORA | options)  # type: ignore[arg-type]
    scatter(model)
    return model


def products(model: SubspaceModel) -> dict[str, torch.Tensor]:
    """s B A of each layer, by its name."""
    thetas = model.subspace.all()
    found = {}
    for adapter in model.subspace.adapters.values():
        a, b = (thetas[name].detach() for name in adapter.factors)
        found[adapter.layer] = (b @ a) * adapter.scaling
    return found
