"""Averages of factors: refused wherever numbers of layers are added up; all else as ever."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from subspan import SubspanError
from subspan.layers import LowRankConv2d, LowRankLinear, factorize
from subspan.layers.factors import Factor, Value, witness
from tests.nets import build, scatter

REFUSED = pytest.raises(SubspanError, match="cannot be averaged one by one")


def net(rank=3, **options):
    return factorize(build("mlp"), **({"rank": rank} | options))


def other():
    """The same network after some training."""
    return scatter(net())


def values(network):
    return [p.detach().clone() for p in network.parameters()]


# ---- averages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_buffers": True},
        {"avg_fn": get_ema_avg_fn(0.9)},
        {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    ],
)
def test_averaged_models(options):
    mean = AveragedModel(net(), **options)
    mean.update_parameters(net())  # the first copies
    before = values(mean)
    with REFUSED:
        mean.update_parameters(other())
    assert all(map(torch.equal, before, values(mean)))


def test_averaged_models_of_ranks_that_change():
    mean = AveragedModel(net())
    with pytest.raises(SubspanError, match=r"factors U of ranks 3 and 2 cannot be copied.*load_st"):
        mean.update_parameters(net(2))


MOVING = {
    "lerp_": lambda mean, new: mean.lerp_(new, 0.1),
    "mul_ and add_": lambda mean, new: mean.mul_(0.9).add_(new, alpha=0.1),
    "copy_ of a sum": lambda mean, new: mean.copy_(0.9 * mean + 0.1 * new),
    "copy_ of a sum by name": lambda mean, new: mean.copy_(torch.add(mean * 0.9, new / 10)),
    "a step towards": lambda mean, new: mean.add_(new - mean, alpha=0.1),
    "a step away": lambda mean, new: mean.sub_((mean - new) * 0.1),
    "operators": lambda mean, new: mean.__iadd__((new - mean) * torch.tensor(0.1)),
    "foreach": lambda mean, new: torch._foreach_lerp_([mean], [new], 0.1),
    "foreach of two": lambda mean, new: torch._foreach_add_([mean], [new], alpha=0.1),
}
PARTS = {
    "parameters": lambda network: list(network.parameters()),
    "data": lambda network: [p.data for p in network.parameters()],
    "state": lambda network: list(network.state_dict().values()),
}


@torch.no_grad()
@pytest.mark.parametrize("how", MOVING)
@pytest.mark.parametrize("parts", PARTS)
def test_moving_averages_by_hand(how, parts):
    mean = copy.deepcopy(net())
    with REFUSED:
        for a, b in zip(PARTS[parts](mean), PARTS[parts](other()), strict=True):
            MOVING[how](a, b)


@torch.no_grad()
@pytest.mark.parametrize("kept", [torch.clone, copy.deepcopy, lambda t: t.detach().cpu().clone()])
def test_a_moving_average_of_kept_copies_of_one_network(kept):
    network = net()
    shadow = {name: kept(p.data) for name, p in network.named_parameters()}
    with REFUSED:
        for name, p in network.named_parameters():
            shadow[name] = (1 - 0.9) * p.data + 0.9 * shadow[name]


FEDERATED = {
    "sum": lambda ts: sum(ts) / len(ts),
    "weighted": lambda ts: 0.3 * ts[0] + 0.7 * ts[1],
    "stack": lambda ts: torch.stack([t.float() for t in ts]).mean(0),
    "in place": lambda ts: ts[0].clone().mul_(0.5).add_(ts[1], alpha=0.5),
}


@pytest.mark.parametrize("how", FEDERATED)
@pytest.mark.parametrize("way", ["live", "file", "numpy"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_federated_means(how, way, kind):
    torch.manual_seed(0)
    make = (
        (lambda: LowRankLinear(9, 8, 3)) if kind == "linear" else lambda: LowRankConv2d(2, 8, 3, 3)
    )
    clients = [nn.Sequential(make()) for _ in range(2)]
    states = [client.state_dict() for client in clients]
    if way == "file":
        for i, state in enumerate(states):
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            states[i] = torch.load(file, weights_only=True)
    elif way == "numpy":
        states = [{k: torch.from_numpy(v.numpy().copy()) for k, v in s.items()} for s in states]
    server = nn.Sequential(make())
    before = values(server)
    with REFUSED:
        server.load_state_dict({k: FEDERATED[how]([s[k] for s in states]) for k in states[0]})
    assert all(map(torch.equal, before, values(server)))
    server.load_state_dict(states[0])
    assert torch.equal(server[0].weight, clients[0][0].weight)


def test_means_are_refused_where_they_are_formed():
    factors = [net()[0].U, other()[0].U]
    for mean in FEDERATED.values():
        with REFUSED:
            mean(factors)


def test_means_of_vectors_of_parameters_are_refused_where_they_are_formed():
    networks = [net(), other()]
    for flat in (torch.Tensor.flatten, torch.ravel, lambda p: p.data.view(-1)):
        for vectors in (
            [nn.utils.parameters_to_vector(network.parameters()) for network in networks],
            [torch.cat([flat(p) for p in network.parameters()]).cpu() for network in networks],
            [flat(network[0].V) for network in networks],
        ):
            for mean in FEDERATED.values():
                with REFUSED:
                    mean(vectors)


def test_vectors_of_parameters_move_as_any_tensor():
    network = net()
    vector = nn.utils.parameters_to_vector(network.parameters())
    far = nn.utils.parameters_to_vector(other().parameters())
    distance = (vector - far).square().sum()
    distance.backward()
    direction = torch.cat([p.grad.flatten() for p in network.parameters()])
    nn.utils.vector_to_parameters(vector.detach() - 0.1 * direction, network.parameters())
    moved = nn.utils.parameters_to_vector(network.parameters())
    torch.testing.assert_close((moved - vector).norm(), 0.2 * distance.sqrt())
    columns = torch.cat([network[0].U, network[0].U], dim=1)
    assert type(columns + columns) is torch.Tensor


def test_the_mean_of_equal_factors_is_theirs():
    state = net().state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert {type(t) for t in loaded.values()} == {torch.Tensor}
    server = other()
    server.load_state_dict({name: (t + t) / 2 for name, t in loaded.items()})
    assert torch.equal(server[0].weight, net()[0].weight)


def test_states_of_former_versions_and_other_types_still_load():
    state = {n: t for n, t in net().state_dict().items() if not n.endswith("witness")}
    server = other()
    server.load_state_dict(state)
    assert torch.equal(server[0].weight, net()[0].weight)
    half = {name: t.to(torch.bfloat16) for name, t in net(2).state_dict().items()}
    server.load_state_dict(half)
    assert server[0].rank == 2


@pytest.mark.parametrize("make", [torch.clone, lambda values: values.as_subclass(torch.Tensor)])
def test_a_factor_that_somebody_has_put_in_place_has_its_witness(make):
    network = net()
    network[0].U = nn.Parameter(make(network[0].U.detach()))
    assert "0.witness" in network.state_dict()
    assert type(network[0].U) is Factor


def test_factors_that_a_conversion_has_made_anew_are_factors(monkeypatch):
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    network = net().double()
    assert all(type(p) is Factor for p in (network[0].U, network[0].S, network[0].V))


# ---- all else ------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, weight_decay=0.1),
    "sgd foreach": lambda ps: torch.optim.SGD(ps, 0.1, 0.9, weight_decay=0.1, foreach=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, 0.1, amsgrad=True),
    "adam foreach": lambda ps: torch.optim.Adam(ps, 0.1, weight_decay=0.1, foreach=True),
    "adam fused": lambda ps: torch.optim.Adam(ps, 0.1, weight_decay=0.1, fused=True),
    "lbfgs": lambda ps: torch.optim.LBFGS(ps, 0.1, line_search_fn="strong_wolfe"),
    "rprop": lambda ps: torch.optim.Rprop(ps, 0.1),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, 0.1, weight_decay=0.1),
}


def ordinary(network):
    """The same network with parameters that know nothing."""
    for module in network.modules():
        for p in module._parameters.values():
            if isinstance(p, Factor):
                p.__class__ = nn.Parameter
    return network


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_train_factors_as_other_parameters(name):
    x, y = torch.randn(20, 8), torch.arange(20) % 4
    trained = []
    for network in (net(), ordinary(net())):
        optimizer = OPTIMIZERS[name](network.parameters())

        def closure(network=network, optimizer=optimizer):
            optimizer.zero_grad()
            loss = cross_entropy(network(x), y)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        trained.append(values(network))
    assert all(map(torch.equal, *trained))


def test_what_is_no_average_is_as_ever():
    a, b = net()[0], other()[0]
    with torch.no_grad():
        assert not torch.equal(a.U, b.U)
        assert (a.U - b.U).norm() > 0  # a distance, as of a proximal term
        assert (a.U.T @ b.U).shape == (3, 3)
        a.U.copy_(b.U)
        assert torch.equal(a.U, b.U)
        assert torch.allclose(a.U, b.U)
        nn.utils.parameters_to_vector(net().parameters())
    for p in a.parameters():
        assert isinstance(p, nn.Parameter)
        assert type(p.square().sum()) is torch.Tensor
    assert type(a.weight * 1) is torch.Tensor
    assert type(a(torch.randn(2, 8))) is torch.Tensor
    sum(p.square().sum() for p in a.parameters()).backward()
    assert type(a.U.grad) is torch.Tensor


def test_copies_and_pickles_are_layers_of_their_own():
    layer = net()[0]
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.double().float()]
    for twin in twins:
        assert {type(getattr(twin, name)) for name in "USV"} == {Factor}
        assert torch.equal(twin.U, layer.U)
    assert twins[0].U.of[1] is not layer.U.of[1]
    assert twins[2] is layer
    assert type(layer.U.detach()) is Value
    assert type(copy.deepcopy(layer.U)) is nn.Parameter


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>")
def test_factored_networks_compile_and_export():
    network, x = net().eval(), torch.randn(5, 8)
    expected = network(x)
    torch.compiler.reset()
    torch.testing.assert_close(
        torch.compile(network, backend="aot_eager", fullgraph=True)(x), expected
    )
    program = torch.export.export(network, (x,))
    torch.testing.assert_close(program.module()(x), expected)


def test_a_witness_is_the_weight_times_a_vector_that_is_always_the_same():
    U, S, V = torch.randn(7, 3), torch.randn(3, 3), torch.randn(5, 3)
    z = witness(*(torch.eye(5) for _ in range(3)))
    torch.testing.assert_close(witness(U, S, V), U @ S @ V.T @ z)
