"""Checkpoints of factored networks: their ranks, their size, and networks they do not belong to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils.parametrize import register_parametrization

from subspan import SubspaceModel, SubspanError, checkpoint, load, save
from subspan.layers import LowRank, LowRankLinear, factorize, product_of_sums, protocol
from subspan.optim import DLRT
from tests.nets import batch, build

KINDS = ["mlp", "cnn", "encoder"]


def trained(kind):
    net = factorize(build(kind), ratio=0.8)
    optimizer = DLRT(net, 0.05, tolerance=0.2)
    for _ in range(3):
        optimizer.zero_grad()
        net(batch(kind)).square().mean().backward()
        optimizer.step()
    return net


def ranks(net):
    return {name: m.rank for name, m in net.named_modules() if isinstance(m, LowRank)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", ["module", "function", "factored"])
def test_a_factored_network_comes_back(kind, given, tmp_path):
    net = trained(kind)
    size = save(net, tmp_path / "net.safetensors")
    other = build(kind)
    if given == "factored":
        other = factorize(other, rank=1)
    back = load(tmp_path / "net.safetensors", (lambda: other) if given == "function" else other)
    assert ranks(back) == ranks(net)
    torch.testing.assert_close(back.eval()(batch(kind)), net.eval()(batch(kind)), rtol=0, atol=0)
    numbers = sum(p.numel() for p in net.parameters()) + sum(b.numel() for b in net.buffers())
    assert size < 4 * numbers + 8000
    header = checkpoint.inspect(tmp_path / "net.safetensors")
    assert header["kind"] == "lowrank"
    assert header["ranks"] == ranks(net)


def test_an_earlier_state_of_other_ranks_is_restored(tmp_path):
    net = factorize(build("mlp"), rank=4)
    expected = net(batch("mlp"))
    save(net, tmp_path / "early.safetensors")
    optimizer = DLRT(net, 0.05, tolerance=0.5)
    net(batch("mlp")).square().mean().backward()
    optimizer.step()
    assert max(ranks(net).values()) < 4
    checkpoint.restore(net, checkpoint.read(tmp_path / "early.safetensors")[1])
    assert torch.equal(net(batch("mlp")), expected)
    net(batch("mlp")).square().mean().backward()
    optimizer.step()  # the parameters are still the same objects


def test_another_network_is_refused_and_left_alone(tmp_path):
    save(trained("mlp"), tmp_path / "net.safetensors")
    other = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 9))
    before = other.state_dict()
    with pytest.raises(SubspanError, match="of a network of 212 weights, this one has 217"):
        load(tmp_path / "net.safetensors", other)
    shifted = torch.nn.Sequential(torch.nn.Identity(), *build("mlp"))
    with pytest.raises(
        SubspanError, match="the network has no layer '0' that could be of the type"
    ):
        load(tmp_path / "net.safetensors", shifted)
    assert not ranks(shifted)
    assert other.state_dict().keys() == before.keys()


def test_tensors_of_another_network_change_nothing(tmp_path):
    save(trained("mlp"), tmp_path / "net.safetensors")
    _, tensors = checkpoint.read(tmp_path / "net.safetensors")
    net = factorize(torch.nn.Sequential(torch.nn.Linear(7, 16), torch.nn.Linear(16, 4)), rank=2)
    before = {name: p.clone() for name, p in net.named_parameters()}
    with pytest.raises(SubspanError, match="the checkpoint is of another network"):
        checkpoint.restore(net, tensors)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_a_subspace_of_factors_comes_back(tmp_path):
    """Its weights are the numbers of U, S and V, of which there are fewer than of W."""
    base = factorize(build("mlp"), rank=2)
    model = SubspaceModel(copy.deepcopy(base), 5)
    with torch.no_grad():
        for w in model.coordinates.values():
            w.normal_()
    save(model, tmp_path / "model.safetensors")
    back = load(tmp_path / "model.safetensors", copy.deepcopy(base))
    assert torch.equal(back(batch("mlp")), model(batch("mlp")))


def test_the_header_of_older_types_of_layers_has_the_fields_that_it_had(tmp_path):
    net = factorize(torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)), rank=2)
    header = {"format": 1, "extra": {}, "weights": 59}
    assert checkpoint.contents(net)[0] == header | {"kind": "lowrank", "ranks": {"0": 2, "1": 2}}
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    sums = {"bias": True, "factors": [{"kind": "free"}], "init": "he", "seed": 0, "stream": 0}
    product_of_sums(net, {"0": ["free"]})
    expected = header | {"kind": "product-of-sums", "ranks": {}, "sums": {"0": sums}}
    assert checkpoint.contents(net)[0] == expected
    assert checkpoint.contents(factorize(net, rank=2))[0] == expected | {"ranks": {"1": 2}}


class Doubling(LowRankLinear):
    """A class that is derived from one of ours, and no type of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def with_first(layer):
    return torch.nn.Sequential(layer, torch.nn.Linear(6, 3))


def test_a_derived_class_would_come_back_as_another_function(tmp_path):
    """A file names the type alone, so neither a saved layer nor a loaded one may be of it."""
    path = tmp_path / "net.safetensors"
    with pytest.raises(
        SubspanError, match=r"'0' cannot be saved, since its class, .*\.Doubling, ma"
    ):
        save(with_first(Doubling(6, 6, 2)), path)
    assert not path.exists()
    save(with_first(LowRankLinear(6, 6, 2)), path)
    other = with_first(Doubling(6, 6, 2))
    before = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(SubspanError, match="no layer '0' that could be of the type 'lowrank'"):
        load(path, other)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def test_a_derived_class_is_a_type_of_its_own_when_it_is_registered(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "_types", copy.copy(protocol._types))

    class Tripling(LowRankLinear, type_name="tripling", replaces=torch.nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    net, path, x = with_first(Tripling(6, 6, 2)), tmp_path / "net.safetensors", torch.ones(1, 6)
    save(net, path)
    for other in (torch.nn.Linear(6, 6), Tripling(6, 6, 3)):
        assert torch.equal(load(path, with_first(other))(x), net(x))
    save(with_first(LowRankLinear(6, 6, 2)), path)
    with pytest.raises(SubspanError, match="no layer '0' that could be of the type 'lowrank'"):
        load(path, net)


class Twice(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def test_a_class_that_pytorch_derives_is_saved(tmp_path):
    """That of a parametrization; it says by the names of its tensors which network it needs."""
    net, other = with_first(LowRankLinear(6, 6, 2)), with_first(LowRankLinear(6, 6, 3))
    for one in (net, other):
        register_parametrization(one[0], "bias", Twice())
    save(net, tmp_path / "net.safetensors")
    x = torch.ones(1, 6)
    assert torch.equal(load(tmp_path / "net.safetensors", other)(x), net(x))
    with pytest.raises(SubspanError, match="the checkpoint is of another network"):
        load(tmp_path / "net.safetensors", with_first(LowRankLinear(6, 6, 2)))


def test_a_class_that_fully_shard_derives_is_saved_and_loaded(tmp_path):
    from torch.distributed.fsdp import fully_shard

    meeting = f"file://{tmp_path}/meet"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        net, other = with_first(LowRankLinear(6, 6, 2)), with_first(LowRankLinear(6, 6, 2))
        for one in (net, other):
            fully_shard(one[0])
        save(net, tmp_path / "net.safetensors")
        x = torch.ones(1, 6)
        assert torch.equal(load(tmp_path / "net.safetensors", other)(x), net(x))
    finally:
        torch.distributed.destroy_process_group()
