"""Derivatives of every kind, and transforms of torch.func."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacfwd, jvp, stack_module_state, vmap

import subspan
from subspan import SubspaceModel, SubspanError
from subspan.subspace import formed
from tests.nets import batch, scatter, wrap
from tests.subspace.in_place.network import pair


def parameters(net):
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


FORWARD_MODE = pytest.mark.filterwarnings(  # of PyTorch's own rules
    "ignore:.torch.jit.script. is deprecated", "ignore:There is a performance drop"
)


@FORWARD_MODE
@torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # the one with all derivatives
@pytest.mark.parametrize("through", ["network", "handle"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "encoder", "raw"])
@pytest.mark.parametrize("compartments", ["global", "uniform:3"])
def test_transforms_of_torch_func(through, name, compartments):
    model = scatter(wrap(name, compartments, torch.float64)).train(name != "cnn")
    net, x = (model if through == "handle" else model.body), batch(name, torch.float64)
    given = parameters(net)

    def loss(given, x):
        return functional_call(net, given, (x[None],)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(given, x)
    for i in range(len(x)):
        want = torch.autograd.grad(loss(given, x[i]), list(given.values()))
        for found, one in zip(per_sample.values(), want, strict=True):
            torch.testing.assert_close(found[i], one)

    ensemble = {key: torch.randn(3, *w.shape, dtype=w.dtype) for key, w in given.items()}
    out = vmap(lambda some: functional_call(net, some, (x,)))(ensemble)
    for i in range(3):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for w, own in zip(twin.parameters(), ensemble.values(), strict=True):
                w.copy_(own[i])
        torch.testing.assert_close(out[i], twin.merge()(x))

    along = {key: torch.randn_like(w) for key, w in given.items()}
    given = {key: w.detach() for key, w in given.items()}
    _, found = jvp(lambda some: functional_call(net, some, (x,)), (given,), (along,))
    h = 1e-6
    ends = [
        functional_call(net, {key: w + s * h * along[key] for key, w in given.items()}, (x,))
        for s in (1, -1)
    ]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=1e-6)


@FORWARD_MODE
def test_jacobians_and_hessians():
    model, x = scatter(wrap("mlp", dtype=torch.float64)), batch("mlp", torch.float64)
    w = model.coordinates["global"].detach()

    def loss(w):
        return functional_call(model, {"coordinates.global": w}, (x,)).square().sum()

    backward = torch.autograd.functional.hessian(loss, w)
    torch.testing.assert_close(torch.func.hessian(loss)(w), backward)
    torch.testing.assert_close(jacfwd(grad(loss))(w), backward)
    assert backward.abs().sum() > 0


@FORWARD_MODE
@torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
@pytest.mark.parametrize("kept", [0, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["mlp", "cnn", "encoder"])
def test_many_gradients_in_one_backward_pass(name, dtype, kept, monkeypatch):
    monkeypatch.setattr(formed, "KEPT", kept)
    model, x = scatter(wrap(name, "uniform:3", dtype)).eval(), batch(name, dtype)
    ws, y = list(model.parameters()), model(x)[:2]
    along = torch.eye(y.numel(), dtype=dtype).view(-1, *y.shape)

    def gradients(v, **options):
        return torch.autograd.grad(y, ws, v, retain_graph=True, **options)

    expected = [torch.stack(each) for each in zip(*map(gradients, along), strict=True)]
    for found in (gradients(along, is_grads_batched=True), vmap(gradients)(along)):
        torch.testing.assert_close(list(found), expected)
    if dtype == torch.float64:
        twice = gradients(along, is_grads_batched=True, create_graph=True)
        torch.autograd.grad(sum(each.sum() for each in twice), ws, allow_unused=True)


@FORWARD_MODE
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_jacobians_are_vectorised(strategy):
    model, x = scatter(wrap("mlp")), batch("mlp")

    def run(w):
        return functional_call(model, {"coordinates.global": w}, (x,))

    w, jacobian = model.coordinates["global"].detach(), torch.autograd.functional.jacobian
    torch.testing.assert_close(
        jacobian(run, w, vectorize=True, strategy=strategy), jacobian(run, w)
    )


def test_gradients_of_the_base_in_a_functional_call():
    """A base that is given, and wants a gradient, has the dense one."""
    model, merged, x = pair()
    given = {name: p.detach().clone().requires_grad_() for name, p in model.body.named_parameters()}
    functional_call(model.body, given, (x,)).square().sum().backward()
    merged(x).square().sum().backward()
    for name, p in merged.named_parameters():
        torch.testing.assert_close(given[name].grad, p.grad)
    assert given["subspan_global"].grad.any()


@FORWARD_MODE
def test_forward_mode_with_a_random_basis_over_coordinates():
    model, x = scatter(wrap("mlp")), batch("mlp")
    twin = copy.deepcopy(model)
    steps = []
    for net, estimator in ((model, "forward"), (twin, "gradient")):
        optimizer = subspan.optim.RandomBases(net.parameters(), 6, lr=0.1, estimator=estimator)

        def closure(net=net, estimator=estimator):
            loss = net(x).square().mean()
            if estimator == "gradient":
                loss.backward()
            return loss

        optimizer.step(closure)
        steps.append(optimizer.coordinates.clone())
    torch.testing.assert_close(*steps)
    assert steps[0].any()


@FORWARD_MODE
def test_transforms_inside_of_a_forward():
    """A transform leaves nothing that it formed when it has ended."""

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def energy(self, x):
            return self.second(self.first(x).tanh()).square().sum()

        def forward(self, x):
            slopes = vmap(grad(self.energy))(x)
            _, along = jvp(self.energy, (x,), (slopes.detach(),))
            return slopes + self.first(x) + along + vmap(grad(self.energy))(x)

    torch.manual_seed(0)
    model, x = scatter(SubspaceModel(Inside(), 10)), torch.randn(3, 4)
    merged = model.merge()
    torch.testing.assert_close(model(x), merged(x))
    model(x).sum().backward()
    merged(x).sum().backward()
    slope = torch.cat([p.grad.flatten() for p in merged.parameters()])
    want = model.projections[0].rmatvec(slope)
    torch.testing.assert_close(model.coordinates["global"].grad, want, rtol=1e-4, atol=1e-5)


def models_of(nets, seeds):
    return [
        scatter(SubspaceModel(n, 12, seed=s), 0.3 + k)
        for k, (n, s) in enumerate(zip(nets, seeds, strict=True))
    ]


def nets(*seeds):
    for seed in seeds:
        torch.manual_seed(seed)
        yield nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def ensemble(models, x, dim=0):
    """PyTorch's own recipe for many models at once; each row of x alone."""
    given, buffers = stack_module_state(models)
    buffers = {name: b.movedim(0, dim) for name, b in buffers.items()}
    base = copy.deepcopy(models[0])
    every = vmap(lambda p, b, row: functional_call(base, (p, b), (row,)), in_dims=(0, dim, None))
    return vmap(every, in_dims=(None, None, 0), out_dims=1)(given, buffers, x)


@pytest.mark.parametrize("dim", [0, 1])
def test_an_ensemble_of_models_around_one_base(dim):
    models, x = models_of(nets(0, 0, 0), (0, 0, 0)), torch.randn(3, 8)
    torch.testing.assert_close(
        ensemble(models, x, dim), torch.stack([model(x) for model in models])
    )


@pytest.mark.parametrize(
    ("seeds", "projections", "message"),
    [
        ((0, 0, 1), (0, 0, 0), "the initial weights of the models whose coordinates and buffers"),
        ((0, 0, 0), (0, 1, 0), "the projection or its compartments of the models whose coord"),
    ],
)
def test_an_ensemble_of_other_models_is_refused(seeds, projections, message):
    models, x = models_of(nets(*seeds), projections), torch.randn(3, 8)
    for dim in (0, 1):
        with pytest.raises(SubspanError, match=message):
            ensemble(models, x, dim)
    other = models[1] if projections[1] else models[2]
    with pytest.raises(SubspanError, match=message):
        functional_call(
            models[0], dict(other.named_parameters()) | dict(other.named_buffers()), (x,)
        )
    assert torch.equal(models[0](x), models[0].merge()(x))


def test_whole_networks_are_given_with_their_own_base():
    """Where θ₀ is given, too, only the projection must be the same."""
    (one, two), x = models_of(nets(0, 1), (0, 0)), torch.randn(3, 8)
    given = {name: p.detach() for name, p in two.body.named_parameters()}
    given |= dict(two.body.named_buffers())
    assert torch.equal(functional_call(one.body, given, (x,)), two(x))
    (other,) = models_of(nets(1), (1,))
    given = {name: p.detach() for name, p in other.body.named_parameters()}
    with pytest.raises(SubspanError, match="the projection or its compartments of the models"):
        functional_call(one.body, given | dict(other.body.named_buffers()), (x,))
