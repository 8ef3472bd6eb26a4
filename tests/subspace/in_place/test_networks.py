"""A model is its merged network: every kind of network, every family."""

import abc
import copy
import typing

import pytest
import torch
from torch import nn

import subspan
from subspan import SubspaceModel, SubspanError, projections
from tests.nets import NETS, batch, scatter
from tests.subspace.in_place.network import Bag

pytestmark = pytest.mark.usefixtures("forming")


class Block(nn.Module):
    """A residual block as of torchvision, with a shortcut."""

    def __init__(self, inside, outside):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, 2, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, groups=2, bias=False)
        self.shortcut = nn.Conv2d(inside, outside, 1, 2)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class Vision(nn.Module):
    """A vision Transformer as of timm: parameters of the outermost module, layer scales."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token, self.position = (
            nn.Parameter(torch.zeros(1, 1, 16)),
            nn.Parameter(torch.rand(1, 5, 16)),
        )
        self.scale = nn.ParameterList([nn.Parameter(torch.ones(16)) for _ in range(2)])
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        for scale, block in zip(self.scale, self.blocks, strict=True):
            x = x + scale * block(x)
        return self.head(self.norm(x)[:, 0])


IMAGES, WORDS = torch.rand(3, 3, 8, 8), torch.arange(20).view(4, 5) % 11
KINDS = {
    "torchvision": (
        lambda: nn.Sequential(Block(3, 8), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8, 4)),
        IMAGES,
    ),
    "timm": (Vision, IMAGES),
    "bag": (Bag, WORDS),
    "seq2seq": (lambda: nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True), None),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))),
        batch("mlp"),
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.ConvTranspose3d(3, 4, 2), nn.GroupNorm(2, 4)),
        torch.rand(2, 3, 2, 2, 2),
    ),
    **{name: (NETS[name], batch(name)) for name in NETS},
}


# Quick are all networks with two families, one that makes its rows alone and one that makes all
# rows at once, and all families with two networks.
PAIRS = [
    pytest.param(
        kind,
        family,
        marks=()
        if family in ("hash", "orthogonal") or kind in ("cnn", "bag")
        else pytest.mark.slow,
    )
    for kind in KINDS
    for family in projections()
]


@pytest.mark.parametrize(("kind", "family"), PAIRS)
def test_a_model_is_its_merged_network(kind, family):
    make, x = KINDS[kind]
    inputs = (torch.rand(2, 5, 8), torch.rand(2, 4, 8)) if x is None else (x,)
    torch.manual_seed(0)
    model = scatter(SubspaceModel(make(), 12, projection=family)).eval()
    merged = model.merge()
    want = merged(*inputs)
    assert not torch.allclose(copy.deepcopy(model).unwrap()(*inputs), want)
    for net in (model, model.body):
        assert (net(*inputs) - want).abs().max() <= 1e-6 * want.abs().max()


@pytest.mark.parametrize("first", [abc.ABC, typing.Generic[typing.TypeVar("T")]])
def test_networks_of_abstract_and_generic_classes(first):
    """Python lays their instances out after the base that comes first."""

    class Base(first, nn.Module):
        def forward(self, x):
            return self.layer(x)

    class Net(Base):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

    model = scatter(SubspaceModel(nn.Sequential(Net(), nn.ReLU()), 10))
    x = torch.randn(3, 8)
    assert isinstance(model.body[0], Base)
    assert torch.equal(model(x), model.merge()(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert type(model.unwrap()[0]) is Net


@pytest.mark.parametrize("part", [False, True])
def test_networks_that_are_made_of_a_graph(part, tmp_path):
    def net():
        torch.manual_seed(0)
        net = torch.fx.symbolic_trace(NETS["cnn"]())
        return nn.Sequential(net, nn.ReLU()) if part else net

    model, x = scatter(SubspaceModel(net(), 10)).eval(), batch("cnn")
    twin, merged, want = copy.deepcopy(model), model.merge(), model(x).detach()
    scatter(model, 2)
    for other in (twin, twin.merge(), merged, copy.deepcopy(merged)):
        assert torch.equal(other(x), want)
    assert not torch.equal(model(x), want)
    assert torch.equal(model(x), model.merge()(x))
    made = model.body[0] if part else model.body
    with pytest.raises(SubspanError, match="the graph of a network in a subspace cannot be comp"):
        made.recompile()
    merged = model.merge()
    graph = (merged[0] if part else merged).graph
    graph.output_node().replace_input_with(graph.output_node().args[0], next(iter(graph.nodes)))
    (merged[0] if part else merged).recompile()
    assert torch.equal(merged(x), x.relu() if part else x)
    want = model(x)  # whose code is its own
    subspan.save(model, tmp_path / "m")
    assert torch.equal(subspan.load(tmp_path / "m", net().eval())(x), want)
    model.unwrap()
    made.recompile()


class Graph(nn.Module):
    """A network of a graph, whose edges are a buffer."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("edges", make(torch.eye(6) + torch.eye(6).roll(1, 0)))
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        edges = self.edges if self.edges.layout != torch.strided else self.edges.real
        return edges @ self.fc(x)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", ["sparse", "sparse_csr", "conj"])
def test_buffers_that_are_not_stored_as_a_dense_block(kind, tmp_path):
    def make(a):
        return (a * (1 + 1j)).conj() if kind == "conj" else getattr(a, f"to_{kind}")()

    model, x = scatter(SubspaceModel(Graph(make), 5)), torch.randn(6, 6)
    model.body.edges = make(torch.eye(6) + torch.eye(6).roll(1, 0))
    y = model(x)
    for other in (model.merge(), copy.deepcopy(model)):
        assert torch.equal(other(x), y)
    subspan.save(model, tmp_path / "m")
    assert torch.equal(subspan.load(tmp_path / "m", Graph(make))(x), y)
    model.body.edges = make(torch.eye(6))
    assert list(model.changed_buffers()) == ["edges"]
    if kind != "conj":
        said = r"body\.edges is torch\.sparse_.*, and a file holds dense tensors only"
        with pytest.raises(SubspanError, match=said):
            subspan.save(model, tmp_path / "m")


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", ["sparse", "sparse_csr"])
def test_sparse_parameters_stay_and_are_not_trained(kind):
    net = Graph(torch.clone)
    net.fc.weight = nn.Parameter(getattr(torch.eye(3, 6), f"to_{kind}")())
    for options in ({}, {"targets": "fc.bias", "train_fully": "fc.weight"}):
        with pytest.raises(SubspanError, match=r"fc\.weight is torch\.sparse_.* must be dense"):
            SubspaceModel(net, 3, **options)
    model = SubspaceModel(net, 3, targets="fc.bias")
    model.state_dict()
    with torch.no_grad():
        (net.fc.weight if kind == "sparse" else net.fc.weight.values()).mul_(2)
    with pytest.raises(SubspanError, match=r"θ₀ of fc\.weight was changed"):
        model.state_dict()
