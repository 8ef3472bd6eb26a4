"""Weights of compressed layers: whoever reads one may compute with it, and not write to it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from subspan import SubspanError
from subspan.layers import factorize, product_of_sums


def layers():
    """A linear layer and a convolution of either type."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Conv2d(2, 3, 3))
    yield from factorize(copy.deepcopy(net), rank=2)
    yield from product_of_sums(net, {".*": [{"kind": "free"}]})


@pytest.mark.parametrize(
    "change",
    [
        lambda w: nn.init.normal_(w),
        lambda w: nn.init.constant_(w.data, 1.0),
        lambda w: w.renorm_(2, 0, 1.0),
        lambda w: w.data.clamp_(-0.1, 0.1),
        lambda w: w[0].zero_(),
        lambda w: w.__setitem__(0, 0),
        lambda w: setattr(w, "data", torch.zeros_like(w)),
        lambda w: torch._foreach_mul_([w.detach()], 0.5),
        lambda w: torch.add(w.detach(), 1, out=w.detach()),
        lambda w: w.register_hook(lambda gradient: 0 * gradient),
        lambda w: w.set_(torch.zeros(3)),
        lambda w: w.requires_grad_(False),
        lambda w: setattr(w, "requires_grad", False),
        lambda w: setattr(w, "grad", torch.zeros_like(w)),
        lambda w: setattr(w, "grad_sample", torch.zeros(1)),
        lambda w: torch.from_dlpack(w.detach()),
    ],
)
def test_a_change_of_a_weight_would_be_lost(change):
    for layer in layers():
        before = layer.weight.detach().clone()
        with pytest.raises(SubspanError, match="computed when it is read, and what"):
            change(layer.weight)
        assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    "exchange",
    [
        lambda m, w: setattr(m, "weight", nn.Parameter(w)),
        lambda m, w: setattr(m, "weight", w),
        lambda m, w: prune.l1_unstructured(m, "weight", 0.5),
        lambda m, w: torch.func.functional_call(m, {"weight": w}, torch.zeros(m.shape)),
    ],
)
def test_another_weight_in_the_place_of_a_computed_one_is_refused(exchange):
    for layer in layers():
        state, given = layer.state_dict(), torch.zeros_like(layer.weight)
        with pytest.raises(SubspanError, match="is computed from its parameters and cannot be"):
            exchange(layer, given)
        assert layer.state_dict().keys() == state.keys()


def test_flags_of_a_weight_may_be_set_to_what_they_are():
    for layer in layers():
        assert layer.requires_grad_(False).weight.requires_grad_(False).requires_grad is False
        layer.weight.requires_grad = False
        with pytest.raises(SubspanError, match=r"set on it \(requires_grad\) would be lost"):
            layer.weight.requires_grad = True
        kept = layer.weight.detach().requires_grad_()
        kept.square().sum().backward()
        kept.grad = None


def test_arrays_of_a_weight_are_to_be_read():
    for layer in layers():
        with pytest.raises(ValueError, match="read-only"):
            layer.weight.detach().numpy()[:] = 0
        layer.weight.detach().clone().numpy()[:] = 0


def test_a_weight_is_read_as_any_tensor():
    for layer in layers():
        copied = layer.weight.detach().clone()
        assert type(copied) is type(layer.weight * 2) is torch.Tensor
        assert type(copy.deepcopy(layer.weight.detach())) is torch.Tensor
        assert type(pickle.loads(pickle.dumps(layer.weight.detach()))) is torch.Tensor
        file = io.BytesIO()
        torch.save({"weight": layer.weight.detach()}, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=True)["weight"], copied)
        weight = layer.weight
        (gradient,) = torch.autograd.grad(weight.square().sum(), weight)
        torch.testing.assert_close(gradient, 2 * copied)
        leaf = layer.weight.detach().requires_grad_()
        leaf.sum().backward()
        assert type(layer.dense().weight) is nn.Parameter


def test_a_parameter_that_is_made_of_a_weight_is_ones_own():
    for layer in layers():
        for given in (layer.weight, layer.weight.data[:2]):
            parameter = nn.Parameter(given)
            torch.optim.SGD([parameter], lr=0.1).zero_grad()
            assert type(parameter) is nn.Parameter
            assert parameter.requires_grad
            assert parameter.is_leaf
            assert torch.equal(parameter.data.zero_(), torch.zeros_like(given))


@pytest.mark.filterwarnings("ignore")
def test_layers_that_torch_would_not_quantise_are_named():
    ao = torch.ao.quantization
    for layer in layers():
        kind = next(k for k, own in layer.classes.items() if isinstance(layer, own))
        net = nn.Sequential(layer, nn.LSTM(2, 2)).eval()
        with pytest.raises(SubspanError, match=r"does not quantise a .*leave it as it is"):
            ao.quantize_dynamic(net, {kind})
        assert not hasattr(layer, "qconfig")
        ao.quantize_dynamic(copy.deepcopy(net), {nn.LSTM})
        net.qconfig = ao.default_qconfig
        with pytest.raises(SubspanError, match="or set qconfig = None on this one"):
            ao.prepare(net)
        layer.qconfig = None
        ao.prepare(net)
