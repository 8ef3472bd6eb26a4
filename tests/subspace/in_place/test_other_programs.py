"""Other programs and a network in a subspace: pickles, tracers, lists of classes."""

import abc
import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize

from subspan import SubspaceModel, SubspanError
from tests.nets import scatter
from tests.subspace.in_place.network import Net, pair, same_function

# ---- θ₀ in other hands ---------------------------------------------------------------------------


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return torch.ops.aten.mul.Scalar(w, 2)


@pytest.mark.heavy
def test_operators_that_are_called_by_their_overload_refuse_a_base():
    model, _, _ = pair()
    base, x = model.body.head._parameters["weight"], torch.randn(5, 16)
    for compute in (
        lambda: torch.ops.aten.linear(x, base),
        lambda: torch.ops.aten.linear.default(x, base),
        lambda: torch.ops.aten.mm.default(x, torch.ops.aten.t.default(base)),
        lambda: Twice.apply(base),
        lambda: torch.compile(lambda w: torch.ops.aten.mul.Tensor(w, w), backend="eager")(base),
    ):
        with pytest.raises(SubspanError, match=r"head\.weight among parameters\(\) is θ₀"):
            compute()
    for move in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
        assert torch.equal(move(base), base.data)
    assert torch.ops.aten._to_copy.default(base, dtype=torch.float64).dtype == torch.float64


def test_a_pickled_base_is_an_ordinary_parameter():
    net = Net()
    net.head.weight.scale = 3
    model, x = scatter(SubspaceModel(net, 20)), torch.randn(5, 8)
    file = io.BytesIO()
    torch.save(dict(net.named_parameters()), file)
    assert len(file.getvalue()) < 10_000
    file.seek(0)
    for name, p in torch.load(file, weights_only=True).items():
        assert type(p) is nn.Parameter
        assert torch.equal(p.data, net.get_parameter(name).data)
    base = pickle.loads(pickle.dumps(net.head._parameters["weight"]))
    assert vars(base) == {"scale": 3}
    for whole in (model, net, [net.head, net]):
        twin = pickle.loads(pickle.dumps(whole))
        handle = SubspaceModel.of(twin[1] if isinstance(twin, list) else twin)
        assert torch.equal(handle(x), model(x))
        assert handle.body.head.weight.scale == 3
        with pytest.raises(SubspanError, match=r"head\.weight among parameters"):
            handle.body.head._parameters["weight"].sum()
        assert torch.equal(handle.unwrap().head.weight, net.head._parameters["weight"].data)
        assert handle.body.head.weight.requires_grad


# ---- weights that something computes -------------------------------------------------------------


class Half(nn.Module):
    def forward(self, a, b):
        return a + b

    def right_inverse(self, w):
        return w / 2, w / 2


def halves(layer):
    return parametrize.register_parametrization(layer, "weight", Half())


KINDS = (
    parametrizations.orthogonal,
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
    halves,
)


@pytest.mark.parametrize("how", KINDS)
def test_a_weight_that_is_parametrized_is_not_assigned_nor_set_free(how):
    torch.manual_seed(0)
    model = scatter(SubspaceModel(nn.Sequential(how(nn.Linear(6, 6))), 12)).eval()
    x, eye = torch.randn(3, 6), torch.eye(6)
    layer, buffers = model.body[0], [b.clone() for b in model.body.buffers()]
    said = same_function(model, x, lambda: setattr(layer, "weight", eye))
    assert "a weight that is computed from it cannot be assigned" in said
    for leave in (True, False):
        kind = SubspanError if leave or layer.parametrizations.weight.is_tensor else ValueError
        with pytest.raises(kind):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=leave)
    assert all(map(torch.equal, buffers, model.body.buffers()))
    free = SubspaceModel(nn.Sequential(how(nn.Linear(6, 6)), nn.Linear(6, 2)), 12, targets="1.*")
    merged = free.merge()
    for net in (free.body, merged):
        net[0].weight = eye
    assert torch.equal(free.body[0].weight, merged[0].weight)


def test_set_is_a_change_as_any_other():
    model, _, x = pair()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            same_function(model, x, lambda: model.body.head.weight.set_(torch.ones(4, 16)))


# ---- classes -------------------------------------------------------------------------------------


def test_lists_of_classes_have_none_of_ours():
    known = []

    class Lists(abc.ABCMeta):
        def __init__(cls, name, bases, body):
            super().__init__(name, bases, body)
            known.append(name)

    class Layer(nn.Linear):
        def __init_subclass__(cls, **options):
            super().__init_subclass__(**options)
            known.append(cls.__name__)

    class Mine(Layer, metaclass=Lists):
        pass

    class Final(nn.Linear):
        def __init_subclass__(cls):
            raise RuntimeError("final")

    plain = Mine(4, 4)
    net = nn.Sequential(Mine(4, 4), Final(4, 4))
    model, x = scatter(SubspaceModel(net, 6)), torch.randn(3, 4)
    assert known == ["Mine", "Mine"]
    assert torch.equal(model(x), model.merge()(x))
    assert isinstance(net[0], Mine)
    assert not isinstance(plain, type(net[0]))
    assert isinstance(plain, Mine)
    assert known == ["Mine", "Mine"]


@pytest.mark.parametrize("part", [False, True])
def test_the_class_of_a_module_is_set_before(part):
    """A copy and the merged network would lack whatever is put into another class."""
    model, _, x = pair(exclude=".*bias")
    layer = model.body.head if part else model.body
    twice = {"forward": lambda self, x: type(self).__mro__[1].forward(self, 2 * x)}
    for kind in (type("Twice", (type(layer),), twice), type(layer)._subspan_class[0]):
        said = same_function(model, x, lambda kind=kind: setattr(layer, "__class__", kind))
        assert "has a class that was made for it" in said
    if part:
        register = parametrize.register_parametrization
        same_function(model, x, lambda: register(layer, "bias", nn.Tanh()))
    else:
        kind = type("Twice", (type(model),), {})
        said = same_function(model, x, lambda: setattr(model, "__class__", kind))
        assert "has a class that was made for its network" in said
    model.unwrap().__class__ = type("Twice", (Net,), {})


def test_what_is_set_on_the_type_of_a_module_is_set_on_its_class():
    class Layer(nn.Linear):
        pass

    model = scatter(SubspaceModel(nn.Sequential(Layer(4, 4)), 6)).eval()
    type(model.body[0]).forward = lambda self, x: nn.Linear.forward(self, x).square()
    x = torch.randn(3, 4)
    for twin in (model.merge(), copy.deepcopy(model)):
        torch.testing.assert_close(twin(x), model(x))
    assert (model(x) >= 0).all()
    assert (Layer(4, 4)(x) >= 0).all()


# ---- conversions and tracers ---------------------------------------------------------------------


def test_layers_are_not_converted_to_synchronised_ones():
    convert = nn.SyncBatchNorm.convert_sync_batchnorm

    def net():
        return nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))

    model, x = scatter(SubspaceModel(net(), 9, exclude="0.*")).eval(), torch.randn(5, 8)
    for whole in (model, model.body):
        said = same_function(model, x, lambda whole=whole: convert(whole))
        assert "2.weight is computed from coordinates and cannot become" in said
        assert type(model.body[0]) is nn.BatchNorm1d
    said = same_function(model, x, lambda: convert(model.body[2]))
    assert "cannot be a parameter of another module" in said
    model = scatter(SubspaceModel(net(), 9, targets="1.*")).eval()
    want = model(x)
    assert convert(model) is model
    assert [type(layer) for layer in model] == [nn.SyncBatchNorm, nn.Linear, nn.SyncBatchNorm]
    assert torch.equal(model(x), want)
    with pytest.raises(SubspanError, match="body is the SubspaceModel's own"):
        model.add_module("body", nn.Linear(8, 8))


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")
def test_parts_are_not_exported_or_traced_alone():
    model, _, x = pair()
    part, hidden = model.body.head, torch.randn(2, 16)
    for program in (
        lambda: torch.export.export(part, (hidden,)),
        lambda: torch.export.export(part, (hidden,), strict=True),
        lambda: torch.jit.trace(part, (hidden,)),
        lambda: torch.no_grad()(torch.jit.trace)(part, (hidden,)),
    ):
        said = same_function(model, x, program)
        assert "a part of a network in a subspace cannot be" in said
    traced = torch.jit.trace(nn.Sequential(model.body), (x,))
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.filterwarnings("ignore")
def test_the_old_exporter_of_onnx_is_refused():
    pytest.importorskip("onnx")
    model, _, x = pair()
    for net, given in ((model, x), (model.body, x), (model.body.head, torch.randn(2, 16))):
        said = same_function(
            model,
            x,
            lambda net=net, given=given: torch.onnx.export(
                net, (given,), io.BytesIO(), dynamo=False
            ),
        )
        assert "torch.onnx.export(dynamo=False) knows no operator" in said


def test_graphs_of_operators():
    model, _, x = pair()
    for trace in (make_fx(model), make_fx(model.body), make_fx(model.body.body)):
        assert "of the graph that torch.fx traces" in same_function(model, x, lambda t=trace: t(x))
    outer = nn.Sequential(model.body)
    said = same_function(model, x, lambda: torch.fx.symbolic_trace(outer))
    assert "of the graph that torch.fx traces" in said
    said = same_function(model, x, lambda: torch.fx.symbolic_trace(model))
    assert "trace the network, model.body" in said
    torch.testing.assert_close(torch.fx.symbolic_trace(model.body.body)(x), model.body.body(x))
    given = {name: p.detach() for name, p in model.body.named_parameters()}
    trace = make_fx(lambda p, x: functional_call(model.body, p, (x,)))  # P is a constant there, too
    assert "of the graph that torch.fx traces" in same_function(model, x, lambda: trace(given, x))


# ---- states --------------------------------------------------------------------------------------


def test_a_part_is_not_loaded_by_halves():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Tanh())
    model = SubspaceModel(net, 9, exclude="0.0.*")
    state = {name: torch.zeros_like(value) for name, value in net[0].state_dict().items()}
    before = net[0][0].weight.clone()
    with pytest.raises(
        SubspanError, match=r"0\.1\.weight is computed from coordinates, and a part"
    ):
        net[0].load_state_dict(state)
    assert torch.equal(net[0][0].weight, before)
    same_function(model, torch.randn(2, 8), lambda: net[0].load_state_dict(state))


class Agent:
    """A person's program, whose functions are called as some of other programs."""

    def __init__(self, model):
        self.online, self.target = model, copy.deepcopy(model)

    def _sync_target_model(self):
        for t, p in zip(self.target.parameters(), self.online.parameters(), strict=True):
            t.data.copy_(p.data)

    def fsdp2_prepare_model(self):
        return self.online.double()

    def _set_layer_requires_grad(self):
        self.online.body.head.weight.requires_grad_(False)


def test_a_persons_function_may_have_the_name_of_another_programs():
    model, _, x = pair()
    agent = Agent(model)
    scatter(model)
    agent._sync_target_model()
    assert torch.equal(agent.target(x), model(x))
    with pytest.raises(SubspanError, match="cannot be frozen alone"):
        agent._set_layer_requires_grad()
    assert agent.fsdp2_prepare_model().body.head.weight.dtype == torch.float64
