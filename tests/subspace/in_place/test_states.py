"""A network's own methods see θ, and whoever asks it as a whole gets coordinates."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import subspan
from subspan import SubspaceModel, SubspanError
from subspan.subspace.parameters import saved_buffers
from tests.nets import NETS, batch, build, scatter, wrap
from tests.subspace.in_place.network import Net, pair, same_function


def test_the_networks_own_methods_save_an_ordinary_network(tmp_path):
    model, merged, x = pair(train_fully="head")
    for save in (model.save_pretrained, model.body.save_pretrained):
        save(tmp_path / "net.pt")
        state = torch.load(tmp_path / "net.pt", weights_only=True)
        assert list(state) == list(Net().state_dict())
        plain = Net()
        plain.load_state_dict(state)
        assert torch.equal(plain(x), merged(x))


def test_a_method_that_goes_round_through_others(tmp_path):
    import safetensors.torch

    class Hub(Net):
        def save_pretrained(self, path):
            safetensors.torch.save_model(self, str(path))

    model = scatter(SubspaceModel(Hub(), 20)).eval()
    model.save_pretrained(tmp_path / "m")
    plain = Net()
    safetensors.torch.load_model(plain, str(tmp_path / "m"))
    assert torch.equal(plain(torch.ones(1, 8)), model(torch.ones(1, 8)))


def test_states_of_the_network_are_small_and_load_back():
    model, _, x = pair()
    state = model.body.state_dict()
    assert list(state) == ["subspan_global", "subspan_fingerprint"]
    assert all(value.is_floating_point() for value in state.values())
    torch.manual_seed(0)
    other = SubspaceModel(Net(), 20).body
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))
    assert other.load_state_dict(state) == nn.Module().load_state_dict({})  # all keys match
    with pytest.raises(RuntimeError, match=r"Missing key.*subspan_global"):
        other.load_state_dict({})


def test_a_network_around_it_saves_all_weights_and_the_coordinates(tmp_path):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net, self.last = Net(), nn.Linear(4, 2)

        save_pretrained = Net.save_pretrained

    around = Around()
    model = scatter(SubspaceModel(around.net, 20))
    assert len(around.state_dict()) == 4
    around.save_pretrained(tmp_path / "net.pt")
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    missing, unexpected = Around().load_state_dict(state, strict=False)
    assert missing == []
    assert unexpected == ["net.subspan_global", "net.subspan_fingerprint"]
    again = Around()
    other = SubspaceModel(again.net, 20)
    again.load_state_dict(state)
    assert torch.equal(other.coordinates["global"], model.coordinates["global"])
    state["net.head.weight"] = state["net.head.weight"] + 0.1
    with pytest.raises(SubspanError, match=r"head\.weight .* is not the weight that its coord"):
        again.load_state_dict(state)


@pytest.mark.parametrize("strict", [False, True])
def test_a_state_of_the_handle_loads_into_the_network(strict):
    model, _, x = pair(train_fully="head", compartments="tensor")
    for prefix in ("", "0."):
        torch.manual_seed(0)
        other = SubspaceModel(Net(), 20, train_fully="head", compartments="tensor").body
        net = nn.Sequential(other) if prefix else other
        state = {prefix + key: value for key, value in model.state_dict().items()}
        assert net.load_state_dict(state, strict) == nn.Module().load_state_dict({})
        assert torch.equal(net(x), model(x))
    torch.manual_seed(1)
    with pytest.raises(SubspanError, match="initial weights"):
        SubspaceModel(Net(), 20, train_fully="head").body.load_state_dict(model.state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_of_all_weights_is_loaded_as_coordinates(assign):
    for name, family in itertools.product(NETS, ("hash", "rademacher", "kronecker")):
        model = scatter(
            wrap(name, "layer" if name != "raw" else "uniform:3", projection=family)
        ).eval()
        complete = model.merge().state_dict()
        other = wrap(name, "layer" if name != "raw" else "uniform:3", projection=family)
        other.body.load_state_dict(complete, assign=assign)
        torch.testing.assert_close(
            other.eval()(batch(name)), model(batch(name)), rtol=1e-4, atol=1e-5
        )
        for key, w in other.coordinates.items():
            torch.testing.assert_close(w, model.coordinates[key], rtol=1e-3, atol=1e-4)
        other.state_dict()  # the base is the same


def test_a_state_outside_of_the_subspace_is_refused():
    model, _, x = pair()
    torch.manual_seed(9)
    said = same_function(model, x, lambda: model.body.load_state_dict(Net().state_dict()))
    assert "do not lie in this model's subspace" in said
    some = {"head.weight": torch.ones(4, 16)}
    said = same_function(model, x, lambda: model.body.load_state_dict(some, strict=False))
    assert "or some of the weights only" in said


REST = {  # what stays at θ₀ of each network: a buffer's module, both names of a tied one, a root's
    "cnn": {"targets": "conv", "train_fully": "head.bias"},
    "tied": {"targets": "hidden"},
    "raw": {"targets": "linear.weight"},
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("through", ["network", "handle", "outer"])
@pytest.mark.parametrize("name", REST)
def test_states_go_without_what_nobody_trains(name, through, assign):
    def make():
        model = wrap(name, **REST[name])
        return model, {"network": model.body, "handle": model, "outer": nn.Sequential(model)}

    (model, ways), (other, places) = make(), make()
    scatter(model)
    state = ways[through].state_dict()
    trained = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() for b in saved_buffers(model.body).values())
    assert sum(value.numel() for value in state.values()) == trained + buffers + 32
    kept = {name: id(p) for name, p in other.body.named_parameters()}
    old = dict(state)  # as states were before, with all that stays
    start = {"network": "", "handle": "body.", "outer": "0.body."}[through]
    old |= {f"{start}{path}": p.detach().clone() for path, p in model.subspace.at_rest()}
    assert old.keys() != state.keys()
    for given in (state, old):
        places[through].load_state_dict({key: v.clone() for key, v in given.items()}, assign=assign)
        assert torch.equal(other.eval()(batch(name)), model.eval()(batch(name)))
        if given is state:
            fully = {key for key in kept if key in REST[name].get("train_fully", "")}
            same = {key for key, p in other.body.named_parameters() if id(p) == kept[key]}
            assert same >= kept.keys() - fully - {"subspan_global"}
        other.state_dict()
    assert list(model.body.get_submodule("hidden" if name == "tied" else "").state_dict())


def test_a_state_of_all_weights_must_have_all():
    model = wrap("cnn", targets="conv")
    complete = scatter(wrap("cnn", targets="conv")).merge().state_dict()
    model.body.load_state_dict(complete)
    del complete["head.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.weight"):
        model.body.load_state_dict(complete)
    with pytest.raises(RuntimeError, match=r"Missing key.*subspan_global"):
        model.body.load_state_dict({})


def averages():
    yield "a sum", lambda states: {k: sum(s[k] for s in states) / len(states) for k in states[0]}
    yield (
        "a mean",
        lambda states: {k: torch.stack([s[k].float() for s in states]).mean(0) for k in states[0]},
    )
    yield (
        "weighted",
        lambda states: {
            k: sum(c * s[k] for c, s in zip((0.1, 0.6, 0.3), states, strict=True))
            for k in states[0]
        },
    )
    yield (
        "moving",
        lambda states: {
            k: 0.7 * (0.7 * states[0][k] + 0.3 * states[1][k]) + 0.3 * states[2][k]
            for k in states[0]
        },
    )


@pytest.mark.parametrize(("what", "mean"), list(averages()), ids=[name for name, _ in averages()])
@pytest.mark.parametrize("through", ["network", "handle"])
def test_an_average_of_states_is_a_state(what, mean, through):
    torch.manual_seed(0)
    net = build("cnn")
    clients = [SubspaceModel(copy.deepcopy(net), 20) for _ in range(3)]
    for n, client in enumerate(clients):
        scatter(client, scale=0.1 * (n + 1))
    of = (lambda m: m.body) if through == "network" else (lambda m: m)
    server = SubspaceModel(copy.deepcopy(net), 20)
    states = [of(client).state_dict() for client in clients]
    of(server).load_state_dict(mean(states))
    key = "subspan_global" if through == "network" else "coordinates.global"
    torch.testing.assert_close(server.coordinates["global"].detach(), mean(states)[key])
    server.state_dict()
    other = SubspaceModel(build("cnn"), 20, seed=1)
    with pytest.raises(SubspanError, match="the projection or its compartments"):
        of(server).load_state_dict(mean([*states[:2], of(other).state_dict()]))


@pytest.mark.parametrize("through", ["network", "handle"])
@pytest.mark.parametrize(
    "options", [{}, {"use_buffers": True}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}]
)
def test_averaged_models(through, options):
    model = wrap("mlp")
    net = model if through == "handle" else model.body
    averaged, seen = AveragedModel(net, **options), []
    for n in range(3):
        scatter(model, scale=0.2 * (n + 1))
        averaged.update_parameters(net)
        seen.append(model.coordinates["global"].detach().clone())
    twin = averaged.module if through == "handle" else SubspaceModel.of(averaged.module)
    if "multi_avg_fn" in options:
        want = 0.9 * (0.9 * seen[0] + 0.1 * seen[1]) + 0.1 * seen[2]
    else:
        want = torch.stack(seen).mean(0)
    torch.testing.assert_close(twin.coordinates["global"].detach(), want)
    assert torch.equal(averaged.eval()(batch("mlp")), twin.merge()(batch("mlp")))
    twin.state_dict()


@pytest.mark.parametrize("name", ["mlp", "raw"])
@pytest.mark.parametrize("options", [{}, {"use_buffers": True}])
@pytest.mark.parametrize("pair", ["handle handle", "network network", "handle network", "outer"])
def test_averaged_models_of_a_network_with_a_head(pair, options, name):
    """PyTorch pairs all parameters of its copy with those that the model lists, by their order."""
    model = wrap(name, train_fully="2" if name == "mlp" else "linear")
    outer = nn.Sequential(model, nn.Linear(4, 2))
    given, updated = {"handle": model, "network": model.body, "outer": outer}, pair.split()
    averaged, seen = AveragedModel(given[updated[0]], **options), []
    for n in range(3):
        scatter(model, scale=0.2 * (n + 1))
        averaged.update_parameters(given[updated[-1]])
        seen.append([p.detach().clone() for p in model.parameters()])
    twin = averaged.module[0] if pair == "outer" else averaged.module
    twin = twin if updated[0] != "network" else SubspaceModel.of(twin)
    for mean, values in zip(twin.parameters(), zip(*seen, strict=True), strict=True):
        torch.testing.assert_close(mean.detach(), torch.stack(values).mean(0))


@pytest.mark.parametrize("through", ["handle", "network"])
@pytest.mark.parametrize("averages", ["AveragedModel", "by hand"])
def test_averages_of_a_network_that_is_unfrozen_by_and_by(averages, through):
    """The copy was made before; two layers of one shape would be taken for each other."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    model = SubspaceModel(net, 5, targets="0.weight", train_fully="2.*")
    given = model if through == "handle" else net
    mean = AveragedModel(given) if averages == "AveragedModel" else copy.deepcopy(given)
    seen = []
    for _ in range(2):
        scatter(model)
        if averages == "AveragedModel":
            mean.update_parameters(given)
        else:
            with torch.no_grad():
                for p, new in zip(mean.parameters(), given.parameters(), strict=True):
                    p.copy_(new)
        seen.append([p.detach().clone() for p in net.parameters()])
        net[1].requires_grad_(True)
    values = [torch.stack(v).mean(0) for v in zip(*seen, strict=True)]
    want = values if averages == "AveragedModel" else seen[-1]
    twin = mean.module if averages == "AveragedModel" else mean
    twin = twin.body if through == "handle" else twin
    for p, value in zip(twin.parameters(), want, strict=True):
        torch.testing.assert_close(p.detach().as_subclass(torch.Tensor), value)


def test_a_copy_lists_what_its_original_lists():
    """Moving averages freeze a copy, and pair its parameters with the original's."""
    model = wrap("mlp", targets="0", train_fully="2.bias")
    model.body.register_parameter("extra", nn.Parameter(torch.ones(1)))
    model.body[2].weight.requires_grad_(True)
    mean = copy.deepcopy(model)
    for p in mean.parameters():
        p.requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    assert names == ["coordinates.global", "body.extra", "body.2.weight", "body.2.bias"]
    assert [name for name, _ in mean.named_parameters()] == names


def test_subspan_sees_coordinates_whatever_it_is_given(tmp_path):
    model, merged, x = pair()
    assert subspan.save(model.body, tmp_path / "a") == subspan.save(model, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert subspan.count(model.body) == subspan.count(model)
    torch.manual_seed(0)
    net = Net()
    subspan.load(tmp_path / "a", net)
    assert torch.equal(net.eval()(x), merged(x))
