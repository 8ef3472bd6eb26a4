"""Products of sums in networks: which layers, what is counted, and what a file holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from subspan import SubspanError, checkpoint, count, load, save
from subspan.layers import ProductOfSums, merge, product_of_sums, recipes
from tests.nets import batch, build


def some(n, m):
    return [{"kind": "free", "inner": 2}, {"kind": "hash", "p": min(9, 2 * m)}]


RULES = {
    "mlp": {".*": [{"kind": "rank1", "p": 3}]},
    "cnn": {".*": some},
    "encoder": {".*_proj": recipes.hashed(5), "linear1": [{"kind": "gaussian", "p": 4}]},
}


def made(kind, **more):
    torch.manual_seed(0)
    return product_of_sums(build(kind), RULES[kind], seed=7, **more)


def sums(net):
    return {name: m for name, m in net.named_modules() if isinstance(m, ProductOfSums)}


@pytest.mark.parametrize("kind", RULES)
def test_a_network_trains_and_merges(kind):
    net = made(kind)
    assert sums(net)
    before = net(batch(kind))
    assert before.shape == build(kind)(batch(kind)).shape
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (net(batch(kind)) - before.detach().flip(0)).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0]
    net.eval()
    expected = net(batch(kind))
    plain = merge(net)
    assert not sums(plain)
    torch.testing.assert_close(plain(batch(kind)), expected)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("given", ["module", "function", "replaced"])
def test_a_file_holds_the_coefficients_and_a_seed(kind, given, tmp_path):
    net = made(kind)
    for p in net.parameters():
        nn.init.normal_(p, 0, 0.1)
    path = tmp_path / "net.safetensors"
    size = save(net, path)
    other = made(kind) if given == "replaced" else build(kind)
    back = load(path, (lambda: other) if given == "function" else other)
    torch.testing.assert_close(back.eval()(batch(kind)), net.eval()(batch(kind)), rtol=0, atol=0)
    header = checkpoint.inspect(path)
    assert header["kind"] == "product-of-sums"
    assert header["sums"].keys() == sums(net).keys()
    numbers = sum(p.numel() for p in net.parameters()) + sum(
        b.numel() for b in net.state_dict().values()
    )
    assert size < 4 * numbers + 400 * (len(net.state_dict()) + len(sums(net))) + 2000
    with pytest.raises(SubspanError, match="is of a network of"):
        load(path, nn.Linear(3, 3))


def test_matrices_of_the_user_are_in_the_file(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    product_of_sums(
        net, {"0": [{"kind": "given", "tensor": torch.randn(2, 4, 3), "inner": 3}, "free"]}
    )
    save(net, tmp_path / "net.safetensors")
    back = load(
        tmp_path / "net.safetensors", nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    )
    x = torch.randn(5, 6)
    assert torch.equal(back(x), net(x))


def test_counts():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
    dense = count(net).dense
    product_of_sums(net, {"0": recipes.hashed(5)}, bias=2)
    product_of_sums(net, {"2": recipes.low_rank(2)}, bias=False)
    found = count(net)
    assert found.inference == found.stored == 5 + 2 + 2 * (288 + 10)
    assert found.dense == dense - 10  # the bias that was left out


def test_every_layer_draws_its_own():
    net = product_of_sums(
        nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)), {".*": recipes.hashed(4)}
    )
    first, second = sums(net).values()
    second.a0.data.copy_(first.a0.data)
    assert not torch.equal(first.weight, second.weight)


def test_what_does_not_fit_leaves_the_network_as_it_was():
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4))
    for rules, message in (
        ({".*": ["circulant"]}, "layer '0': factor 1 of 1, 4 × 6.*circulant must be square"),
        ({"3": ["free"]}, "unknown pattern in targets"),
        ({}, "there is no layer to"),
    ):
        with pytest.raises(SubspanError, match=message):
            product_of_sums(net, rules)
        assert not sums(net)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(SubspanError, match="shares its weight"):
        product_of_sums(tied, {".*": ["circulant"]})
