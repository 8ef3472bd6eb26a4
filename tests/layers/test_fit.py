"""Coefficients by least squares: against dense least squares, growing without change, choosing."""

from __future__ import annotations

import pytest
import torch

from subspan import SubspanError, projections
from subspan.layers import (
    ProductOfSumsConv2d,
    ProductOfSumsLinear,
    approximate,
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
    large = grow(small, [{"kind": "toeplitz", "inner": 6}, {"kind": "gaussian", "p": 40}])
    assert (large.weight - before).norm() < 0.3 * before.norm()
    torch.testing.assert_close(small.weight, before, rtol=0, atol=0)
    conv = ProductOfSumsConv2d(3, 4, 3, [{"kind": "hash", "p": 9}], stride=2, padding=1)
    x = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(grow(conv, [{"kind": "hash", "p": 27}])(x), conv(x))


@pytest.mark.parametrize("measure", ["mean", "maximum"])
def test_the_set_of_atoms_that_covers_best(measure):
    chain = [{"kind": "free", "inner": 2}, {"kind": "rank1", "p": 6}]
    targets = []
    for seed in range(3):
        torch.manual_seed(seed)
        made = ProductOfSumsLinear(M, N, chain, bias=False, seed=4, dtype=DTYPE)
        targets.append(made.weight.detach())
    layers, report = fit(
        targets, [[{"kind": "hash", "p": 10}], chain, ["toeplitz"]], measure=measure, seed=4,
        sweeps=300,
    )  # fmt: skip
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
    with pytest.raises(SubspanError, match="a stage keeps the number of factors, 1, got 2"):
        grow(small, [{"kind": "free", "inner": 2}, "free"])
    with pytest.raises(SubspanError, match="the layer's weight is 6 × 8, the target 8 × 6"):
        approximate(small, torch.ones(8, 6))
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
