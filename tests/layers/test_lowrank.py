"""Factored layers against dense ones: values, gradients, tangents, and what is never made."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.utils._python_dispatch import TorchDispatchMode

from subspan import SubspanError
from subspan.layers import LowRankConv2d, LowRankLinear, ProductOfSumsConv2d
from subspan.layers.watched import Tangents

CONVOLUTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same"},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": "same", "padding_mode": "reflect", "dilation": 2},
    {"dilation": 2, "padding": (2, 1), "bias": False},
    {"kernel_size": (1, 3), "stride": (1, 2)},
]


def layers():
    torch.manual_seed(0)
    yield LowRankLinear(7, 5, 3, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    yield (
        LowRankLinear(7, 5, 3, bias=False, dtype=torch.float64),
        torch.randn(2, 3, 7, dtype=torch.float64),
    )
    for options in CONVOLUTIONS:
        more = {"kernel_size": 3, "dtype": torch.float64} | options
        kernel = more.pop("kernel_size")
        yield LowRankConv2d(3, 8, kernel, 4, **more), torch.randn(2, 3, 9, 9, dtype=torch.float64)


CASES = list(layers())
for _layer, _ in CASES:  # a core that is neither diagonal nor symmetric
    torch.nn.init.normal_(_layer.S)
EVERY = pytest.mark.parametrize("case", CASES, ids=[str(layer) for layer, _ in CASES])


def gradients(layer, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    (y * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in layer.named_parameters()}
    return y.detach(), found | {"x": x.grad}


@EVERY
def test_values_are_those_of_the_dense_layer(case):
    layer, x = case
    torch.testing.assert_close(layer(x), layer.dense()(x))
    torch.testing.assert_close(layer.two_factors()(x), layer.dense()(x))
    torch.testing.assert_close(layer.weight, layer.dense().weight.detach())


WATCHED = pytest.mark.parametrize("watched", [False, True])


def watch(layer, watched=True):
    """Tangents of a layer, to be held as long as there shall be some."""
    return Tangents(layer) if watched else None


def check(layer, found, tangents, dense):
    """Gradients, and tangents where there are some, against the gradient of the dense layer."""
    G = dense["weight"].flatten(1)
    U, S, V = (p.detach() for p in (layer.U, layer.S, layer.V))
    expected = {"U": G @ V @ S.T, "S": U.T @ G @ V, "V": G.T @ U @ S}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name] if name in expected else dense[name])
    if tangents is not None:
        torch.testing.assert_close(tangents.of_k, G @ V)
        torch.testing.assert_close(tangents.of_l, G.T @ U)


@EVERY
@WATCHED
def test_gradients_come_from_the_dense_one(case, watched):
    """Gradients of U, S and V by the chain rule, and tangents of K = U S and L = V Sᵀ."""
    layer, x = copy.deepcopy(case[0]), case[1]
    tangents = watch(layer, watched)
    y, found = gradients(layer, x)
    y_dense, dense = gradients(layer.dense(), x)
    torch.testing.assert_close(y, y_dense)
    check(layer, found, tangents, dense)


@EVERY
@WATCHED
@pytest.mark.parametrize("order", [2, 3])
def test_gradients_of_gradients_come_from_the_dense_one(case, watched, order):
    """A penalty on the slope in x, and on the slope's slope."""

    def found(layer, x):
        x = x.clone().requires_grad_()
        y = layer(x)
        loss, slope = y.square().sum(), y.pow(3).sum()
        for _ in range(order - 1):
            (slope,) = torch.autograd.grad(slope.square().sum(), x, create_graph=True)
            loss = loss + 0.01 * slope.square().sum()
        loss.backward()
        return {name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad}

    layer, x = copy.deepcopy(case[0]), case[1]
    tangents = watch(layer, watched)
    check(layer, found(layer, x), tangents, found(layer.dense(), x))


@EVERY
def test_gradients_of_parameters_gradients_are_those_of_ordinary_operations(case):
    """Meta-learning differentiates them; no tangents of W are defined then."""
    found = []
    for watched in (False, True):
        layer, x = copy.deepcopy(case[0]), case[1].clone().requires_grad_()
        tangents = watch(layer, watched)
        own = list(layer.parameters())
        grads = torch.autograd.grad(layer(x).pow(3).sum(), own, create_graph=True)
        sum(g.square().sum() for g in grads).backward()
        found.append([x.grad, *(p.grad for p in own)])
        del tangents
    torch.testing.assert_close(*found)


@EVERY
@WATCHED
def test_an_input_without_a_batch(case, watched):
    layer, x = copy.deepcopy(case[0]), case[1]
    one = x[0] if x.dim() == 4 else x.flatten(0, -2)[0]
    tangents = watch(layer, watched)
    y, found = gradients(layer, one)
    y_dense, dense = gradients(layer.dense(), one)
    torch.testing.assert_close(y, y_dense)
    check(layer, found, tangents, dense)


@EVERY
@WATCHED
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_integers_are_refused_as_an_ordinary_layer_does(case, watched, dtype):
    layer, x = case
    tangents = watch(layer, watched)
    with pytest.raises(SubspanError, match=f"a floating dtype, got {dtype}: use x.float"):
        layer(x.to(dtype))
    del tangents


def test_a_penalty_on_the_weight_reaches_the_tangents():
    layer = copy.deepcopy(CASES[0][0])
    tangents, dense = watch(layer), layer.dense()
    for net in (layer, dense):
        (net.weight.square().sum() + net.weight[0, 0]).backward()
    check(layer, {"S": layer.S.grad}, tangents, {"weight": dense.weight.grad})


def test_tangents_accumulate_and_are_cleared_with_the_gradients():
    layer, x = copy.deepcopy(CASES[0][0]), CASES[0][1]
    tangents = watch(layer)

    def backward():
        layer(x).square().sum().backward()
        return tangents.of_k.clone()

    once, twice = backward(), backward()
    torch.testing.assert_close(twice, 2 * once)
    for clear in (layer.zero_grad, lambda: setattr(layer.U, "grad", None)):
        clear()
        assert torch.equal(backward(), once)


def test_a_layer_that_is_used_twice():
    torch.manual_seed(0)
    layer, x = LowRankLinear(6, 6, 3, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    nn.init.normal_(layer.S)
    tangents, dense = watch(layer), layer.dense()
    for net in (layer, dense):
        net(net(x).tanh()).square().sum().backward()
    found = {name: p.grad for name, p in layer.named_parameters()}
    check(layer, found, tangents, {name: p.grad for name, p in dense.named_parameters()})


def test_what_watches_a_layer_leaves_nothing_behind():
    layer, x = copy.deepcopy(CASES[0][0]), CASES[0][1]
    tangents = watch(layer)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert copied.tangents is None
    assert layer.tangents is tangents
    del tangents
    assert layer.tangents is None
    layer.requires_grad_(False)
    held = watch(layer)
    assert not layer(x).requires_grad
    assert held.of_k is None


def test_tangents_move_with_their_layer():
    layer, x = copy.deepcopy(CASES[0][0]), CASES[0][1]
    tangents = watch(layer)
    layer.float()(x.float()).sum().backward()
    assert tangents.of_k.dtype == torch.float32
    layer.set_factors(layer.U[:, :2], layer.S[:2, :2], layer.V[:, :2])
    assert tangents.of_k is None
    layer(x.float()).sum().backward()
    assert tangents.of_l.shape == (7, 2)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_trace_of_a_watched_layer_is_one_of_its_factors():
    layer, x = copy.deepcopy(CASES[0][0]), CASES[0][1]
    tangents = watch(layer)
    traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(x), layer(x))
    assert tangents is layer.tangents


# PyTorch's own forward mode scripts a few functions when it is first used.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_transforms_of_functions_see_an_ordinary_layer():
    layer, x = copy.deepcopy(CASES[0][0]), CASES[0][1]
    weights = dict(layer.named_parameters())

    def loss(weights, x):
        return torch.func.functional_call(layer, weights, x).square().sum()

    expected = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    tangents = watch(layer)
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    torch.testing.assert_close(found, expected)
    _, slope = torch.func.jvp(lambda x: loss(weights, x), (x,), (torch.ones_like(x),))
    assert torch.isfinite(slope)
    assert tangents.of_k is None


@pytest.mark.parametrize("watched", [False, True])
def test_factors_of_another_kind_have_their_own_rules(watched):
    seen = []

    class Noted(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs)

    layer, x = LowRankLinear(6, 5, rank=2), torch.randn(3, 6)
    tangents = watch(layer) if watched else None
    given = {name: p.detach().as_subclass(Noted) for name, p in layer.named_parameters()}
    found = torch.func.functional_call(layer, given, (x,))
    torch.testing.assert_close(found.as_subclass(torch.Tensor), layer(x))
    assert {"to", "matmul", "linear"} <= set(seen)
    del tangents


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>")  # of Dynamo
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", [0, 3])
def test_compiled_layers_have_tangents(kind, backend):
    """Watched after the first call, by another one later, and no more."""
    layer, x = copy.deepcopy(CASES[kind][0]), CASES[kind][1]
    torch.compiler.reset()
    compiled, dense = torch.compile(layer, backend=backend, fullgraph=True), layer.dense()
    dense(x).square().sum().backward()
    grads = {name: p.grad for name, p in dense.named_parameters()}
    for watched in (False, True, True, False):
        layer.zero_grad()
        tangents = watch(layer, watched)
        compiled(x).square().sum().backward()
        check(layer, {n: p.grad for n, p in layer.named_parameters()}, tangents, grads)


@EVERY
@WATCHED
def test_no_gradient_of_the_input_is_computed_in_vain(case, watched):
    layer, x = copy.deepcopy(case[0]), case[1]
    tangents = watch(layer, watched)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.U.grad is not None
    del tangents


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@WATCHED
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_weight_is_never_expanded(kind, watched):
    if kind == "linear":
        layer, x = LowRankLinear(300, 200, 2), torch.randn(3, 300, requires_grad=True)
    else:
        layer, x = LowRankConv2d(40, 60, 3, 2), torch.randn(1, 40, 5, 5, requires_grad=True)
    tangents = watch(layer, watched)
    with _Largest() as largest:
        layer(x).sum().backward()
    assert largest.numel <= 2 * max(layer.shape) + x.numel()
    assert largest.numel < layer.weight.numel() / 5
    del tangents


@WATCHED
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_autocast_reaches_both_passes(kind, watched):
    if kind == "linear":
        layer, x = LowRankLinear(16, 8, 4), torch.randn(3, 16)
    else:
        layer, x = LowRankConv2d(4, 8, 3, 4), torch.randn(2, 4, 6, 6)
    tangents = watch(layer, watched)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    found = {name: p.grad for name, p in layer.named_parameters()}
    assert {g.dtype for g in found.values()} == {torch.float32}
    if watched:  # in the precision of the factors, whatever that of the products is
        torch.testing.assert_close(found["U"], tangents.of_k @ layer.S.detach().T)
        torch.testing.assert_close(found["V"], tangents.of_l @ layer.S.detach())
    layer.zero_grad()
    layer(x).sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=0.1, atol=0.1)


def test_memory_follows_the_rank():
    layer = LowRankLinear(100, 80, 20)
    assert [p.untyped_storage().nbytes() for p in (layer.U, layer.S, layer.V)] == [6400, 1600, 8000]
    before = list(layer.parameters())
    layer.set_factors(layer.U[:, :3], layer.S[:3, :3], layer.V[:, :3])
    assert [p.untyped_storage().nbytes() for p in (layer.U, layer.S, layer.V)] == [960, 36, 1200]
    assert all(a is b for a, b in zip(before, layer.parameters(), strict=True))


@WATCHED
def test_the_rank_changes_while_an_older_graph_lives(watched):
    """That of the loss of the last step, which most loops still hold."""
    layer, x = LowRankLinear(6, 5, 4), torch.randn(3, 6)
    tangents = watch(layer, watched)
    loss = layer(x).sum()
    loss.backward()
    layer.set_factors(layer.U[:, :2], layer.S[:2, :2], layer.V[:, :2])
    other = layer(x).sum()
    other.backward()
    assert layer.U.grad.shape == (5, 2)
    del loss, tangents


def test_a_state_of_another_rank_is_taken_over():
    a, b = LowRankLinear(6, 5, 4), LowRankLinear(6, 5, 2)
    b.load_state_dict(a.state_dict())
    assert b.rank == 4
    assert torch.equal(a.weight, b.weight)
    with pytest.raises(RuntimeError, match="size mismatch for U"):
        LowRankLinear(6, 7, 2).load_state_dict(a.state_dict())


@pytest.mark.parametrize("kind", [LowRankConv2d, ProductOfSumsConv2d])
def test_a_state_of_a_kernel_of_another_shape_is_refused(kind):
    """It may have as many numbers."""
    how = 2 if kind is LowRankConv2d else [{"kind": "free", "inner": 2}, "free"]
    square, flat, same = (kind(4, 8, size, how) for size in (3, (1, 9), (3, 3)))
    before = flat.weight.clone()
    with pytest.raises(SubspanError, match=r"\(kernel_size: \[3, 3\] there, \[1, 9\] here\): make"):
        flat.load_state_dict(square.state_dict())
    assert torch.equal(flat.weight, before)
    same.load_state_dict(square.state_dict())
    assert torch.equal(same.weight, square.weight)


def test_a_state_goes_through_the_functions_of_distributed_checkpoints():
    a, b = (nn.Sequential(LowRankLinear(6, 5, 3), LowRankConv2d(2, 3, 3, 2)) for _ in "ab")
    set_model_state_dict(b, get_model_state_dict(a))
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one.weight, other.weight)


def test_a_state_without_the_factors_of_another_rank_is_refused():
    a, b = LowRankLinear(6, 5, 4), LowRankLinear(6, 5, 2)
    now, state = b.state_dict(), a.state_dict()
    fitting = {name: t for name, t in state.items() if t.shape == now[name].shape}
    less = {name: t for name, t in state.items() if name != "U"}
    for part, layer in ((fitting, b), (less, LowRankLinear(6, 5, 4))):
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(SubspanError, match=r"lacks some of U, S and V.*load it whole"):
            layer.load_state_dict(part, strict=False)
        assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    a.load_state_dict(less, strict=False)  # its own factors are those that are left out
    b.load_state_dict({"bias": a.bias}, strict=False)
    assert torch.equal(b.bias, a.bias)


def test_a_new_layer_has_the_scale_of_pytorchs():
    torch.manual_seed(0)
    layer, dense = LowRankLinear(300, 200, 17), nn.Linear(300, 200)
    ratio = layer.weight.detach().norm() / dense.weight.detach().norm()
    assert float(ratio) == pytest.approx(1, rel=0.01)
    for basis in (layer.U.detach(), layer.V.detach()):
        torch.testing.assert_close(basis.T @ basis, torch.eye(17))


def test_one_image_goes_through_a_forward_that_was_replaced_once():
    layer, image = LowRankConv2d(3, 4, 3, rank=2), torch.randn(3, 5, 5)
    expected, forward = layer(image), layer.forward
    layer.forward = lambda x: 2 * forward(x)
    torch.testing.assert_close(layer(image), 2 * expected)


@pytest.mark.parametrize("rank", [0, 6, -1])
def test_a_rank_that_the_weight_cannot_have(rank):
    with pytest.raises(SubspanError, match=rf"must be an integer in \[1, 5\], got {rank}"):
        LowRankLinear(7, 5, rank)
