import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim import SGD, Adam

from subspan import SubspaceModel
from subspan.subspace import blocks
from tests.nets import COMPARTMENTS, NETS, PROJECTIONS, batch, build, fit, scatter, wrap

every_net = pytest.mark.parametrize("name", NETS)


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


# Quick are all with hash; of other projections all networks in one piece, and one in all pieces.
every_way = pytest.mark.parametrize(
    ("name", "compartments", "projection"),
    [
        pytest.param(
            name,
            cut,
            projection,
            marks=()
            if projection == "hash" or cut == "global" or name == "cnn"
            else pytest.mark.slow,
        )
        for name in NETS
        for cut in COMPARTMENTS
        for projection in PROJECTIONS
    ],
)


@every_way
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


@every_way
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


@pytest.mark.parametrize("compartments", ["global", "uniform:3"])
def test_second_derivatives_are_those_of_the_dense_map(compartments):
    x, plain = batch("mlp", torch.float64), build("mlp", torch.float64)
    model = scatter(wrap("mlp", compartments, torch.float64, projection="gaussian"))
    dense, w = dense_map(model), flat(model).requires_grad_()
    theta = {k: p.detach() + (dense[k] @ w).view(p.shape) for k, p in plain.named_parameters()}
    expected = functional_call(plain, theta, x).square().mean()
    first = torch.autograd.grad(expected, w, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), w)[0]

    coordinates = list(model.coordinates.values())
    ours = torch.autograd.grad(model(x).square().mean(), coordinates, create_graph=True)
    twice = torch.autograd.grad(sum(g.square().sum() for g in ours), coordinates)
    torch.testing.assert_close(torch.cat(ours), first, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cat(twice), second, rtol=1e-9, atol=1e-12)


def test_shapes_on_the_meta_device():
    model = wrap("mlp").to("meta")
    assert model(torch.ones(3, 8, device="meta")).shape == (3, 4)


def test_compartments_do_not_share_directions():
    """Each compartment has its own stream: equal layers get different rows."""
    net = nn.Sequential(*[nn.Linear(20, 20, bias=False) for _ in range(2)])
    first, second = dense_map(SubspaceModel(net, [5, 5], compartments="layer")).values()
    assert not torch.equal(first[:, :5], second[:, 5:])


def test_many_small_tensors_share_one_block(monkeypatch):
    model = wrap("encoder")
    assert len(model.subspace.blocks) == 1
    monkeypatch.setattr(blocks, "GROUP", 300)
    cut = wrap("encoder")
    assert len(cut.subspace.blocks) > 5
    assert len(wrap("encoder", projection="orthogonal").subspace.blocks) == 1
    for part in zip(
        scatter(model).weights().values(), scatter(cut).weights().values(), strict=True
    ):
        assert torch.equal(*part)


# ---- modes, dtypes -------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_without_gradient(name, mode, projection):
    """Training afterwards can use whatever was cached on the way."""
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
    if name == "lstm" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("PyTorch has no LSTM in bfloat16 on this processor")
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
    own = torch.float32 if dtype == torch.bfloat16 else dtype
    assert {p.dtype for p in model.parameters()} == {own}
    assert {theta.dtype for theta in model.weights().values()} == {dtype}
    moved = model(batch(name, dtype))
    assert moved.dtype == dtype
    bound = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(moved.float(), y, rtol=bound, atol=bound)
    moved.float().sum().backward()
    assert model.coordinates["global"].grad.dtype == own
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


@pytest.mark.parametrize("of", ["handle", "network"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coordinates_keep_their_digits_where_weights_get_16_bits(of, dtype):
    """Converted after wrapping or before, it is the same model."""
    model, x = scatter(wrap("mlp")), batch("mlp")
    before = wrap("mlp", dtype=dtype)
    (w,), (w_before,) = model.coordinates.values(), before.coordinates.values()
    exact = w.detach().clone()
    with torch.no_grad():
        w_before.copy_(exact)
    model(x).sum().backward()
    grad = w.grad.clone()
    converted = (model if of == "handle" else model.body).to(dtype)
    (w,) = model.coordinates.values()
    assert w.dtype == w.grad.dtype == torch.float32
    assert torch.equal(w, exact)
    assert torch.equal(w.grad, grad)
    assert {t.dtype for t in model.weights().values()} == {dtype}
    assert torch.equal(converted(x.to(dtype)), before(x.to(dtype)))
    fit(model, x.to(dtype))
    assert not torch.equal(next(iter(model.coordinates.values())), exact)
    converted.float()
    assert next(iter(model.coordinates.values())).dtype == torch.float32


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
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
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
        "coordinates.global",
        "body.head.weight",
        "body.head.bias",
    }
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


@pytest.mark.parametrize(("name", "fully"), [("lstm", ".*bias.*"), ("raw", "gain")])
def test_parameters_keep_their_order_where_some_stay_in_place(name, fully):
    model = wrap(name, train_fully=fully)
    for net in (model.merge(), model.unwrap()):
        assert list(net.state_dict()) == list(build(name).state_dict())


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


def test_the_network_keeps_its_parameters_frozen_and_trains_its_coordinates():
    net = build("mlp")
    before = dict(net.named_parameters())
    model = SubspaceModel(net, 12)
    now = dict(net.named_parameters())
    assert list(now) == ["subspan_global", *before]
    assert all(now[name] is p and not p.requires_grad for name, p in before.items())
    assert [p.shape for p in model.parameters()] == [(12,)]
    optimizer = Adam(net.parameters())
    net(batch("mlp")).sum().backward()
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
    base = net.get_submodule(key)._parameters["weight"]
    assert not torch.equal(model.merge().get_submodule(key).weight, base)
