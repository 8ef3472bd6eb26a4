import copy
import inspect
import io
import json
import math
import pickle
import types

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim import SGD, Adam

from subspan import SubspaceModel, SubspanError, calls, projections
from tests.nets import COMPARTMENTS, NETS, batch, build, dim_for

PROJECTIONS = (
    "hash",
    "rademacher",
    "orthogonal",
    "fastfood",
)  # both local and not, both bitwise and not
every_net = pytest.mark.parametrize("name", NETS)
every_cut = pytest.mark.parametrize("compartments", COMPARTMENTS, ids=str)


def wrap(name, compartments="global", dtype=torch.float32, **options):
    net = build(name, dtype)
    return SubspaceModel(net, dim_for(name, compartments), compartments=compartments, **options)


def scatter(model, scale=0.3):
    """Move w away from 0, always in the same way."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for w in model.coordinates.values():
            w.copy_(scale * torch.randn(w.shape, generator=generator))
    return model


def fit(model, x, steps=3):
    optimizer = Adam(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def dense_map(model):
    """P of every tensor as a float64 (weights, d) matrix, from the projections' own definition."""
    rows, column, d = {}, 0, sum(part.dim for part in model.compartments)
    for part, projection in zip(model.compartments, model.projections, strict=True):
        dense, start = projection.dense(), 0
        for piece in part.pieces:
            block = torch.zeros(len(piece), d, dtype=torch.float64)
            block[:, column : column + part.dim] = dense[start : start + len(piece)]
            rows.setdefault(piece.tensor, []).append(block)
            start += len(piece)
        column += part.dim
    return {tensor: torch.cat(blocks) for tensor, blocks in rows.items()}


def flat(model):
    return torch.cat([w.detach() for w in model.coordinates.values()])


# ---- the same network at w = 0, θ₀ + P w afterwards ----------------------------------------------


@every_net
@every_cut
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_wrap_train_merge_unwrap(name, compartments, projection):
    x, plain = batch(name), build(name)
    model = wrap(name, compartments, projection=projection)
    assert torch.equal(model(x), plain(x))
    losses = fit(model, x)
    assert losses[-1] < losses[0]

    state = {key: value.clone() for key, value in model.state_dict().items()}
    merged = model.merge()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(merged.eval()(x), model.eval()(x))
    assert not torch.equal(merged(x), plain.eval()(x))
    like = plain.state_dict()
    assert list(merged.state_dict()) == list(like)
    assert all(value.shape == like[key].shape for key, value in merged.state_dict().items())
    assert [type(p) for p in merged.parameters()] == [nn.Parameter] * len(list(plain.parameters()))

    body = model.body
    restored = model.unwrap()
    assert restored is body
    assert list(restored.state_dict()) == list(like)
    for (key, ours), (_, theirs) in zip(
        restored.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), key


@every_net
@every_cut
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_the_gradient_is_the_dense_one_projected(name, compartments, projection):
    x, plain = batch(name, torch.float64), build(name, torch.float64)
    model = scatter(wrap(name, compartments, torch.float64, projection=projection))
    dense, w = dense_map(model), flat(model)
    theta = {
        key: (p.detach() + (dense[key] @ w).view(p.shape)).requires_grad_()
        for key, p in plain.named_parameters()
    }
    loss = functional_call(plain, theta, x).square().sum()
    gradients = torch.autograd.grad(loss, list(theta.values()))
    expected = sum(dense[key].T @ g.flatten() for key, g in zip(theta, gradients, strict=True))

    ours = model(x).square().sum()
    ours.backward()
    torch.testing.assert_close(ours, loss, rtol=1e-10, atol=1e-10)
    got = torch.cat([p.grad for p in model.coordinates.values()])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["cnn", "tied"])
def test_two_routes_make_one_trajectory(name):
    """SGD with momentum on the model; the same written out with an explicit P."""
    x, plain = batch(name, torch.float64), build(name, torch.float64)
    model = wrap(name, "layer", torch.float64, projection="gaussian")
    dense, base = dense_map(model), {k: p.detach() for k, p in plain.named_parameters()}
    w = flat(model).zero_().requires_grad_()
    velocity = torch.zeros_like(w)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(8):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        theta = {k: base[k] + (dense[k] @ w).view(base[k].shape) for k in base}
        (g,) = torch.autograd.grad(functional_call(plain, theta, x).square().mean(), w)
        velocity = 0.9 * velocity + g
        w = (w - 0.05 * velocity).detach().requires_grad_()
    assert w.abs().max() > 0.01
    torch.testing.assert_close(flat(model), w.detach(), rtol=1e-9, atol=1e-12)


def test_compartments_do_not_share_directions():
    """Each compartment has its own stream: equal layers get different rows."""
    net = nn.Sequential(*[nn.Linear(20, 20, bias=False) for _ in range(2)])
    first, second = dense_map(SubspaceModel(net, [5, 5], compartments="layer")).values()
    assert not torch.equal(first[:, :5], second[:, 5:])


def test_many_small_tensors_share_one_call(monkeypatch):
    model = wrap("encoder")
    assert len(model._calls) == 1
    monkeypatch.setattr(calls, "GROUP", 300)
    cut = wrap("encoder")
    assert len(cut._calls) > 5
    assert len(wrap("encoder", projection="orthogonal")._calls) == 1
    for part in zip(
        scatter(model).weights().values(), scatter(cut).weights().values(), strict=True
    ):
        assert torch.equal(*part)


# ---- copies, files of torch, states --------------------------------------------------------------


@every_net
@every_cut
def test_copies_are_independent(name, compartments):
    x = batch(name)
    model = scatter(wrap(name, compartments)).eval()
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
        scatter(other, scale=-0.5)
        assert not torch.equal(other(x), y)
        assert torch.equal(model(x), y)
        assert torch.equal(other.merge()(x), other(x))
        assert inspect.signature(other.forward) == inspect.signature(build(name).forward)


@every_net
def test_merged_networks_are_ordinary(name):
    """Copies and pickles of them work, and know nothing of us."""
    merged = scatter(wrap(name)).merge().eval()
    x = batch(name)
    assert b"subspan" not in pickle.dumps(merged)
    assert torch.equal(copy.deepcopy(merged)(x), merged(x))
    assert torch.equal(pickle.loads(pickle.dumps(merged))(x), merged(x))
    fit(merged.train(), x)


@every_net
def test_the_state_dict_holds_what_was_trained(name):
    model = scatter(wrap(name, "layer"))
    buffers = {f"body.{key}" for key, _ in build(name).named_buffers()}
    coordinates = {f"coordinates.{key}" for key in model.coordinates}
    assert model.state_dict().keys() == buffers | coordinates | {"fingerprint"}
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = wrap(name, "layer")
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.eval()(batch(name)), model.eval()(batch(name)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"net": 2}, "the initial weights of the model that this state_dict comes from differ"),
        ({"seed": 1}, "the projection or its compartments of the model .* differ"),
        ({"projection": "sparse"}, "the projection or its compartments"),
        ({"projection": "sparse", "s": 4}, "the projection or its compartments"),
        ({"exclude": "bias"}, "the projection or its compartments"),
    ],
)
def test_a_state_of_another_model_is_refused(change, message):
    change = dict(change)
    net = build("mlp")
    if change.pop("net", None):
        net[0].bias.data[0] += 1
    other = scatter(SubspaceModel(net, 12, **change)).state_dict()
    inside = {f"0.{key}": value for key, value in other.items()}
    model = wrap("mlp")
    for loader, state in (
        (model, other), (copy.deepcopy(model), other), (nn.Sequential(model), inside)
    ):  # fmt: skip
        with pytest.raises(SubspanError, match=message):
            loader.load_state_dict(state)
        assert torch.equal(model(batch("mlp")), build("mlp")(batch("mlp")))


def test_patterns_that_select_the_same_make_one_state():
    state = scatter(wrap("mlp", targets="weight")).state_dict()
    wrap("mlp", targets=["0.weight", "2.weight"]).load_state_dict(state)


# ---- modes, dtypes -------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_without_gradient(name, mode, projection):
    """What is cached on the way must serve training afterwards."""
    x = batch(name)
    seed = {torch.no_grad: 11, torch.inference_mode: 12}[mode]  # nothing cached yet
    model = scatter(wrap(name, projection=projection, seed=seed)).eval()
    with mode():
        y = model(x)
    assert not y.requires_grad
    again = model(x)
    again.sum().backward()
    torch.testing.assert_close(again, y, rtol=1e-5, atol=1e-6)  # attention has a faster path


@every_net
def test_autocast_trains(name):
    x, model = batch(name), wrap(name)
    optimizer = Adam(model.parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
            loss = out.float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    (w,) = model.coordinates.values()
    assert w.dtype == w.grad.dtype == torch.float32
    if name in ("mlp", "cnn"):
        assert out.dtype == torch.bfloat16


@every_net
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_moved_to_another_dtype(name, dtype):
    model = scatter(wrap(name)).eval()
    y = model(batch(name))
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    moved = model(batch(name, dtype))
    assert moved.dtype == dtype
    bound = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(moved.float(), y, rtol=bound, atol=bound)
    moved.float().sum().backward()
    assert model.coordinates["global"].grad.dtype == dtype
    assert torch.equal(copy.deepcopy(model)(batch(name, dtype)), moved)
    assert torch.equal(model.merge()(batch(name, dtype)), moved)


@pytest.mark.parametrize("name", ["mlp", "cnn", "encoder", "tied", "raw"])
def test_a_low_precision_base_keeps_float32_coordinates(name):
    x, model = batch(name, torch.bfloat16), wrap(name, dtype=torch.bfloat16)
    assert torch.equal(model(x), build(name, torch.bfloat16)(x))
    losses = fit(model, x)
    assert losses[-1] < losses[0]
    (w,) = model.coordinates.values()
    assert w.dtype == torch.float32
    theta = model.weights()
    assert {t.dtype for t in theta.values()} == {torch.bfloat16}
    assert torch.equal(model.merge().eval()(x), model.eval()(x))
    # Rounded once: θ is the nearest bfloat16 to θ₀ + P w.
    key, rows = next(iter(dense_map(model).items()))
    exact = build(name, torch.bfloat16).get_parameter(key).double() + (
        rows @ w.detach().double()
    ).view(theta[key].shape)
    assert torch.equal(theta[key], exact.bfloat16())


def test_doubles_stay_doubles():
    model = wrap("mlp", dtype=torch.float64)
    assert model.coordinates["global"].dtype == torch.float64


# ---- tied weights, buffers, frozen ones, fully trained ones --------------------------------------


def test_tied_weights_are_one_tensor_before_and_after():
    model = scatter(wrap("tied"))
    plain = build("tied")
    assert sum(part.weights for part in model.compartments) == sum(
        p.numel() for p in plain.parameters()
    )
    assert list(model.weights()) == ["embedding.weight", "hidden.weight", "hidden.bias"]
    for net in (model.merge(), copy.deepcopy(model).unwrap()):
        assert net.output.weight is net.embedding.weight
        assert net.again is net.hidden
        assert len(list(net.parameters())) == 3


def test_buffers_belong_to_the_network():
    x, model, plain = batch("cnn"), wrap("cnn"), build("cnn")
    assert model.changed_buffers() == {}
    for _ in range(2):  # at w = 0: both see the same activations
        model(x), plain(x)
    assert set(model.changed_buffers()) == {
        "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"
    }  # fmt: skip
    for net in (model.merge(), model.unwrap()):
        assert torch.equal(net.norm.running_var, plain.norm.running_var)
        assert net.norm.num_batches_tracked == 2


def test_frozen_parameters_stay_frozen():
    net = build("cnn")
    net.conv.weight.requires_grad_(False)
    model = SubspaceModel(net, 12)
    fit(model, batch("cnn"))
    merged, plain = model.merge(), build("cnn")
    assert torch.equal(merged.conv.weight, plain.conv.weight)
    assert not torch.equal(merged.conv.bias, plain.conv.bias)
    assert [n for n, p in merged.named_parameters() if not p.requires_grad] == ["conv.weight"]
    assert [n for n, _ in model.named_parameters()] == ["coordinates.global"]


def test_targets_exclude_and_train_fully():
    x, plain = batch("cnn"), build("cnn")
    model = wrap(
        "cnn", targets=["conv", r"norm\..*", "head.bias"], exclude=["bias"], train_fully="head"
    )
    assert {n for n, _ in model.named_parameters()} == {
        "coordinates.global", "body.head.weight", "body.head.bias"
    }  # fmt: skip
    assert torch.equal(model(x), plain(x))
    fit(model, x)
    merged = model.merge()
    changed = {
        n for n, p in merged.named_parameters() if not torch.equal(p, plain.get_parameter(n))
    }
    assert changed == {"conv.weight", "norm.weight", "head.weight", "head.bias"}
    assert torch.equal(merged.eval()(x), model.eval()(x))
    assert list(model.fully_trained()) == ["head.bias", "head.weight"]
    head = model.body.head.weight
    assert model.unwrap().head.weight is head


def test_what_is_trained_fully_is_frozen_again_where_it_was():
    net = build("cnn")
    net.head.requires_grad_(False)
    model = SubspaceModel(net, 12, train_fully="head")
    assert model.body.head.weight.requires_grad
    assert not model.merge().head.weight.requires_grad
    assert model.body.head.weight.requires_grad
    assert not model.unwrap().head.weight.requires_grad


def test_train_fully_a_tied_tensor():
    model = scatter(wrap("tied", train_fully="output"))
    assert {n for n, _ in model.named_parameters()} == {
        "coordinates.global",
        "body.embedding.weight",
    }
    fit(model, batch("tied"))
    merged = model.merge()
    assert merged.output.weight is merged.embedding.weight
    assert torch.equal(merged(batch("tied")), model(batch("tied")))


def test_the_networks_own_parameters_are_taken_over():
    net = build("mlp")
    wrapped = SubspaceModel(net, 12)
    assert not list(net.parameters())  # an optimizer over them would say that its list is empty
    assert [p.shape for p in wrapped.parameters()] == [(12,)]
    optimizer = Adam(wrapped.parameters())
    wrapped(batch("mlp")).sum().backward()
    optimizer.step()
    (state,) = optimizer.state.values()
    assert state["exp_avg"].shape == (12,)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.ParameterList([torch.ones(3), torch.ones(3)]),
        lambda: nn.ParameterDict({"a": torch.ones(3), "b": torch.ones(3)}),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
    ],
)
def test_containers_and_parametrizations_of_torch(make):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make()

        def forward(self, x):
            if isinstance(self.inner, nn.Linear):
                return self.inner(x)
            values = self.inner.values() if isinstance(self.inner, nn.ParameterDict) else self.inner
            return x * sum(p for p in values)

    net = Net()
    keys = list(net.state_dict())
    model = scatter(SubspaceModel(net, 4)).eval()
    merged, x = model.merge(), torch.ones(2, 3)
    assert list(merged.state_dict()) == keys
    assert torch.equal(merged(x), model(x))
    assert not torch.equal(model(x), model.unwrap()(x))


@pytest.mark.parametrize("key", ["keys", "a/b", "values", "a%2Fb", "pop"])
def test_any_name_of_a_module_is_a_name_of_coordinates(key):
    net = nn.Module()
    net.add_module(key, nn.Linear(2, 2))
    net.a = nn.ModuleDict({"b": nn.Linear(2, 2)})
    model = scatter(SubspaceModel(net, 4, compartments="layer"))
    assert len(list(model.coordinates.parameters())) == 2
    assert not torch.equal(model.merge().get_submodule(key).weight, net.get_submodule(key).weight)


# ---- transparent ---------------------------------------------------------------------------------


class Talker(nn.Module):
    """A network with attributes, methods and an odd signature."""

    classes = 4

    def __init__(self):
        super().__init__()
        self.linear, self.config = nn.Linear(3, 4), types.SimpleNamespace(width=3)

    def forward(self, pixels, *, labels=None, scale: float = 1.0):
        out = {"logits": scale * self.linear(pixels)}
        return out if labels is None else out | {"loss": out["logits"].sum() - labels}

    def generate(self, pixels, times=1):
        return [self(pixels)["logits"] for _ in range(times)]

    @staticmethod
    def twice(x):
        return 2 * x


def test_signature_arguments_and_results_are_the_networks_own():
    model, plain, x = SubspaceModel(Talker(), 5), Talker(), torch.ones(2, 3)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert list(inspect.signature(copy.deepcopy(model).forward).parameters) == [
        "pixels", "labels", "scale"
    ]  # fmt: skip
    out = model(x, labels=1.0, scale=2.0)
    assert out.keys() == {"logits", "loss"}
    assert torch.equal(model(pixels=x, scale=2.0)["logits"], out["logits"])
    with pytest.raises(TypeError, match="colour"):
        model(x, colour=1)


def test_attributes_and_methods_pass_through():
    model, x = scatter(SubspaceModel(Talker(), 5)), torch.ones(2, 3)
    assert (model.classes, model.config.width, model.twice(4)) == (4, 3, 8)
    once, twice = model.generate(x, times=2)
    assert torch.equal(once, model(x)["logits"])
    assert torch.equal(twice, once)
    assert not torch.equal(once, model.body(x)["logits"])  # θ and not θ₀
    once.sum().backward()
    assert model.coordinates["global"].grad.abs().sum() > 0
    assert not hasattr(model, "colour")
    with pytest.raises(AttributeError, match="colour"):
        _ = model.colour


def test_hooks_of_the_network_run():
    model = wrap("cnn")
    seen = []
    model.body.register_forward_pre_hook(lambda *_: seen.append("body"))
    model.body.conv.register_forward_hook(lambda *_: seen.append("conv"))
    model.register_forward_hook(lambda *_: seen.append("model"))
    model(batch("cnn"))
    assert seen == ["body", "conv", "model"]


def test_training_mode_reaches_the_network():
    model = wrap("cnn")
    assert not model.eval().body.norm.training
    assert model.train().body.norm.training


@every_net
def test_an_error_in_the_network_leaves_it_usable(name):
    model = scatter(wrap(name)).eval()
    y = model(batch(name))
    with pytest.raises((RuntimeError, IndexError, ValueError, AssertionError)):
        model(torch.full((5, 3), 99) if name == "tied" else torch.ones(5, 1, 2))
    assert torch.equal(copy.deepcopy(model)(batch(name)), y)
    assert torch.equal(model(batch(name)), y)


def test_a_model_inside_a_larger_one():
    outer = nn.Sequential(scatter(wrap("mlp")), nn.Linear(4, 2))
    fit(outer, batch("mlp"))
    other = nn.Sequential(wrap("mlp"), nn.Linear(4, 2))
    other.load_state_dict(outer.state_dict())
    assert torch.equal(other(batch("mlp")), outer(batch("mlp")))


# ---- summary of bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be a positive integer"),
        ({"dim": 10**6}, "at most the number of weights"),
        ({"dim": None}, "got None"),
        ({"dim": 5, "projection": "hsh"}, "unknown projection 'hsh': did you mean hash"),
        ({"dim": 5, "seed": -1}, "seed must be an integer in"),
        ({"dim": 5, "seed": 0.5}, "seed must be an integer in"),
        ({"dim": 5, "s": 3}, "projection 'hash' has no options, got 's'"),
        ({"dim": 5, "targets": "nothing"}, "unknown pattern in targets"),
        ({"dim": 5, "exclude": "nothing"}, "unknown pattern in exclude"),
        ({"dim": 5, "train_fully": "nothing"}, "unknown pattern in train_fully"),
        ({"dim": 5, "train_fully": ".*"}, "no parameter is left"),
    ],
)
def test_bad_input_leaves_the_network_untouched(options, message):
    net = build("cnn")
    net.head.weight.requires_grad_(False)
    before = dict(net.named_parameters())
    with pytest.raises(SubspanError, match=message):
        SubspaceModel(net, **options)
    assert all(net.get_parameter(name) is p for name, p in before.items())
    assert not net.head.weight.requires_grad


def test_what_is_no_network_is_refused():
    with pytest.raises(SubspanError, match=r"must be a torch.nn.Module, got function"):
        SubspaceModel(lambda x: x, 5)
    with pytest.raises(SubspanError, match="is a SubspaceModel already: merge or unwrap it first"):
        SubspaceModel(wrap("mlp"), 5)


# ---- from a seed ---------------------------------------------------------------------------------


def test_from_seed_is_the_class_around_a_drawn_network():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = SubspaceModel.from_seed(NETS["cnn"], 12, init_seed=7, projection="sparse", seed=3)
    assert torch.equal(torch.rand(3), expected)  # torch's generator was left alone
    again = SubspaceModel.from_seed(NETS["cnn"], 12, init_seed=7, projection="sparse", seed=3)
    assert (model.init_seed, model.recipe["seed"], model.recipe["projection"]) == (7, 3, "sparse")
    assert model.base_fingerprint == again.base_fingerprint
    other = SubspaceModel.from_seed(NETS["cnn"], 12, init_seed=8)
    assert other.base_fingerprint != model.base_fingerprint


@pytest.mark.parametrize("seed", [-1, 1 << 64, 0.5, "7", None, True])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(SubspanError, match="seed must be an integer in"):
        SubspaceModel.from_seed(NETS["mlp"], 12, init_seed=seed)


def test_from_seed_needs_a_function():
    with pytest.raises(
        SubspanError, match="function that makes the network, got the network itself"
    ):
        SubspaceModel.from_seed(build("mlp"), 12)
    with pytest.raises(SubspanError, match="function that returns a Module, got int"):
        SubspaceModel.from_seed(lambda: 3, 12)
    with pytest.raises(SubspanError, match="has no values yet"):
        SubspaceModel.from_seed(lambda: nn.LazyLinear(3), 12)


# ---- the recipe ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 12},
        {"dim": (4, 8), "compartments": "layer", "projection": "sparse", "s": "sqrt_D", "seed": 9},
        {"compartments": {"bias": 3, ".*": 5}, "targets": ("weight", "bias")},
        {"dim": 9, "compartments": "layer", "allocation": "size", "exclude": ["0.bias"]},
        {"dim": 9, "targets": (p for p in ["weight"]), "train_fully": "2.bias"},
    ],
)
def test_a_recipe_survives_sorted_json_and_rebuilds_the_model(options):
    model = scatter(SubspaceModel(build("mlp"), **options))
    recipe = json.loads(json.dumps(model.recipe, sort_keys=True))
    assert recipe == model.recipe
    again = scatter(SubspaceModel(build("mlp"), **recipe))
    assert again.compartments == model.compartments
    assert again.recipe == model.recipe
    assert torch.equal(again(batch("mlp")), model(batch("mlp")))


def test_every_family_wraps():
    for family in projections():
        model = wrap("mlp", projection=family)
        losses = fit(model, batch("mlp"), steps=2)
        assert all(map(math.isfinite, losses)), family
