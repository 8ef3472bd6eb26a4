"""Unusual parameters, weights that something else computes, and giving everything back."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim import SGD

import subspan
from subspan import SubspaceModel, SubspanError
from subspan.optim import RandomBases
from subspan.subspace import formed
from tests.laws import default_dtype
from tests.nets import NETS, batch, build, scatter
from tests.subspace.in_place.network import Bag, Net

WORDS = torch.arange(20).view(4, 5) % 11


def test_padding_rows_stay_as_in_ordinary_training():
    torch.manual_seed(0)
    model = scatter(SubspaceModel(Bag(), 12))
    net, base = model.body, copy.deepcopy(model).unwrap()
    for name, row in (("rows", 0), ("bags", 2)):
        theta, theta0 = net.get_submodule(name).weight, base.get_submodule(name).weight
        assert torch.equal(theta[row], theta0[row])
        others = [i for i in range(11) if i != row]
        assert not torch.equal(theta[others], theta0[others])
    assert model.recipe["padding"] == "keep"
    moving = scatter(SubspaceModel(copy.deepcopy(base), 12, padding="train"))
    assert not torch.equal(moving.body.rows.weight[0], base.rows.weight[0])
    assert "padding" not in moving.recipe
    with pytest.raises(SubspanError, match="unknown padding 'no'"):
        SubspaceModel(base, 12, padding="no")


def test_the_gradient_knows_of_rows_that_stay():
    torch.manual_seed(0)
    model = SubspaceModel(nn.Sequential(nn.Embedding(5, 4, padding_idx=1)).double(), 6)
    p = model.projections[0].dense().clone()
    p[4:8] = 0
    slope = torch.randn(5, 4, dtype=torch.float64)
    (found,) = torch.autograd.grad((model.body[0].weight * slope).sum(), [*model.parameters()])
    torch.testing.assert_close(found, p.T @ slope.flatten())


def test_a_tied_padding_row_moves_since_it_has_a_gradient():
    net = nn.Module()
    net.embed, net.head = nn.Embedding(5, 4, padding_idx=1), nn.Linear(4, 5, bias=False)
    net.head.weight = net.embed.weight
    model = scatter(SubspaceModel(net, 6))
    assert "padding" not in model.recipe
    assert not torch.equal(net.embed.weight[1], model.subspace.stored("embed.weight").detach()[1])


def test_a_file_from_before_moves_its_padding_rows(tmp_path):
    torch.manual_seed(0)
    base = Bag()
    new = scatter(SubspaceModel(copy.deepcopy(base), 12))
    old = scatter(SubspaceModel(copy.deepcopy(base), 12, padding="train"))
    for model in (new, old):
        subspan.save(model, tmp_path / "m")
        loaded = subspan.load(tmp_path / "m", copy.deepcopy(base))
        assert torch.equal(loaded(WORDS), model(WORDS))
        assert loaded.recipe == model.recipe
    assert not torch.equal(new(WORDS), old(WORDS))
    with pytest.raises(SubspanError, match="the projection or its compartments"):
        new.load_state_dict(old.state_dict())


def unusual():
    class Packed(nn.Parameter):
        def unpacked(self):
            return self * self.scale

    class Kind(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.fc = Packed(torch.randn(4, 4)), nn.Linear(4, 4)
            self.q.scale = 2.0

        def forward(self, x):
            return self.fc(x @ self.q.unpacked())

    shared = torch.randn(6)
    overlapping = nn.ParameterList([nn.Parameter(shared[:4]), nn.Parameter(shared[2:])])
    scripted = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))
    expanded = nn.ParameterList(
        [nn.Parameter(torch.ones(1).expand(4)), nn.Parameter(torch.ones(3))]
    )
    integers = nn.ParameterList(
        [nn.Parameter(torch.arange(4), requires_grad=False), nn.Parameter(torch.ones(3))]
    )
    complex_ = nn.ParameterList([nn.Parameter(torch.ones(4, dtype=torch.complex64))])
    yield Kind(), {}, "q is a Packed, a parameter of a kind of its own: exclude it"
    yield overlapping, {}, "0 and 1 share memory and are two parameters"
    yield scripted, {}, "1.weight belongs to a part that TorchScript compiled"
    yield expanded, {}, "0 is expanded"
    yield integers, {"targets": ["0"]}, "0 is torch.int64 and P w is real"
    yield integers, {"train_fully": "0"}, "0 is torch.int64 and has no gradient"
    yield complex_, {}, "0 is torch.complex64 and P w is real"
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        small = nn.ParameterList([nn.Parameter(torch.ones(4).to(dtype))])
        yield small, {}, f"0 is {dtype}, in which PyTorch adds nothing up"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("n", range(9))
def test_unusual_parameters_are_refused_before_anything_changes(n):
    net, options, message = list(unusual())[n]
    before = [(name, p, p.requires_grad, type(p)) for name, p in net.named_parameters()]
    kinds = [type(module) for module in net.modules()]
    with pytest.raises(SubspanError, match=message):
        SubspaceModel(net, 3, **options)
    assert before == [(name, p, p.requires_grad, type(p)) for name, p in net.named_parameters()]
    assert kinds == [type(module) for module in net.modules()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_unusual_parameters_that_stay_are_left_as_they_are():
    net = next(iter(unusual()))[0]
    net.q.requires_grad_(False)
    x, q = torch.randn(3, 4), net.q
    want = net(x)
    model = SubspaceModel(net, 5)
    assert torch.equal(model(x), want)
    assert model.body.q is q
    part = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))
    model = scatter(SubspaceModel(part, 5, exclude="1"))
    torch.testing.assert_close(model(x), part[1](part[0](x)))


class Sharing(nn.Module):
    """A layer, and something that is made of the memory of its weight."""

    def __init__(self, make, buffer=False):
        super().__init__()
        self.fc, self.free = nn.Linear(6, 6), nn.Linear(6, 6)
        made = make(self.fc.weight)
        if buffer:
            self.register_buffer("also", made)
        else:
            self.also = made


TURNED = r"(fc\.weight|also) and (fc\.weight|also) share memory and are two parameters: make them"
BESIDE = r"also shares the memory of fc\.weight, and would stay at θ₀ .*: read fc\.weight"
SHARING = {
    "transposed": (lambda w: nn.Parameter(w.data.t()), False, TURNED),
    "a column": (lambda w: nn.Parameter(w.data[:, 1]), False, TURNED),
    "a view": (lambda w: w.data[:4], False, BESIDE),
    "an expanded view": (lambda w: w.data[0].expand(5, 6), False, BESIDE),
    "a view in a list": (lambda w: [{"half": w.detach()[:, ::2]}], False, BESIDE),
    "a parameter in a list": (lambda w: [nn.Parameter(w.data)], False, BESIDE),
    "a buffer": (lambda w: w.data.view(-1), True, BESIDE),
    "other numbers": (lambda w: w.data.view(torch.int32), True, BESIDE),
}


@pytest.mark.parametrize("how", SHARING)
def test_memory_that_would_stay_behind_is_refused(how):
    make, buffer, message = SHARING[how]
    net = Sharing(make, buffer)
    with pytest.raises(SubspanError, match=message):
        SubspaceModel(net, 5)
    assert type(net.fc) is nn.Linear
    SubspaceModel(net, 5, targets="free")


def test_memory_that_goes_along_or_is_another_part_is_not_refused():
    whole = torch.rand(4, 6)
    columns = nn.ParameterList([nn.Parameter(whole[:, :2]), nn.Parameter(whole[:, 2:])])
    scatter(SubspaceModel(columns, 5)).merge()
    for make in (lambda w: [w], lambda w: w.detach().clone(), lambda w: torch.eye(3).to_sparse()):
        SubspaceModel(Sharing(make), 5)
    model = SubspaceModel(Sharing(lambda w: w.data[:4]), 5, train_fully="fc")
    scatter(model)
    assert torch.equal(model.body.also, model.body.fc.weight[:4])


def test_strided_and_scalar_parameters():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.strided = nn.Parameter(torch.rand(8)[::2])
            self.turned = nn.Parameter(torch.rand(3, 4).T)
            self.scalar = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return (x * self.strided) @ self.turned * self.scalar

    torch.manual_seed(0)
    net, x = Odd(), torch.randn(5, 4)
    plain = copy.deepcopy(net)
    model = SubspaceModel(net, 5)
    torch.testing.assert_close(model(x), plain(x))  # strides decide how products round
    scatter(model)
    torch.testing.assert_close(model.merge()(x), model(x))
    assert torch.equal(model.unwrap()(x), plain(x))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "prune", "kept"])
def test_weights_that_a_hook_computes(how):
    class Keeps(nn.Linear):
        def forward(self, x):
            self.last = [super().forward(x)]
            return self.last[0]

    layer = Keeps(8, 8) if how == "kept" else nn.Linear(8, 8)
    if how == "prune":
        prune.l1_unstructured(layer, "weight", amount=0.5)
    elif how != "kept":
        getattr(nn.utils, how)(layer)
    model, x = scatter(SubspaceModel(nn.Sequential(layer).eval(), 20)), torch.randn(3, 8)
    y = model(x)
    y.sum().backward()
    assert model.coordinates["global"].grad.any()
    for net in (model.merge(), copy.deepcopy(model), copy.deepcopy(model.body)):
        torch.testing.assert_close(net(x), y)


def test_under_another_default_device_and_mode():
    net, x = Net(), torch.randn(5, 8)
    with torch.device("meta"):
        model = SubspaceModel(net, 20)
    assert {p.device.type for p in net.parameters()} == {"cpu"}
    model(x).sum().backward()
    with torch.inference_mode():
        model = SubspaceModel(Net(), 20)
        y = model(x)
    loss = model(x).sum()
    loss.backward()
    torch.testing.assert_close(y, model(x))
    SGD(model.parameters(), lr=0.1).step()


@pytest.mark.heavy
@pytest.mark.parametrize("length", [6, 30])
@pytest.mark.parametrize("projection", ["hash", "gaussian", "kronecker"])
def test_coordinates_of_another_length_are_refused(projection, length, tmp_path):
    """A kernel would read past their end."""
    model, x = SubspaceModel(Net(), 20, projection=projection), torch.randn(5, 8)
    w = model.coordinates["global"]
    w.data = torch.randn(length)
    grow = (lambda: subspan.grow(model, 40),) if projection == "hash" else ()
    for use in (
        lambda: model(x),
        lambda: model.body.head.weight,
        lambda: torch.compile(model, backend="eager")(x),
        model.merge,
        model.state_dict,
        lambda: subspan.save(model, tmp_path / "m"),
        *grow,
    ):
        with pytest.raises(SubspanError, match=f"there are {length} coordinates now.* has 20 col"):
            use()
    assert model.coordinates["global"] is w


@pytest.mark.parametrize("kept", [0, 1 << 22])
@pytest.mark.parametrize("rows", [300, 150])
def test_a_base_of_another_shape_is_refused(kept, rows, monkeypatch):
    monkeypatch.setattr(formed, "KEPT", kept)
    net = nn.Sequential(nn.Embedding(200, 24), nn.Linear(24, 3))
    model, words = SubspaceModel(net, 20), torch.tensor([0, 1, rows - 1])
    dict(net.named_parameters())["0.weight"].data = torch.randn(rows, 24)
    for use in (lambda: model(words), lambda: net[0].weight, model.merge):
        with pytest.raises(SubspanError, match=rf"0.weight has the shape \[{rows}, 24\] now"):
            use()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"])
def test_other_defaults_change_no_method(default, tmp_path):
    def results(around):
        moved, net, other = (copy.deepcopy(first) for _ in range(3))
        model = scatter(SubspaceModel(net, 20))
        adam = torch.optim.Adam(model.parameters())
        for each in (moved, model):
            each(x).sum().backward()
        with around:
            RandomBases(moved, 20).step()
            adam.step()
            subspan.grow(model, 40, optimizer=adam)
            subspan.save(model, tmp_path / "m", bits=3)
            loaded = subspan.load(tmp_path / "m", other).eval()
            variants = subspan.Variants(loaded)
            variants.add("a", torch.ones_like(loaded.coordinates["global"]))
            rows = variants(x, names=["a", None, None, "a"])
        return moved.head.weight, model(x), rows

    torch.manual_seed(0)
    first, x = Net(), torch.randn(4, 8)
    expected = results(nullcontext())
    found = results(torch.device(default) if default == "meta" else default_dtype(default))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_file_that_is_loaded_under_inference_mode_can_be_trained(tmp_path):
    model = SubspaceModel.from_seed(Net, 20, init_seed=1, train_fully="head")
    subspan.save(model, tmp_path / "m")
    with torch.inference_mode():
        loaded = subspan.load(tmp_path / "m", Net)
        made_there = Net()
    loaded(torch.randn(5, 8)).sum().backward()
    SGD(loaded.parameters(), lr=0.1).step()
    with pytest.raises(SubspanError, match=r"head.weight was made under inference_mode"):
        SubspaceModel(made_there, 20, train_fully="head")


def test_a_network_that_was_made_under_inference_mode(tmp_path):
    def make():
        torch.manual_seed(0)
        return build("cnn")

    with torch.inference_mode():
        net, other = make(), make()
        model = scatter(SubspaceModel(net, 20))
    model.body.norm.running_mean = torch.ones(4)
    subspan.save(model, tmp_path / "m")
    loaded, x = subspan.load(tmp_path / "m", other), batch("cnn")
    with torch.no_grad():  # which PyTorch asks for where buffers were made there
        torch.testing.assert_close(loaded.eval()(x), model.eval()(x))
    assert model.unwrap() is net
    assert all(p.requires_grad for p in net.parameters())


def test_a_failing_wrap_leaves_classes_alone(monkeypatch):
    class Slotted(nn.Linear):
        __slots__ = ("extra",)

    class Stubborn(nn.Linear):
        def __setattr__(self, name, value):
            if name == "__class__":
                raise TypeError("no other class")
            super().__setattr__(name, value)

    scatter(SubspaceModel(nn.Sequential(Slotted(4, 4)), 4))
    net = nn.Sequential(nn.Linear(4, 4), Stubborn(4, 4))
    kinds = [type(m) for m in net.modules()]
    with pytest.raises(SubspanError, match=r"module 1 is a Stubborn, .*: exclude it"):
        SubspaceModel(net, 5)
    assert [type(m) for m in net.modules()] == kinds
    assert all(p.requires_grad for p in net.parameters())


def test_unwrapping_gives_everything_back():
    for name in NETS:
        net = build(name)
        kinds, parts = [type(m) for m in net.modules()], dict(net.named_parameters())
        attributes = [sorted(vars(m)) for m in net.modules()]
        first = next(iter(parts.values()))
        first.requires_grad_(False)
        model = scatter(SubspaceModel(net, 12))
        model(batch(name)).sum().backward()
        assert model.unwrap() is net
        assert [type(m) for m in net.modules()] == kinds
        assert dict(net.named_parameters()) == parts
        assert all(type(p) is nn.Parameter for p in parts.values())
        assert [p.requires_grad for p in parts.values()] == [False] + [True] * (len(parts) - 1)
        assert [sorted(vars(m)) for m in net.modules()] == attributes
        for use in (
            model.weights,
            model.merge,
            model.unwrap,
            lambda m=model: m.coordinates["global"],
            lambda m=model: m.fingerprint,
            lambda m=model: subspan.grow(m, 24),
        ):
            with pytest.raises(SubspanError, match="this SubspaceModel was unwrapped"):
                use()
        SubspaceModel(net, 12)


@pytest.mark.parametrize("compartments", ["global", "uniform:3"])
def test_sparse_gradients_are_those_of_dense_ones(compartments):
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(11, 6, sparse=sparse), nn.Linear(6, 2))
        model = scatter(SubspaceModel(net, 9, compartments=compartments))
        model(WORDS).square().sum().backward()
        found.append(torch.cat([w.grad for w in model.parameters()]))
    torch.testing.assert_close(*found)
    assert found[0].any()
