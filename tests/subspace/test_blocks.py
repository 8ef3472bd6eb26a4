import hashlib
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from subspan import SubspaceModel, projection
from subspan.families.updates import add
from subspan.subspace import blocks
from subspan.subspace.blocks import digest_layout, group_into_blocks, parameter_key
from subspan.subspace.compartments import Compartment, Piece
from subspan.subspace.weights import Weights
from tests.nets import scatter

SIZES = (30, 10, 5, 200, 7)


def plan(family="hash", limit=50):
    pieces = tuple(Piece(f"t{i}", 0, size) for i, size in enumerate(SIZES))
    part = Compartment("a.b", 4, pieces)
    p = projection(family, out_dim=part.weights, in_dim=4)
    return group_into_blocks([part], [p]), p


def test_blocks_cover_every_row_once_in_order(monkeypatch):
    monkeypatch.setattr(blocks, "GROUP", 50)
    found, p = plan()
    assert [(block.start, block.stop) for block in found] == [(0, 45), (45, 245), (245, 252)]
    assert [[len(piece) for piece in block.pieces] for block in found] == [[30, 10, 5], [200], [7]]
    assert {block.coordinates for block in found} == {"a/b"}
    assert {block.recipe for block in found} == {p.recipe}


def test_a_family_that_computes_all_rows_at_once_has_one_block(monkeypatch):
    monkeypatch.setattr(blocks, "GROUP", 50)
    (block,), _ = plan("orthogonal")
    assert (block.start, block.stop, len(block.pieces)) == (0, 252, 5)


def test_keys_are_injective_and_no_attribute_of_the_dictionary():
    names = ["a.b", "a/b", "a%2Fb", "keys", "training", ".*", "pop", "a", "%", "/"]
    keys = [parameter_key(name) for name in names]
    assert len(set(keys)) == len(keys)
    nn.ParameterDict({key: torch.ones(1) for key in keys})
    assert keys[0] == "a/b"


def test_the_layout_sees_all_that_gives_coordinates_a_meaning():
    def digest(dim=4, stop=9, tensor="t", family="sparse", seed=0, **options):
        part = Compartment("name", dim, (Piece(tensor, 0, stop), Piece("u", 1, 3)))
        return digest_layout([part], family, seed, options)

    others = [
        digest(dim=5),
        digest(stop=8),
        digest(tensor="v"),
        digest(family="hash"),
        digest(seed=1),
        digest(s=3),
        digest(s=4),
    ]
    assert len({digest(), *others}) == 8
    text = b'["sparse", 0, {}, [[4, [["t", 0, 9], ["u", 1, 3]]]]]'  # a part of the file format
    assert digest() == hashlib.sha256(text).hexdigest()[:32]


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compartments", ["global", "layer", "uniform:5"])
def test_a_pass_needs_one_theta_beside_the_base(monkeypatch, compartments):
    """A flat vector of all weights, or of all P w, would make it two."""
    monkeypatch.setattr(blocks, "GROUP", 1 << 16)
    net = nn.Sequential(*[nn.Linear(256, 256) for _ in range(16)])
    theta = sum(p.numel() * p.element_size() for p in net.parameters())
    model = SubspaceModel(net, 100, projection="rademacher", compartments=compartments)
    now, peak, form = 0, 0, Weights._theta

    def gone(size):
        nonlocal now
        now -= size

    def seen(self, call):
        nonlocal now, peak
        parts = form(self, call)
        for part in parts:
            now += part.nbytes
            weakref.finalize(part.untyped_storage(), gone, part.nbytes)
        peak = max(peak, now)
        return parts

    monkeypatch.setattr(Weights, "_theta", seen)
    model(torch.ones(1, 256)).sum().backward()
    assert 0 < peak <= theta
    assert now == 0


# ---- parts that the backward pass runs again -----------------------------------------------------


class Recomputed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.reentrant = reentrant

    def forward(self, x):
        hidden = self.first(x)
        if self.reentrant is None:
            return {"out": self.second(hidden)}
        return {"out": checkpoint(self.second, hidden, use_reentrant=self.reentrant)}


@pytest.mark.parametrize("projection", ["hash", "rademacher", "orthogonal"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints_change_no_gradient(reentrant, projection):
    gradients = []
    for how in (None, reentrant):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = Recomputed(how)
        model = scatter(SubspaceModel(net, 5, projection=projection))
        model(torch.ones(2, 3))["out"].square().sum().backward()
        gradients.append(model.coordinates["global"].grad)
    torch.testing.assert_close(*gradients)


def test_what_others_did_before_is_their_affair():
    before = Recomputed(reentrant=True)(torch.ones(2, 3))["out"]
    model = SubspaceModel(nn.Linear(3, 3), 5)
    model(before).sum().backward()
    assert model.coordinates["global"].grad.any()


@pytest.mark.parametrize("family", ["hash", "rademacher"])
def test_a_float64_tensor_of_a_float32_network_keeps_its_digits(family):
    p = projection(family, out_dim=50, in_dim=4)
    base, w = torch.rand(50, dtype=torch.float64), torch.randn(4)
    (theta,) = add(p, [base], w, torch.tensor(0), 0)
    assert torch.equal(theta, base + p.matvec(w))
