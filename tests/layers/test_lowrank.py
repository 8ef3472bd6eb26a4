"""Factored layers against dense ones: values, both kinds of gradients, and what is never made."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from subspan import SubspanError
from subspan.layers import LowRankConv2d, LowRankLinear

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
    torch.testing.assert_close(layer.weight, layer.dense().weight)


@EVERY
@pytest.mark.parametrize("gradients_of", ["true", "tangent"])
def test_gradients_come_from_the_dense_one(case, gradients_of):
    """Of U, S and V by the chain rule; or of K = U S, S and L = V Sᵀ for the integrators."""
    layer, x = copy.deepcopy(case[0]), case[1]
    layer.gradients = gradients_of
    y, found = gradients(layer, x)
    y_dense, dense = gradients(layer.dense(), x)
    G = dense["weight"].flatten(1)
    U, S, V = (p.detach() for p in (layer.U, layer.S, layer.V))
    expected = {"U": G @ V, "S": U.T @ G @ V, "V": G.T @ U}
    if gradients_of == "true":
        expected |= {"U": G @ V @ S.T, "V": G.T @ U @ S}
    torch.testing.assert_close(y, y_dense)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name] if name in expected else dense[name])


@EVERY
def test_the_gradient_of_the_core_alone(case):
    layer, x = copy.deepcopy(case[0]), case[1]
    layer.gradients = "tangent"
    _, whole = gradients(layer, x)
    layer.zero_grad()
    layer.gradients = "core"
    layer.bias = None if layer.bias is None else layer.bias.requires_grad_(False)
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert (layer.U.grad, layer.V.grad) == (None, None)
    torch.testing.assert_close(layer.S.grad, whole["S"])
    torch.testing.assert_close(x.grad, whole["x"])


@EVERY
@pytest.mark.parametrize("gradients_of", ["true", "tangent"])
def test_no_gradient_of_the_input_is_computed_in_vain(case, gradients_of):
    layer, x = copy.deepcopy(case[0]), case[1]
    layer.gradients = gradients_of
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.U.grad is not None


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


@pytest.mark.parametrize("gradients_of", ["true", "tangent"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_weight_is_never_expanded(kind, gradients_of):
    if kind == "linear":
        layer, x = LowRankLinear(300, 200, 2), torch.randn(3, 300, requires_grad=True)
    else:
        layer, x = LowRankConv2d(40, 60, 3, 2), torch.randn(1, 40, 5, 5, requires_grad=True)
    layer.gradients = gradients_of
    with _Largest() as largest:
        layer(x).sum().backward()
    assert largest.numel <= 2 * max(layer.shape) + x.numel()
    assert largest.numel < layer.weight.numel() / 5


@pytest.mark.parametrize("gradients_of", ["true", "tangent"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_autocast_reaches_both_passes(kind, gradients_of):
    if kind == "linear":
        layer, x = LowRankLinear(16, 8, 4), torch.randn(3, 16)
    else:
        layer, x = LowRankConv2d(4, 8, 3, 4), torch.randn(2, 4, 6, 6)
    layer.gradients = gradients_of
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    found = {name: p.grad for name, p in layer.named_parameters()}
    assert {g.dtype for g in found.values()} == {torch.float32}
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


@pytest.mark.parametrize("gradients_of", ["true", "tangent"])
def test_the_rank_changes_while_an_older_graph_lives(gradients_of):
    """That of the loss of the last step, which most loops still hold."""
    layer, x = LowRankLinear(6, 5, 4), torch.randn(3, 6)
    layer.gradients = gradients_of
    loss = layer(x).sum()
    loss.backward()
    layer.set_factors(layer.U[:, :2], layer.S[:2, :2], layer.V[:, :2])
    other = layer(x).sum()
    other.backward()
    assert layer.U.grad.shape == (5, 2)
    del loss


def test_a_state_of_another_rank_is_taken_over():
    a, b = LowRankLinear(6, 5, 4), LowRankLinear(6, 5, 2)
    b.load_state_dict(a.state_dict())
    assert b.rank == 4
    assert torch.equal(a.weight, b.weight)
    with pytest.raises(RuntimeError, match="size mismatch for U"):
        LowRankLinear(6, 7, 2).load_state_dict(a.state_dict())


def test_a_new_layer_has_the_scale_of_pytorchs():
    torch.manual_seed(0)
    layer, dense = LowRankLinear(300, 200, 17), nn.Linear(300, 200)
    ratio = layer.weight.detach().norm() / dense.weight.detach().norm()
    assert float(ratio) == pytest.approx(1, rel=0.01)
    for basis in (layer.U.detach(), layer.V.detach()):
        torch.testing.assert_close(basis.T @ basis, torch.eye(17))


@pytest.mark.parametrize("rank", [0, 6, -1])
def test_a_rank_that_the_weight_cannot_have(rank):
    with pytest.raises(SubspanError, match=rf"5 × 7 weight must be in \[1, 5\], got {rank}"):
        LowRankLinear(7, 5, rank)
