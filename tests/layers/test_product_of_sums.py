"""Products of sums against dense layers: values, gradients, the order of products, their start."""

from __future__ import annotations

import copy
import io
import itertools
import math

import pytest
import torch
from torch import nn

from subspan import SubspanError
from subspan.layers import ProductOfSumsConv2d, ProductOfSumsLinear, recipes
from subspan.layers.atoms import atoms
from subspan.layers.product_of_sums import plan_product

CHAINS = {
    "one": [{"kind": "hash", "p": 9}],
    "two": [{"kind": "gaussian", "p": 5, "inner": 4}, {"kind": "rank1", "p": 3}],
    "three": [
        {"kind": "free", "inner": 8},
        {"kind": "circulant", "f": "tanh"},
        {"kind": "toeplitz"},
    ],
    "four": [
        {"kind": "identity", "inner": 8},
        "hadamard",
        "diagonal",
        {"kind": "rademacher", "p": 4},
    ],
    "cosines": [{"kind": "free", "inner": 5}, "dct"],
    "projected": recipes.random_projection(4),
}


def linear(name, **more):
    torch.manual_seed(0)
    return ProductOfSumsLinear(16, 6, CHAINS[name], dtype=torch.float64, seed=5, **more)


def gradients(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), x.grad, {n: p.grad.clone() for n, p in layer.named_parameters()}


@pytest.mark.parametrize("batch", [(1,), (3, 2), (400,)])
@pytest.mark.parametrize("name", CHAINS)
def test_a_linear_layer_is_its_dense_one(name, batch):
    layer = linear(name)
    with torch.no_grad():
        layer.bias.normal_()
    x = torch.randn(*batch, 16, dtype=torch.float64)
    y, gx, own = gradients(layer, x)
    dense = layer.dense()
    y_dense, gx_dense, found = gradients(dense, x)
    torch.testing.assert_close(y, y_dense)
    torch.testing.assert_close(gx, gx_dense)
    torch.testing.assert_close(own["bias"], found["bias"])
    # By the chain rule through the dense weight.
    parameters = [p for n, p in layer.named_parameters() if n != "bias"]
    expected = torch.autograd.grad(layer.weight, parameters, found["weight"])
    for (name, _), grad in zip(
        [(n, p) for n, p in layer.named_parameters() if n != "bias"], expected, strict=True
    ):
        torch.testing.assert_close(own[name], grad)


@pytest.mark.parametrize("name", CHAINS)
def test_the_weight_is_the_product_of_the_factors(name):
    layer = linear(name)
    product = torch.eye(6, dtype=torch.float64)
    for i, s in enumerate(layer.sums):
        a = getattr(layer, f"a{i}")
        a = a.tanh() if layer.factors[i].get("f") else a
        if isinstance(a, nn.Parameter) or a.requires_grad:
            a = layer.scales[i] * a
        torch.testing.assert_close(layer.coefficients(i), a)
        constants = [getattr(layer, c) for c in layer._constants[i]]
        product = product @ s.matrix(a, *constants)
    torch.testing.assert_close(layer.weight, product)


@pytest.mark.heavy
@pytest.mark.parametrize("name", CHAINS)
def test_compilers_and_mixed_precision(name):
    torch.compiler.reset()
    layer = ProductOfSumsLinear(16, 6, CHAINS[name])
    x = torch.randn(4, 16)
    y = layer(x).detach()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x).detach(), y)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x.bfloat16())
    half.float().sum().backward()
    assert (half.detach() - y).norm() < 0.05 * y.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


CONVOLUTIONS = [
    ({}, [{"kind": "free", "inner": 4}, {"kind": "gaussian", "p": 6}]),
    ({"stride": 2, "padding": 1}, [{"kind": "rank1", "p": 2}]),
    ({"padding": "same"}, [{"kind": "free", "inner": 20}, {"kind": "hash", "p": 9}]),
    ({"padding": 1, "padding_mode": "circular"}, ["diagonal", {"kind": "hash", "p": 9}]),
    ({"dilation": 2, "bias": False}, [{"kind": "free", "inner": 2}, "toeplitz"]),
    ({"bias": 3}, [{"kind": "free", "inner": 2}, "toeplitz"]),
]


@pytest.mark.parametrize(("options", "factors"), CONVOLUTIONS)
@pytest.mark.parametrize("side", [7, 19])
def test_a_convolution_is_its_dense_one(options, factors, side):
    torch.manual_seed(0)
    layer = ProductOfSumsConv2d(3, 8, 3, factors, dtype=torch.float64, **options)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    y, gx, _ = gradients(layer, x)
    y_dense, gx_dense, _ = gradients(layer.dense(), x)
    torch.testing.assert_close(y, y_dense)
    torch.testing.assert_close(gx, gx_dense)


def test_both_ways_of_a_convolution_are_taken():
    """Filters and a 1×1 convolution where there are many places, one kernel where there are few."""
    layer = ProductOfSumsConv2d(3, 32, 3, [{"kind": "free", "inner": 2}, {"kind": "hash", "p": 9}])
    assert layer.cost(1000)[0] is not None
    wide = ProductOfSumsConv2d(3, 8, 3, [{"kind": "free", "inner": 200}, {"kind": "hash", "p": 9}])
    assert wide.cost(1000)[0] is None


def every_order(sums, batch):
    """The cost of all orders, one by one."""
    k = len(sums)
    sizes = [s.n for s in sums] + [sums[-1].m, batch]

    def costs(i, j):
        if i == j:
            yield sums[i].matrix_cost if i < k else 0
            return
        for cut in range(i, j):
            for left, right in itertools.product(costs(i, cut), list(costs(cut + 1, j))):
                yield left + right + sizes[i] * sizes[cut + 1] * sizes[j + 1]
        if sums[i].apply_cost is not None:
            yield from (sums[i].apply_cost * sizes[j + 1] + right for right in costs(i + 1, j))
        if j < k and sums[j].apply_cost is not None:
            yield from (sums[j].apply_cost * sizes[i] + left for left in costs(i, j - 1))

    return min(costs(0, k))


@pytest.mark.parametrize("batch", [1, 20, 3000])
@pytest.mark.parametrize("name", CHAINS)
def test_no_order_is_cheaper(name, batch):
    layer = linear(name)
    assert layer.cost(batch).cost == every_order(layer.sums, batch)


def test_the_order_depends_on_the_batch():
    sums = [atoms("rank1", 512, 512, p=16)]
    assert plan_product(sums, 1).text == "(rank1· x)"
    assert str(plan_product(sums, 1)) == "(rank1· x): 16,384 multiply-adds"
    sums = [atoms("gaussian", 64, 64, p=4), atoms("free", 64, 64)]
    assert plan_product(sums, 1).text == "(gaussian (free x))"
    assert plan_product(sums, 4096).text == "((gaussian free) x)"


@pytest.mark.parametrize("init", ["he", "glorot", "lecun"])
@pytest.mark.parametrize(
    "factors",
    [
        [{"kind": "gaussian", "p": 300}],
        [{"kind": "rank1", "p": 300, "inner": 48}, {"kind": "hash", "p": 2000}],
        [{"kind": "toeplitz", "inner": 64}, "circulant", {"kind": "free"}],
        [{"kind": "free", "inner": 64}, "diagonal", "hadamard", {"kind": "rademacher", "p": 200}],
        [{"kind": "free", "inner": 30}, {"kind": "dct"}],
        recipes.random_projection(50),
    ],
    ids=len,
)
def test_variance_is_kept_at_the_start(factors, init):
    """He: twice that of the input; Glorot: 2 m/(n + m); LeCun: the same. Within 10 %."""
    n, m = 100, 64
    found = []
    for seed in range(40):
        torch.manual_seed(seed)
        layer = ProductOfSumsLinear(m, n, factors, seed=seed, init=init)
        found.append(layer(torch.randn(50, m)).var().item())
    expected = {"he": 2, "glorot": 2 * m / (n + m), "lecun": 1}[init]
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.1)


def test_what_is_stored_is_what_is_trained():
    layer = ProductOfSumsLinear(
        64, 64, [{"kind": "rank1", "p": 5}, "hadamard", {"kind": "gaussian", "p": 7}], bias=3
    )
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {
        "a0": (5,),
        "a2": (7,),
        "bias": (3,),
    }
    other = ProductOfSumsLinear(
        64, 64, layer.recipe["factors"], layer.recipe["bias"], seed=layer.recipe["seed"]
    )
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"stream": 1}, {"init": "glorot"}, {"f": "exp"}, {"kind": "rademacher"}],
)
def test_a_state_of_other_fixed_matrices_is_refused(other):
    def made(kind="gaussian", f="identity", **options):
        factor = {"kind": kind, "p": 7, "f": f}
        return nn.Sequential(ProductOfSumsLinear(16, 16, [factor], **options))

    net, different = made(), made(**other)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    state, before = torch.load(file, weights_only=True), different[0].weight.clone()
    with pytest.raises(
        SubspanError,
        match=r"is of 0 where its numbers make another weight \(.*\): make the layer as",
    ):
        different.load_state_dict(state)
    assert torch.equal(different[0].weight, before)
    same = made()
    same.load_state_dict(state)
    assert torch.equal(same[0].weight, net[0].weight)


TWO = {"kind": "gaussian", "p": 2, "fixed": True}


@pytest.mark.parametrize(
    ("factors", "others"),
    [
        (recipes.kronecker_fc(12, 12, 2, 6), recipes.kronecker_fc(12, 12, 3, 4)),
        ([{"kind": "sparse", "p": 5, "s": 3}], [{"kind": "sparse", "p": 5, "s": 2}]),
        (
            [{"kind": "convolution", "height": 3, "width": 4}],
            [{"kind": "convolution", "height": 4, "width": 3}],
        ),
        (recipes.random_projection(5), [{"kind": "free", "inner": 5}, TWO]),
        (
            [{"kind": "gaussian", "p": 5, "inner": 8}, {"kind": "gaussian", "p": 5}],
            [{"kind": "gaussian", "p": 5, "inner": 9}, {"kind": "gaussian", "p": 5}],
        ),
    ],
)
def test_a_state_of_as_many_coefficients_of_other_matrices_is_refused(factors, others):
    layer, other = (ProductOfSumsLinear(12, 12, each) for each in (factors, others))
    with pytest.raises(SubspanError, match="where its numbers make another weight"):
        other.load_state_dict(layer.state_dict())


def test_a_state_of_given_matrices_brings_them():
    """And not the constant that makes up for their norm, of which another layer has another one."""
    given = torch.randn(2, 4, 6)
    layer, same, larger = (
        ProductOfSumsLinear(6, 4, [{"kind": "given", "tensor": each}])
        for each in (given, -given, 2 * given)
    )
    same.load_state_dict(layer.state_dict())
    assert torch.equal(same.weight, layer.weight)
    with pytest.raises(SubspanError, match="where its numbers make another weight"):
        larger.load_state_dict(layer.state_dict())


def test_a_state_of_matrices_that_no_seed_makes_loads_whatever_the_seed():
    layers = [ProductOfSumsLinear(6, 4, [{"kind": "free"}], seed=seed) for seed in (0, 1)]
    layers[1].load_state_dict(layers[0].state_dict())
    assert torch.equal(layers[1].weight, layers[0].weight)


def cube(a):
    return a**3


def test_a_function_of_ones_own_and_matrices_too():
    given = torch.randn(2, 4, 6, dtype=torch.float64)
    layer = ProductOfSumsLinear(
        6, 4, [{"kind": "given", "tensor": given, "f": f"{__name__}:cube"}], dtype=torch.float64
    )
    torch.testing.assert_close(
        layer.weight, layer.scales[0] * torch.tensordot(layer.a0**3, given, dims=1)
    )
    assert "fixed0_0" in layer.state_dict()
    single = ProductOfSumsLinear(6, 4, [given[0]], dtype=torch.float64)
    torch.testing.assert_close(single.weight, single.coefficients(0) * given[0])


def test_layers_may_be_made_without_values():
    """On the meta device, whose context is for parameters alone: fixed matrices have values."""
    factors = [{"kind": "rank1", "p": 3}, {"kind": "displacement", "rank": 2}]
    made = ProductOfSumsLinear(8, 8, factors, bias=2, seed=4)
    with torch.device("meta"):
        empty = ProductOfSumsLinear(8, 8, factors, bias=2, seed=4)
        full = ProductOfSumsLinear(8, 8, factors, bias=2, seed=4, device="cpu")
    full.load_state_dict(made.state_dict())
    assert torch.equal(full.weight, made.weight)
    for other in (empty, ProductOfSumsLinear(8, 8, factors, bias=2, seed=4, device="meta")):
        assert all(p.is_meta for p in other.parameters())
        assert other.scales == made.scales
        filled = other.to_empty(device="cpu")
        filled.load_state_dict(made.state_dict())
        x = torch.randn(3, 8)
        assert torch.equal(filled(x), made(x))


def test_a_tensor_of_the_user_is_not_written_to():
    given = torch.randn(2, 4, 6)
    before = given.clone()
    layer, other = (ProductOfSumsLinear(6, 4, [{"kind": "given", "tensor": given}]) for _ in "ab")
    layer.load_state_dict({k: t + 1 for k, t in layer.state_dict().items()})
    assert torch.equal(given, before)
    assert torch.equal(other.fixed0_0, before)


@pytest.mark.parametrize("x", [(7,), (3, 9), (2, 1), ()])
def test_inputs_of_another_size_are_named(x):
    layer = ProductOfSumsLinear(8, 8, ["toeplitz"])
    with pytest.raises(SubspanError, match=r"expected inputs \(…, 8\), got"):
        layer(torch.ones(x))
    with pytest.raises(SubspanError, match=r"expected images \(B, in, H, W\) or \(in, H, W\)"):
        ProductOfSumsConv2d(2, 3, 3, ["free"])(torch.ones(2, 3))


class TestRecipes:
    """Each is what its name says, by its dense definition."""

    def test_low_rank(self):
        layer = ProductOfSumsLinear(9, 7, recipes.low_rank(2))
        expected = layer.coefficients(0).view(7, 2) @ layer.coefficients(1).view(2, 9)
        torch.testing.assert_close(layer.weight, expected)
        assert torch.linalg.matrix_rank(layer.weight) == 2

    def test_random_projection(self):
        layer = ProductOfSumsLinear(9, 7, recipes.random_projection(4))
        R = atoms("gaussian", 4, 9, p=1, stream=1).matrix(torch.ones(1))
        torch.testing.assert_close(layer.weight, layer.coefficients(0).view(7, 4) @ R)
        assert [n for n, _ in layer.named_parameters()] == ["a0", "bias"]

    def test_hashed(self):
        layer = ProductOfSumsLinear(10, 8, recipes.hashed(5))
        assert sorted(layer.weight.abs().unique().tolist()) == pytest.approx(
            sorted((layer.coefficients(0).abs() / math.sqrt(16)).tolist())
        )

    @pytest.mark.parametrize("block", [None, 3])
    def test_circulant(self, block):
        layer = ProductOfSumsLinear(6, 6, recipes.circulant(block))
        b = block or 6
        for i, k in itertools.product(range(0, 6, b), repeat=2):
            W = layer.weight[i : i + b, k : k + b]
            torch.testing.assert_close(W.roll((1, 1), (0, 1)), W)

    def test_adaptive_fastfood(self):
        from scipy.linalg import hadamard

        layer = ProductOfSumsLinear(8, 8, recipes.adaptive_fastfood(8))
        H = torch.from_numpy(hadamard(8)).float() / math.sqrt(8)
        S, G, B = (layer.coefficients(i).diag() for i in (0, 2, 5))
        P = torch.eye(8)[layer.fixed3_0]
        torch.testing.assert_close(layer.weight, S @ H @ G @ P @ H @ B)
        inside = ProductOfSumsLinear(6, 5, recipes.adaptive_fastfood(5, 6))
        assert inside.weight.shape == (5, 6)
        assert sum(p.numel() for p in inside.parameters()) == 3 * 8 + 5

    @pytest.mark.parametrize("terms", [1, 3])
    def test_kronecker_fc(self, terms):
        layer = ProductOfSumsLinear(10, 6, recipes.kronecker_fc(6, 10, 2, 5, terms))
        A = layer.coefficients(0).view(2, terms, 5).transpose(0, 1)
        B = layer.coefficients(1).view(terms, 3, 2)
        expected = sum(torch.kron(a, b) for a, b in zip(A, B, strict=True))
        torch.testing.assert_close(layer.weight, expected)

    def test_convolution(self):
        layer = ProductOfSumsLinear(2 * 20, 3 * 20, recipes.convolution(5, 4))
        x = torch.randn(2, 2, 5, 4)
        expected = nn.functional.conv2d(x, layer.coefficients(0).view(3, 2, 3, 3), padding=1)
        torch.testing.assert_close(layer(x.flatten(1)), expected.flatten(1))

    def test_what_does_not_divide(self):
        with pytest.raises(SubspanError, match="A of a 6 × 10 weight must have sides that divide"):
            recipes.kronecker_fc(6, 10, 4, 5)


@pytest.mark.parametrize(
    ("factors", "options", "message"),
    [
        ([], {}, "needs one factor at least"),
        ([{"kind": "free", "inner": 3}], {}, "of a 6 × 16 weight must end with 16 columns, got 3"),
        (["circulant"], {}, "factor 1 of 1, 6 × 16, of a 6 × 16 weight: circulant must be square"),
        (["diagonal", "hadamard"], {}, "factor 2 of 2, 6 × 16, of a 6 × 16 weight: hadamard must"),
        (
            [{"kind": "free", "inner": 0}, "free"],
            {},
            "inner of factor 1 must be a size >= 1, got 0",
        ),
        ([{"kind": "rank1", "p": 0}], {}, "rank1 needs p >= 1 atoms, got 0"),
        ([{"kind": "hash", "p": 97}], {}, "does not fit in D=96"),
        ([3], {}, "a factor is a kind of atoms, as 'circulant'"),
        ([{"kind": "free", "f": "tan"}], {}, "unknown function f 'tan'"),
        ([{"kind": "free", "f": "math:nothing"}], {}, "no function 'math:nothing'"),
        ([{"kind": "free", "f": "math:pi"}], {}, "'math:pi' is no function"),
        (["free"], {"init": "xavier"}, "unknown init 'xavier'"),
        (["free"], {"seed": -1}, "seed must be an integer"),
        (["free"], {"stream": 1 << 18}, r"stream must be in \[0, 2\^18\)"),
        (["free"] * 64, {}, "a product has at most 63 factors, got 64"),
    ],
)
def test_what_cannot_be(factors, options, message):
    with pytest.raises(SubspanError, match=message):
        ProductOfSumsLinear(16, 6, factors, **options)
