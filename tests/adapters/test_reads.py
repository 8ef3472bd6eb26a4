"""Layers whose weight a network reads: PEFT would leave a LoRA beside it out."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import subspan
from subspan import SubspaceModel, SubspanError
from tests.nets import scatter

X = torch.linspace(-1, 1, 32).view(4, 8).sin()


class Net(nn.Module):
    """Its second layer is called, or its weight is read, or both."""

    def __init__(self, way):
        super().__init__()
        self.way, self.first, self.second = way, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x.to(self.first.weight.dtype)).tanh()
        if self.way == "checkpoint":
            return checkpoint(self.multiply, x, use_reentrant=True)
        called = self.second(x) if self.way in ("called", "both") else 0
        return called + self.multiply(x) if self.way in ("read", "both") else called

    def multiply(self, x):
        return linear(x, self.second.weight, self.second.bias)


class Own(nn.Linear):
    """A layer that reads its weight itself, as every layer does."""

    def forward(self, x):
        return linear(x, self.weight) + self.bias


def wrap(net, kind):
    torch.manual_seed(0)
    if kind == "lora":
        return scatter(subspan.lora(net, 20, rank=2, targets=["first", "second"]))
    return scatter(SubspaceModel(net, 20, targets=["first.weight", "second.weight"]))


def refused(model, folder):
    with pytest.raises(SubspanError, match="reads the weight of second and does not call"):
        subspan.export_lora(model, folder)
    assert not folder.exists()
    return True


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_weight_that_is_read_alone_is_noticed_without_a_gradient(kind, tmp_path):
    model = wrap(Net("read"), kind)
    with torch.no_grad():
        model(X)
    assert refused(model, tmp_path / "lora")
    assert refused(copy.deepcopy(model), tmp_path / "lora")


@pytest.mark.parametrize("way", ["both", "checkpoint"])
def test_a_weight_that_is_read_beside_a_call_is_noticed_by_its_gradient(way, tmp_path):
    model = wrap(Net(way), "lora")
    model(X).sum().backward()
    assert refused(model, tmp_path / "lora")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_whoever_looks_at_a_weight_does_not_use_it(kind, tmp_path):
    model = wrap(Net("called"), kind)
    (model(X).sum() + model.body.second.weight.square().sum()).backward()
    assert subspan.export_lora(model, tmp_path / "lora").bytes


def test_a_layer_may_read_its_own_weight():
    net = Net("called")
    net.second = Own(8, 8)
    model = wrap(net, "full")
    model(X)
    assert not model.subspace.reads.apart()
    model = wrap(Net("called"), "lora")
    model(X)
    assert not model.subspace.reads.apart()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_file_knows_what_was_read(kind, tmp_path):
    net = Net("read")
    again, model = copy.deepcopy(net), wrap(net, kind)
    path = tmp_path / "model.safetensors"
    subspan.save(model, path)
    assert b'"apart"' not in path.read_bytes()
    model(X)
    subspan.save(model, path)
    loaded = subspan.load(path, again)
    assert refused(loaded, tmp_path / "lora")
    subspan.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
