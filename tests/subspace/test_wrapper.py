"""A model is an ordinary module: copies, states, attributes, hooks, bad input, the recipe."""

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

import subspan
from subspan import SubspaceModel, SubspanError, projections
from tests.nets import COMPARTMENTS, NETS, batch, build, fit, scatter, wrap

every_net = pytest.mark.parametrize("name", NETS)
every_cut = pytest.mark.parametrize("compartments", COMPARTMENTS, ids=str)


# ---- copies, files of torch, states --------------------------------------------------------------


@every_net
@every_cut
def test_copies_are_independent(name, compartments):
    x = batch(name)
    model = scatter(wrap(name, compartments)).eval()
    y = model(x)
    assert torch.equal(copy.copy(model)(x), y)
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
        (model, other),
        (copy.deepcopy(model), other),
        (nn.Sequential(model), inside),
    ):
        with pytest.raises(SubspanError, match=message):
            loader.load_state_dict(state)
        assert torch.equal(model(batch("mlp")), build("mlp")(batch("mlp")))


def test_patterns_that_select_the_same_make_one_state():
    state = scatter(wrap("mlp", targets="weight")).state_dict()
    wrap("mlp", targets=["0.weight", "2.weight"]).load_state_dict(state)


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
        "pixels",
        "labels",
        "scale",
    ]
    out = model(x, labels=1.0, scale=2.0)
    assert out.keys() == {"logits", "loss"}
    assert torch.equal(model(pixels=x, scale=2.0)["logits"], out["logits"])
    with pytest.raises(TypeError, match="colour"):
        model(x, colour=1)


class Softmax(SubspaceModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).softmax(-1)

    def __len__(self):
        return 77


class Scaled(SubspaceModel):
    def forward(self, x, scale=2):
        return super().forward(x) * scale


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("cls", "change", "signature"),
    [
        (Softmax, lambda y: y.softmax(-1), inspect.signature(nn.Sequential().forward)),
        (Scaled, lambda y: 2 * y, inspect.signature(lambda x, scale=2: 0)),
    ],
)
def test_a_subclass_has_its_own_forward(cls, change, signature):
    x, model = batch("mlp"), scatter(cls(build("mlp"), 12))
    y = change(scatter(wrap("mlp"))(x))
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(each(x), y)
        assert inspect.signature(each.forward) == signature
        assert len(each) == (77 if cls is Softmax else 3)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), y)


def test_attributes_and_methods_pass_through():
    model, x = scatter(SubspaceModel(Talker(), 5)), torch.ones(2, 3)
    assert (model.classes, model.config.width, model.twice(4)) == (4, 3, 8)
    once, twice = model.generate(x, times=2)
    assert torch.equal(once, model(x)["logits"])
    assert torch.equal(twice, once)
    assert torch.equal(once, model.body(x)["logits"])
    assert not torch.equal(once, copy.deepcopy(model).unwrap()(x)["logits"])  # θ and not θ₀
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


@pytest.mark.parametrize(
    ("wrap", "name"), [(SubspaceModel, "mlp"), (SubspaceModel, "lstm"), (subspan.lora, "mlp")]
)
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_a_hook_that_raises_leaves_the_network_as_it_was(wrap, kind, name):
    def raises(module, name, value):
        raise RuntimeError("not here")

    net, x = build(name), batch(name)
    y, before = net(x), [dict(vars(module)) for module in net.modules()]
    classes = [type(module) for module in net.modules()]
    hook = getattr(nn.modules.module, f"register_module_{kind}_registration_hook")(raises)
    with hook, pytest.raises(RuntimeError, match="not here"):
        wrap(net, 5)
    assert torch.equal(net(x), y)
    assert [type(module) for module in net.modules()] == classes
    assert [vars(module).keys() for module in net.modules()] == [own.keys() for own in before]
    assert all(type(p) is nn.Parameter and p.requires_grad for p in net.parameters())
    assert list(net.state_dict()) == list(build(name).state_dict())
    wrap(net, 5)


@pytest.mark.heavy
@pytest.mark.parametrize("wrap", [SubspaceModel, subspan.lora])
def test_what_torch_compile_has_made_is_refused(wrap):
    net, x = build("mlp"), batch("mlp")
    y, state = net(x), list(net.state_dict())
    with pytest.raises(SubspanError, match=r"wrap the network first, and then torch\.compile\(mod"):
        wrap(torch.compile(net, backend="eager"), 5)
    assert torch.equal(net(x), y)
    assert list(net.state_dict()) == state
    assert torch.equal(torch.compile(wrap(net, 5), backend="eager")(x), y)


def test_what_is_no_network_is_refused():
    with pytest.raises(SubspanError, match=r"must be a torch.nn.Module, got function"):
        SubspaceModel(lambda x: x, 5)
    with pytest.raises(SubspanError, match="is a SubspaceModel already: merge or unwrap it first"):
        SubspaceModel(wrap("mlp"), 5)


@pytest.mark.parametrize(
    "take",
    [
        SubspaceModel.of,
        subspan.count,
        subspan.layers.merge,
        lambda net: subspan.layers.factorize(net, rank=2),
        lambda net: subspan.optim.DLRT(net, lr=0.1),
        lambda net: subspan.save(net, "model.safetensors"),
    ],
)
def test_parameters_and_states_are_no_network(take):
    net = build("mlp")
    for given in (net.parameters(), net.state_dict(), None):
        with pytest.raises(SubspanError, match=r"must be a torch.nn.Module, got \w+"):
            take(given)


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
