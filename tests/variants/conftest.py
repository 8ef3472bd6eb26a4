"""A model with a head and buffers, and what a variant of it should compute."""

import copy

import pytest
import torch

from subspan import SubspaceModel
from subspan.subspace import formed
from tests.nets import build, wrap


@pytest.fixture(params=["kept", "passing"])
def forming(request, monkeypatch):
    """The ways to form θ of small and of large networks, on the same small ones."""
    if request.param == "passing":
        monkeypatch.setattr(formed, "KEPT", 0)
    return request.param


@pytest.fixture
def model():
    """A network with BatchNorm whose last layer is trained fully, in evaluation mode."""
    return wrap("cnn", train_fully=["head"]).eval()


def vector(seed, dim=12):
    return 0.5 * torch.randn(dim, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def trained(model, seed):
    """A copy of the model as training might leave it: coordinates, head and buffers are others."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    w = torch.cat(list(twin.coordinates.values()))
    parts = vector(seed, len(w)).split([len(w) for w in twin.coordinates.values()])
    for own, part in zip(twin.coordinates.values(), parts, strict=True):
        own.copy_(part)
    for p in twin.fully_trained().values():
        p.add_(torch.randn(p.shape, generator=generator))
    for buffer in twin.body.buffers():
        if buffer is not twin.fingerprint and buffer.is_floating_point():
            buffer.add_(torch.rand(buffer.shape, generator=generator))
    return twin


def own(model):
    """Another model of the same network and recipe, as a program of its own would have it."""
    return SubspaceModel(build("cnn"), 12, train_fully=["head"]).eval()
