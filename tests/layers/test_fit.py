"""Coefficients by least squares: against dense least squares, growing without change, choosing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from subspan import SubspanError, projections
from subspan.layers import (
    ProductOfSumsConv2d,
    ProductOfSumsLinear,
    approximate,
    carry_over,
    fit,
    grow,
    recipes,
)

N, M = 6, 8
DTYPE = torch.float64


def layer(factors, seed=0, **more):
    torch.manual_seed(seed)
    return ProductOfSumsLinear(M, N, factors, dtype=DTYPE, **more)


@pytest.mark.parametrize("kind", [*projections(), "rank1"])
def test_one_sum_is_ordinary_least_squares(kind):
    found = layer([{"kind": kind, "p": 7}])
    target = torch.randn(N, M, dtype=DTYPE)
    error = approximate(found, target)
    columns = []
    for e in torch.eye(7, dtype=DTYPE):
        found_a = found.a0.data.clone()
        found.a0.data = e
        columns.append(found.weight.detach().flatten())
        found.a0.data = found_a
    A = torch.stack(columns, dim=1)
    expected = torch.linalg.lstsq(A, target.flatten().unsqueeze(1), driver="gelsd").solution
    torch.testing.assert_close(A @ found.a0.detach(), (A @ expected)[:, 0], rtol=1e-6, atol=1e-6)
    assert error == pytest.approx(
        float((found.weight.detach() - target).norm() / target.norm()), rel=1e-6
    )


def test_alternating_finds_the_best_low_rank():
    found = layer(recipes.low_rank(2))
    target = torch.randn(N, M, dtype=DTYPE)
    error = approximate(found, target, sweeps=500, tolerance=0)
    tail = torch.linalg.svdvals(target)[2:].norm() / target.norm()
    assert error == pytest.approx(float(tail), rel=1e-4)


def test_what_can_be_reached_is_reached():
    chain = [{"kind": "free", "inner": 8}, "circulant", "hadamard"]
    target = layer(chain, seed=3).weight
    assert approximate(layer(chain), target, sweeps=300) < 1e-4
    conv = ProductOfSumsConv2d(3, 4, 3, [{"kind": "hash", "p": 20}])
    target = torch.randn(4, 3, 3, 3)
    error = approximate(conv, target)
    assert (
        0.3 < error == pytest.approx(float((conv.weight.detach() - target).norm() / target.norm()))
    )


@pytest.mark.parametrize(
    ("kind", "more"),
    [("rank1", 9), ("gaussian", 9), ("rademacher", 9), ("hash", 8), ("hash", 16)],
)
def test_growing_keeps_the_function_where_the_atoms_stay(kind, more):
    small = layer([{"kind": "free", "inner": 5}, {"kind": kind, "p": 4}], bias=3)
    torch.nn.init.normal_(small.bias)
    large = grow(small, [{"kind": "free", "inner": 5}, {"kind": kind, "p": more}])
    x = torch.randn(4, M, dtype=DTYPE)
    torch.testing.assert_close(large(x), small(x), rtol=1e-5, atol=1e-5)
    assert large.sums[1].p == more


def test_growing_comes_near_where_they_do_not():
    small = layer([{"kind": "circulant", "inner": 6}, {"kind": "hash", "p": 10}])
    before = small.weight.detach()
    large = grow(small, [{"kind": "toeplitz", "inner": 6}, {"kind": "gaussian", "p": 40}], sweeps=8)
    assert (large.weight - before).norm() < 0.3 * before.norm()
    torch.testing.assert_close(small.weight, before, rtol=0, atol=0)
    conv = ProductOfSumsConv2d(3, 4, 3, [{"kind": "hash", "p": 9}], stride=2, padding=1)
    x = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(grow(conv, [{"kind": "hash", "p": 27}])(x), conv(x))


@pytest.mark.parametrize(
    ("few", "many"),
    [
        ([{"kind": "free", "inner": 3}, "dct"], [{"kind": "free", "inner": 5}, "dct"]),
        ([{"kind": "free", "inner": 2}, "free"], [{"kind": "free", "inner": 5}, "free"]),
        (
            [{"kind": "free", "inner": 2}, {"kind": "free", "inner": 3}, {"kind": "hash", "p": 6}],
            [{"kind": "free", "inner": 4}, {"kind": "free", "inner": 3}, {"kind": "hash", "p": 12}],
        ),
    ],
)
def test_growing_within(few, many):
    """A greater inner size: the same function, and what is new has a gradient."""
    small = ProductOfSumsLinear(9, N, few, dtype=DTYPE)
    large = grow(small, many)
    torch.testing.assert_close(large.weight, small.weight, rtol=1e-6, atol=1e-6)
    x = torch.randn(20, 9, dtype=DTYPE)
    (large(x) - torch.randn(20, N, dtype=DTYPE)).square().sum().backward()
    gradients = large.a0.grad.view(N, -1)
    assert (gradients.abs().sum(dim=0) > 1e-3).all()


GROWN = [
    ([{"kind": "rank1", "p": 4}], [{"kind": "rank1", "p": 9}]),
    ([{"kind": "hash", "p": 4}], [{"kind": "hash", "p": 12}]),
    ([{"kind": "free", "inner": 3}, "dct"], [{"kind": "free", "inner": 5}, "dct"]),
]


@pytest.mark.parametrize(("few", "many"), GROWN)
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
def test_moments_of_an_optimizer_grow_with_the_layer(few, many, make):
    """With a gradient that does not change, moments are those of the new layer's own gradient."""
    small = ProductOfSumsLinear(9, N, few, bias=True, dtype=DTYPE)
    other = torch.nn.Parameter(torch.ones(2, dtype=DTYPE))
    options = {"momentum": 0.9} if make is torch.optim.SGD else {}
    optimizer = make([*small.parameters(), other], lr=0.0, **options)
    atoms = small.values(0).numel()
    # A gradient of W that the old atoms explain, so that it says all of the new ones', too.
    small.values(0).data.normal_()
    slope = small.weight.detach()
    for _ in range(3):
        optimizer.zero_grad()
        ((small.weight * slope).sum() + small.bias.sum() + other.sum()).backward()
        optimizer.step()
    first = "exp_avg" if make is torch.optim.Adam else "momentum_buffer"
    per = optimizer.state[small.bias][first][0]  # of a gradient of 1
    old = small.values(0).grad.square()
    large = grow(small, many)
    carry_over(optimizer, small, large)
    assert [
        p is q
        for p, q in zip(
            optimizer.param_groups[0]["params"], [*large.parameters(), other], strict=True
        )
    ] == [True] * (len(list(large.parameters())) + 1)
    (large.weight * slope).sum().backward()
    expected = per * large.a0.grad
    if few[0]["kind"] != "rank1":  # whose atoms are not orthogonal
        torch.testing.assert_close(optimizer.state[large.a0][first], expected)
    assert optimizer.state[large.bias][first].equal(per.expand(N))
    if make is torch.optim.Adam:
        squares = optimizer.state[large.a0]["exp_avg_sq"]
        assert (squares > 0).all()
        kept = small.scales[0] / large.scales[0]
        if few[0]["kind"] == "rank1":
            ratio = squares[:atoms] / old
            torch.testing.assert_close(ratio, ratio[:1].expand(atoms))
            torch.testing.assert_close(
                squares[atoms:] / squares[:atoms].mean(), torch.ones(5, dtype=DTYPE)
            )
            per_square = optimizer.state[large.bias]["exp_avg_sq"][0]
            torch.testing.assert_close(ratio[0] * kept**2, per_square)


def test_an_optimizer_goes_on_where_nothing_has_changed():
    """Growing by nothing is no change: two routes to one trajectory."""
    factors = [{"kind": "free", "inner": 3}, {"kind": "hash", "p": 12}]
    one, two = layer(factors), layer(factors)
    x, y = torch.randn(5, M, dtype=DTYPE), torch.randn(5, N, dtype=DTYPE)
    optimizers = [torch.optim.Adam(part.parameters(), lr=0.1) for part in (one, two)]
    for step in range(6):
        if step == 3:
            grown = grow(two, factors)
            carry_over(optimizers[1], two, grown)
            two = grown
        for part, optimizer in zip((one, two), optimizers, strict=True):
            optimizer.zero_grad()
            (part(x) - y).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(two.weight, one.weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("measure", ["mean", "maximum"])
def test_the_set_of_atoms_that_covers_best(measure):
    chain = [{"kind": "free", "inner": 2}, {"kind": "rank1", "p": 6}]
    targets = []
    for seed in range(3):
        torch.manual_seed(seed)
        made = ProductOfSumsLinear(M, N, chain, bias=False, seed=4, dtype=DTYPE)
        targets.append(made.weight.detach())
    layers, report = fit(
        targets,
        [[{"kind": "hash", "p": 10}], chain, ["toeplitz"]],
        measure=measure,
        seed=4,
        sweeps=100,
    )
    assert report["factors"] == chain
    assert report["tried"].index(min(report["tried"])) == 1
    own = torch.tensor(report["errors"])
    expected = own.mean() if measure == "mean" else own.max()
    assert report["tried"][1] == pytest.approx(float(expected))
    for found, target, error in zip(layers, targets, report["errors"], strict=True):
        assert float((found.weight.detach() - target).norm() / target.norm()) == pytest.approx(
            error
        )
        assert error < 0.1


def test_bad_input():
    small = layer([{"kind": "rank1", "p": 4}])
    with pytest.raises(SubspanError, match=r"would have 3 coefficients, fewer than the 4 of the"):
        grow(small, [{"kind": "rank1", "p": 3}])
    inner = layer([{"kind": "free", "inner": 5}, "free"])
    with pytest.raises(SubspanError, match=r"would have 18 coefficients, fewer than the 30"):
        grow(inner, [{"kind": "free", "inner": 3}, "free"])
    wide = layer([{"kind": "gaussian", "p": 1, "inner": 5}, {"kind": "gaussian", "p": 1}])
    with pytest.raises(SubspanError, match=r"would be 6 × 3, smaller than the 6 × 5 of the stage"):
        grow(wide, [{"kind": "gaussian", "p": 1, "inner": 3}, {"kind": "gaussian", "p": 1}])
    with pytest.raises(SubspanError, match="least squares need f: identity"):
        grow(small, [{"kind": "rank1", "p": 5, "f": "tanh"}])
    with pytest.raises(SubspanError, match="a stage keeps the number of factors, 1, got 2"):
        grow(small, [{"kind": "free", "inner": 2}, "free"])
    with pytest.raises(SubspanError, match="the layer's weight is 6 × 8, the target 8 × 6"):
        approximate(small, torch.ones(8, 6))
    with pytest.raises(SubspanError, match="the layer's weight is 6 × 8, the target 48"):
        approximate(small, torch.zeros(48))
    with pytest.raises(SubspanError, match="the target is not finite"):
        approximate(small, torch.full((6, 8), float("nan")))
    with pytest.raises(SubspanError, match="least squares need f: identity"):
        approximate(layer([{"kind": "free", "f": "tanh"}]), torch.ones(6, 8))
    with pytest.raises(SubspanError, match="measure must be mean or maximum, got 'median'"):
        fit([torch.ones(2, 2)], [["free"]], measure="median")
    with pytest.raises(SubspanError, match="needs one matrix and one list"):
        fit([], [["free"]])
    with pytest.raises(SubspanError, match="matrices must be of one shape"):
        fit([torch.ones(2, 2), torch.ones(2, 3)], [["free"]])


def test_moments_are_carried_over_by_the_optimizer_that_has_them():
    small = layer([{"kind": "hash", "p": 4}])
    large = grow(small, [{"kind": "hash", "p": 8}])
    optimizer = torch.optim.Adam(large.parameters())
    with pytest.raises(SubspanError, match="the optimizer has no parameter of this layer: give"):
        carry_over(optimizer, small, large)
    carry_over(optimizer, small.requires_grad_(False), large)


def test_an_optimizer_that_was_forgotten_when_a_layer_grew_is_refused():
    """It would go on with the layer of before, and the grown one would never be trained."""
    net = nn.Sequential(layer([{"kind": "hash", "p": 4}]))
    x = torch.randn(4, M, dtype=DTYPE)
    optimizers = [torch.optim.Adam(net.parameters()) for _ in range(2)]
    net(x).square().sum().backward()
    old, net[0] = net[0], grow(net[0], [{"kind": "hash", "p": 8}])
    carry_over(optimizers[0], old, net[0])
    net(x).square().sum().backward()
    before = net[0].a0.detach().clone()
    with pytest.raises(SubspanError, match="a layer that another one has taken the place of"):
        optimizers[1].step()
    assert torch.equal(net[0].a0, before)
    optimizers[0].step()
    assert not torch.equal(net[0].a0, before)
