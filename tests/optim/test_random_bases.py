"""RandomBases: what a step is, three ways to its coordinates, state, and refusals.

Every law is held against dense matrices in float64, or against a second way to the same weights.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from subspan import SubspaceModel, SubspanError
from subspan.optim import RandomBases, replay
from tests.families.test_updates import Live
from tests.nets import batch, build

X = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(20) % 4
WEIGHTS = 8 * 16 + 16 + 16 * 4 + 4  # of "mlp"


# PyTorch's own forward mode scripts a few functions when it is first used.
JVP = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def mlp(dtype=torch.float64):
    return build("mlp", dtype)


def loss_of(net, x=X):
    return cross_entropy(net(x.to(next(net.parameters()).dtype)).float(), Y)


def flat(net):
    return torch.cat([p.detach().double().reshape(-1) for p in net.parameters()])


def gradient(net):
    return torch.cat([p.grad.double().reshape(-1) for p in net.parameters()])


def run(net, optimizer, steps=5):
    """The weights after each of some steps."""
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
        seen.append(flat(net))
    return seen


def dense(optimizer, step, basis=0):
    """P of all parts as one (D, d) matrix, block by block."""
    projections = [part.projections[basis] for part in optimizer.directions.compartments]
    return torch.block_diag(*[projection.dense(step=step) for projection in projections])


def give(net, g):
    """Gradients from one vector."""
    sizes = [p.numel() for p in net.parameters()]
    for p, part in zip(net.parameters(), g.split(sizes), strict=True):
        p.grad = part.view_as(p).to(p.dtype)


# ---- what a step is ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["rademacher", "hash", "gaussian", "orthogonal", "fastfood"])
def test_a_step_goes_down_the_projected_gradient(family):
    net = mlp()
    optimizer = RandomBases(net, 10, lr=0.7, distribution=family, seed=3)
    for step in range(4):
        net.zero_grad()
        loss_of(net).backward()
        P, g, before = dense(optimizer, step), gradient(net), flat(net)
        optimizer.step()
        torch.testing.assert_close(flat(net), before - 0.7 * P @ (P.T @ g))
        torch.testing.assert_close(optimizer.coordinates, P.T @ g)
    assert not torch.equal(dense(optimizer, 0), dense(optimizer, 1))


@pytest.mark.parametrize("family", ["rademacher", "hash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compartments", ["global", "layer", "uniform:3"])
def test_low_precisions_take_the_same_step(compartments, dtype, family):
    """By kernels, and rounded once, the step of float64."""
    exact, net = mlp(), mlp(dtype)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), net.parameters(), strict=True):
            p.copy_(q)
    g = torch.randn(WEIGHTS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for trained, gradients in ((net, g), (exact, g.to(dtype).double())):
        give(trained, gradients)
        RandomBases(trained, 12, 0.7, distribution=family, compartments=compartments).step()
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(flat(net), flat(exact), rtol=2 * rounding, atol=2 * rounding)


@pytest.mark.heavy
def test_a_compiled_step_is_the_same():
    nets = [mlp(torch.float32) for _ in range(2)]
    optimizers = [RandomBases(net, 10, 0.5) for net in nets]
    step = torch.compile(lambda: optimizers[1].step(), backend="eager")
    for _ in range(2):
        for net, optimizer, do in zip(nets, optimizers, (optimizers[0].step, step), strict=True):
            optimizer.zero_grad()
            loss_of(net).backward()
            do()
    torch.testing.assert_close(flat(nets[0]), flat(nets[1]))


def test_a_step_between_forward_and_backward_is_noticed():
    """Autograd may have saved weights that a step changes, and says so, as with PyTorch's own."""
    layer, x = nn.Linear(4, 3), torch.randn(2, 4, requires_grad=True)
    optimizer = RandomBases(layer, 5, 1.0)
    loss = layer(x).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_that_share_memory_each_move():
    """Whatever order their entries have in it."""
    shared = torch.zeros(4, 3, dtype=torch.float64)
    p, q = nn.Parameter(shared), nn.Parameter(shared.T)
    optimizer = RandomBases([("p", p), ("q", q)], 5, 1.0)
    p.grad, q.grad = torch.ones_like(p), torch.full_like(q, 2.0)
    P = dense(optimizer, 0)
    moved = -P @ (P.T @ torch.cat([p.grad.reshape(-1), q.grad.reshape(-1)]))
    optimizer.step()
    torch.testing.assert_close(p.data, moved[:12].view(4, 3) + moved[12:].view(3, 4).T)


@pytest.mark.parametrize("compartments", ["global", "layer", "tensor", "uniform:3"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("family", ["hash", "rademacher", "orthogonal"])
def test_a_basis_that_stays_is_a_subspace_trained_by_sgd(family, momentum, compartments):
    """FPD: two programs, one trajectory."""
    net, options = mlp(), {"compartments": compartments, "seed": 5}
    model = SubspaceModel(mlp(), 12, projection=family, **options)
    other = SGD(model.parameters(), lr=0.3, momentum=momentum)
    ours = RandomBases(
        net, 12, lr=0.3, momentum=momentum, distribution=family, redraw_every=None, **options
    )
    for _ in range(3):
        for trained, optimizer in ((net, ours), (model, other)):
            optimizer.zero_grad()
            loss_of(trained).backward()
            optimizer.step()
        torch.testing.assert_close(flat(net), flat(model.merge()))


def test_momentum_lives_as_long_as_its_basis():
    net = mlp()
    optimizer = RandomBases(net, 10, lr=0.5, redraw_every=3, momentum=0.8)
    velocity = torch.zeros(10, dtype=torch.float64)
    for step in range(7):
        net.zero_grad()
        loss_of(net).backward()
        P, before = dense(optimizer, step // 3), flat(net)
        velocity = (0 if step % 3 == 0 else 0.8 * velocity) + P.T @ gradient(net)
        optimizer.step()
        torch.testing.assert_close(flat(net), before - 0.5 * P @ velocity)


@pytest.mark.parametrize("without", ["void", "no momentum"])
def test_momentum_ends_with_its_basis_whatever_the_first_step_of_the_next_is(without):
    net = mlp()
    optimizer = RandomBases(net, 10, lr=0.5, redraw_every=3, momentum=0.8)
    run(net, optimizer, 3)
    optimizer.zero_grad()
    loss_of(net).backward()
    if without == "void":
        net[0].weight.grad[0, 0] = torch.nan
    optimizer.param_groups[0]["momentum"] = 0.8 if without == "void" else 0.0
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.8
    assert optimizer.skipped == (without == "void")
    before = flat(net)
    (after,) = run(net, optimizer, 1)
    P = dense(optimizer, 1)
    torch.testing.assert_close(after - before, -0.5 * P @ (P.T @ gradient(net)))


def test_weight_decay_is_projected_with_the_gradient():
    net = mlp()
    optimizer = RandomBases(net, 10, lr=0.5, weight_decay=0.1)
    loss_of(net).backward()
    P, before = dense(optimizer, 0), flat(net)
    optimizer.step()
    expected = before - 0.5 * P @ (P.T @ (gradient(net) + 0.1 * before))
    torch.testing.assert_close(flat(net), expected)


@pytest.mark.parametrize("family", ["rademacher", "gaussian", "hash"])
def test_redrawn_bases_go_down_the_gradient_on_average(family):
    """E[P Pᵀ] = (d/D) I: over many bases the steps sum up to the gradient itself, shrunk."""
    net, d, draws = mlp(), WEIGHTS // 2, 300
    optimizer = RandomBases(net, d, lr=1.0, distribution=family)
    g = torch.randn(WEIGHTS, dtype=torch.float64)
    give(net, g)
    before = flat(net)
    for _ in range(draws):
        optimizer.step()
    mean = (before - flat(net)) / draws
    # One draw's error has about the length |g| √(d/D); the mean's is smaller by √draws.
    error = (mean - d / WEIGHTS * g).norm() / g.norm()
    assert error < 2 * (d / WEIGHTS / draws) ** 0.5
    assert error > 0


def test_groups_have_their_own_rates_and_dimensions():
    net = mlp()
    groups = [
        {"params": net[0].parameters(), "lr": 0.1, "dim": 5},
        {"params": net[2].parameters(), "compartments": "tensor", "weight_decay": 0.5},
    ]
    optimizer = RandomBases(groups, 7, lr=0.4)
    dims = [part.compartment.dim for part in optimizer.directions.compartments]
    assert dims == [5, 6, 1]  # 7 by √64 : √4
    loss_of(net).backward()
    P, g, before = dense(optimizer, 0), gradient(net), flat(net)
    decay = torch.cat([torch.zeros(144), torch.full((68,), 0.5)]).double()
    c = P.T @ (g + decay * before)
    rates = torch.tensor([0.1] * 5 + [0.4] * 7, dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(flat(net), before - P @ (rates * c))


# ---- the other estimators ------------------------------------------------------------------------


def closure_of(net):
    return lambda: loss_of(net).double()


@JVP
@pytest.mark.parametrize("compartments", ["global", "layer"])
def test_forward_mode_gives_the_coordinates_of_backpropagation(compartments):
    net, options = mlp(), {"compartments": compartments, "seed": 2}
    back = RandomBases(copy.deepcopy(net), 9, **options)
    other = back.param_groups[0]["params"]
    ours = RandomBases(net, 9, estimator="forward", **options)
    for _ in range(2):
        twin = mlp()
        for p, q in zip(twin.parameters(), other, strict=True):
            p.data = q.data
        value = cross_entropy(twin(X), Y)
        for q, g in zip(other, torch.autograd.grad(value, twin.parameters()), strict=True):
            q.grad = g
        back.step()
        loss = ours.step(lambda: cross_entropy(net(X), Y))
        torch.testing.assert_close(loss, value.detach())
        torch.testing.assert_close(ours.coordinates, back.coordinates)
        assert all(p.grad is None for p in net.parameters())
    torch.testing.assert_close(flat(net), torch.cat([q.detach().reshape(-1) for q in other]))


def test_finite_differences_converge_to_the_derivatives():
    errors = []
    for sigma in (1e-1, 1e-2, 1e-3):
        net = mlp()
        nets = {name: copy.deepcopy(net) for name in ("gradient", "evolution")}
        found = {}
        for name, own in nets.items():
            optimizer = RandomBases(own, 9, estimator=name, sigma=sigma)
            value = cross_entropy(own(X), Y)
            if name == "gradient":
                value.backward()
                optimizer.step()
            else:
                loss = optimizer.step(lambda own=own: cross_entropy(own(X), Y))
                assert abs(loss - value) < sigma
            found[name] = optimizer.coordinates
        errors.append(float((found["evolution"] - found["gradient"]).norm()))
    assert errors[1] < errors[0] / 10  # σ² but for the kinks of ReLU
    assert errors[2] < errors[1] / 10


def test_evolution_leaves_no_trace_of_its_evaluations():
    """Weights come back to the last bit: with rate 0 a step changes nothing."""
    net = mlp(torch.float32)
    before = [p.detach().clone() for p in net.parameters()]
    RandomBases(net, 3, lr=0.0, estimator="evolution", sigma=0.3).step(closure_of(net))
    assert all(map(torch.equal, before, net.parameters()))
    assert all(p.grad is None for p in net.parameters())


@JVP
@pytest.mark.parametrize("estimator", ["forward", "evolution"])
def test_estimators_that_evaluate_need_a_closure(estimator):
    net = mlp()
    optimizer = RandomBases(net, 3, estimator=estimator)
    assert optimizer.needs_closure
    with pytest.raises(SubspanError, match=r"needs step\(closure\)"):
        optimizer.step()
    with pytest.raises(SubspanError, match="must return the loss, a tensor of one value, got None"):
        optimizer.step(lambda: None)


@JVP
@pytest.mark.parametrize("estimator", ["forward", "evolution"])
def test_a_closure_that_calls_backward_is_for_another_estimator(estimator):
    net = mlp()
    before, optimizer = flat(net), RandomBases(net, 3, estimator=estimator)

    def closure():
        loss = loss_of(net)
        loss.backward()
        return loss

    with pytest.raises(SubspanError, match=r"the closure calls backward\(\), and this estimator"):
        optimizer.step(closure)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        optimizer.step(lambda: torch.zeros(2, 2) @ torch.zeros(3, 4))
    assert torch.equal(flat(net), before)
    assert optimizer.steps == 0


@JVP
@pytest.mark.parametrize("loss", [lambda net: torch.ones(()), lambda net: loss_of(net).detach()])
def test_a_loss_that_does_not_depend_on_the_weights_has_no_forward_derivative(loss):
    net = mlp()
    optimizer = RandomBases(net, 3, estimator="forward", weight_decay=0.1)
    with pytest.raises(SubspanError, match="has no derivative along any vector: the closure"):
        optimizer.step(lambda: loss(net))
    assert torch.equal(flat(net), flat(mlp()))


def test_one_evaluation_pair_is_mezo():
    """d = 1 with normals: the published step, with unit columns in place of z."""
    net = mlp()
    optimizer = RandomBases(net, 1, 0.2, distribution="gaussian", estimator="evolution", sigma=1e-4)
    z, before, calls = dense(optimizer, 0)[:, 0], flat(net), []

    def closure():
        calls.append(flat(net))
        return cross_entropy(net(X), Y)

    optimizer.step(closure)
    assert len(calls) == 2
    torch.testing.assert_close(calls[0], before + 1e-4 * z)
    torch.testing.assert_close(calls[1], before - 1e-4 * z)
    torch.testing.assert_close(flat(net), before - 0.2 * optimizer.coordinates * z)


# ---- an ordinary optimizer -----------------------------------------------------------------------


def test_gradients_accumulate_and_are_clipped_as_ever():
    nets = [mlp(), mlp()]
    whole, halves = (RandomBases(net, 10) for net in nets)
    cross_entropy(nets[0](X), Y, reduction="sum").backward()
    for part in (slice(0, 12), slice(12, 20)):
        cross_entropy(nets[1](X[part]), Y[part], reduction="sum").backward()
    for net, optimizer in zip(nets, (whole, halves), strict=True):
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
    torch.testing.assert_close(flat(nets[0]), flat(nets[1]))
    assert whole.coordinates.norm() <= 0.1 * 2


def test_schedulers_and_closures():
    net = mlp()
    optimizer = RandomBases(net, 10, lr=1.0)
    schedule = CosineAnnealingLR(optimizer, 2)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss

    first, second = [], flat(net)
    for _ in range(3):
        before = flat(net)
        first.append(float(optimizer.step(closure).detach()))
        schedule.step()
        second = flat(net)
    assert first[1] < first[0]
    torch.testing.assert_close(second, before)  # the rate came down to zero


def test_grad_scaler_skips_what_overflows():
    net = mlp(torch.float32)
    optimizer, scaler = RandomBases(net, 10), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(net)).backward()
    plain = copy.deepcopy(net)
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        p.grad = q.grad / 2**10
    RandomBases(plain, 10).step()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(flat(net), flat(plain))
    net[0].weight.grad.fill_(float("inf"))
    before = flat(net)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat(net), before)
    assert optimizer.steps == 1
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("options", [{}, {"redraw_every": 4, "momentum": 0.9}])
def test_resume_is_exact(options):
    net = mlp(torch.float32)
    optimizer = RandomBases(net, 10, 0.5, **options)
    run(net, optimizer, 6)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = run(net, optimizer, 6)[-1]
    file.seek(0)
    state = torch.load(file, weights_only=True)  # tensors and plain values only
    other = mlp(torch.float32)
    other.load_state_dict(state["net"])
    resumed = RandomBases(other, 10, 0.1, **options)
    resumed.load_state_dict(state["optimizer"])
    assert resumed.steps == 6
    assert torch.equal(run(other, resumed, 6)[-1], expected)


def test_a_state_of_other_bases_is_refused():
    state = RandomBases(mlp(), 10).state_dict()
    for other in (
        RandomBases(mlp(), 10, seed=1),
        RandomBases(mlp(), 11),
        RandomBases(mlp(), 10, compartments="layer"),
        RandomBases(mlp(), 10, distribution="rademacher"),
        RandomBases(mlp(), 10, redraw_every=3),
    ):
        with pytest.raises(SubspanError, match="this state belongs to other bases"):
            other.load_state_dict(state)


@pytest.mark.parametrize("rows", [12, 6])
@pytest.mark.parametrize("estimator", ["gradient", "forward", "evolution"])
def test_a_tensor_of_another_shape_is_refused_before_anything_moves(estimator, rows):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 3))
    optimizer = RandomBases(net, 9, estimator=estimator)
    net[0].weight.data = torch.randn(rows, 4)  # as resize_token_embeddings() does
    net(torch.arange(rows)).sum().backward()
    before = flat(net)
    says = rf"0\.weight has the shape \[{rows}, 4\] now, and had \[8, 4\]"
    for use in (lambda: optimizer.step(lambda: net(torch.arange(rows)).sum()), optimizer.alignment):
        with pytest.raises(SubspanError, match=says):
            use()
    assert torch.equal(flat(net), before)
    assert optimizer.steps == 0


def test_nothing_of_the_size_of_the_weights_is_held():
    """Beyond parameters and gradients O(d), and blocks of rows while a step is made."""
    net = nn.Sequential(*[nn.Linear(1500, 1500) for _ in range(4)])
    weights = 4 * sum(p.numel() for p in net.parameters())  # bytes
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer = RandomBases(net, 50)
    optimizer.step()
    with Live() as live:
        optimizer.step()
        held = live.now
    assert held < 10_000
    assert live.peak < weights / 2  # 2²⁰ rows at once, of 9 million


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_take_steps_in_float32(dtype):
    net = mlp(dtype)
    give(net, torch.randn(WEIGHTS))
    optimizer, before = RandomBases(net, 10), flat(net)
    P, c = dense(optimizer, 0), None
    c = P.T @ gradient(net)
    optimizer.step()
    assert optimizer.coordinates.dtype == torch.float32
    torch.testing.assert_close(optimizer.coordinates.double(), c, rtol=1e-5, atol=1e-5)
    assert torch.equal(flat(net), (before - P @ c).to(dtype).double()) or (
        (flat(net) - (before - P @ c)).abs().max() <= torch.finfo(dtype).eps * before.abs().max()
    )


def test_memory_in_another_order_and_sparse_gradients():
    nets = [build("cnn", torch.float64), build("cnn", torch.float64)]
    nets[1].conv.to(memory_format=torch.channels_last)
    assert not nets[1].conv.weight.is_contiguous() or nets[1].conv.weight.shape[1] == 1
    permuted = nn.Parameter(torch.randn(6, 5, dtype=torch.float64).T)
    plain = nn.Parameter(permuted.detach().contiguous())
    for p in (permuted, plain):
        p.grad = torch.arange(30, dtype=torch.float64).view(5, 6)
        RandomBases([p], 4).step()
    assert torch.equal(permuted, plain)
    results = []
    for sparse in (False, True):
        table = nn.Embedding(20, 3, sparse=sparse)
        nn.init.ones_(table.weight)
        table(torch.tensor([3, 3, 7])).square().sum().backward()
        RandomBases(table, 5).step()
        results.append(table.weight.detach().clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", ["cnn", "lstm", "encoder", "tied"])
def test_every_kind_of_network(kind):
    net = build(kind)
    optimizer = RandomBases(net, 20, lr=0.5, compartments="layer" if kind != "tied" else "global")
    x, before = batch(kind), flat(net)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = net(x).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert (flat(net) != before).double().mean() > 0.9


def test_frozen_and_unused_parameters():
    net = mlp()
    net[0].requires_grad_(False)
    frozen = flat(net[0])
    optimizer = RandomBases(net, 10)
    assert sum(part.compartment.weights for part in optimizer.directions.compartments) == 68
    unused = nn.Parameter(torch.ones(50, dtype=torch.float64))
    other = RandomBases([*net[2].parameters(), unused], 10)
    loss_of(net).backward()
    optimizer.step()
    other.step()  # without a gradient it counts as zero, and moves with the basis
    assert torch.equal(flat(net[0]), frozen)
    assert not torch.equal(unused, torch.ones_like(unused))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("estimator", ["gradient", "evolution"])
def test_what_is_unfrozen_later_is_refused_and_not_left_out(estimator, named):
    net = mlp()
    net[0].bias.requires_grad_(False)
    optimizer = RandomBases(net if named else net.parameters(), 6, estimator=estimator)

    def closure():
        loss = loss_of(net)
        if not optimizer.needs_closure:
            loss.backward()
        return loss

    net[0].bias.requires_grad_(True)
    before = flat(net)
    name = r"0\.bias" if named else "parameter 1 of group 0"
    with pytest.raises(SubspanError, match=f"{name} was frozen when the optimizer was made and"):
        optimizer.step(closure)
    assert torch.equal(flat(net), before)
    net[0].bias.requires_grad_(False)
    optimizer.step(closure)
    assert not torch.equal(flat(net), before)


@JVP
@pytest.mark.parametrize("estimator", ["gradient", "forward", "evolution"])
def test_frozen_tensors_take_no_part_however_they_are_given(estimator, tmp_path):
    """The module, its parameters, named or not, and groups: one trajectory, one journal."""
    ways = {
        "module": lambda net: net,
        "named": lambda net: net.named_parameters(),
        "group": lambda net: [{"params": net.named_parameters(), "lr": 0.1}],
        "plain": lambda net: net.parameters(),
        "list": lambda net: [*net.parameters(), torch.arange(3)],
    }
    weights, journals = {}, {}
    for way, given in ways.items():
        net = mlp()
        net[0].weight.requires_grad_(False)
        net[2].bias.requires_grad_(False)
        begin = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer = RandomBases(
            given(net),
            6,
            0.1,
            estimator=estimator,
            weight_decay=0.1,
            compartments="tensor",
            journal=tmp_path / way,
        )

        def closure(net=net, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(net)
            if not optimizer.needs_closure:
                loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        for name, p in net.named_parameters():
            assert torch.equal(p, begin[name]) is not p.requires_grad
        assert len(optimizer.state_dict()["param_groups"][0]["params"]) == 2
        weights[way], journals[way] = flat(net), (tmp_path / way).read_bytes()
    assert all(torch.equal(found, weights["module"]) for found in weights.values())
    assert journals["module"] == journals["named"] == journals["group"]
    assert journals["plain"] == journals["list"]
    again = mlp()
    replay(tmp_path / "module", again)
    assert torch.equal(flat(again), weights["module"])


def test_of_a_wrapped_network_only_coordinates_move():
    for given in (
        lambda net: net,
        lambda net: net.parameters(),
        lambda net: net.named_parameters(),
    ):
        net = mlp()
        model = SubspaceModel(net, 12)
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer = RandomBases(given(net), 3)
        loss_of(model).backward()
        optimizer.step()
        moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {"subspan_global"}


def test_weights_that_are_computed_are_refused():
    net, extra = mlp(), nn.Parameter(torch.ones(30))
    SubspaceModel(net, 12)
    message = r"^0.weight is computed from coordinates: give the coordinates"
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            weight = net[0].weight
            part = net[0].parameters()
            for given in ([weight], [("w", weight), ("e", extra)], [{"params": [weight]}], part):
                with pytest.raises(SubspanError, match=message):
                    RandomBases(given, 3)


def test_alignment_is_that_of_dense_matrices():
    net = mlp()
    optimizer = RandomBases(net, 12, compartments="layer", distribution="gaussian", seed=1)
    run(net, optimizer, 2)
    found = optimizer.alignment()
    assert list(found) == ["0", "2", "all"]
    P, g, begin = dense(optimizer, 2), gradient(net), 0
    for name, rows, columns in (("0", 144, 7), ("2", 68, 5), ("all", 212, 12)):
        own, begin = g if name == "all" else g[begin : begin + rows], begin + rows
        if name == "all":
            block = P
        elif name == "0":
            block = P[:144, :columns]
        else:
            block = P[144:, 12 - columns :]
        c = block.T @ own
        v = block @ c
        assert found[name]["cosine"] == pytest.approx(float(own @ v / own.norm() / v.norm()))
        assert found[name]["share"] == pytest.approx(float(c.norm() / own.norm()))
    assert optimizer.steps == 2


# ---- unusual tensors, noise, copies --------------------------------------------------------------


def gaps():
    return torch.arange(40, dtype=torch.float64).sin()[::2]


TENSORS = {
    "gaps": gaps,
    "rows with gaps": lambda: gaps().view(4, 5)[:, ::2],
    "turned": lambda: gaps().view(4, 5).T,
    "scalar": lambda: torch.tensor(2.0, dtype=torch.float64),
    "flipped in memory": lambda: gaps().clone().view(2, 5, 2).permute(2, 0, 1),
}


@JVP
@pytest.mark.parametrize("estimator", ["gradient", "forward", "evolution"])
@pytest.mark.parametrize("kind", TENSORS)
def test_memory_does_not_matter(kind, estimator):
    """A tensor and a contiguous copy take the same steps; what lies between its entries stays."""
    moved = []
    for tensor in (TENSORS[kind](), TENSORS[kind]().contiguous().clone()):
        p = nn.Parameter(tensor)
        other = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = RandomBases(
            [("p", p), ("other", other)],
            2,
            0.1,
            estimator=estimator,
            momentum=0.5,
            weight_decay=0.1,
            redraw_every=2,
        )
        for _ in range(3):
            optimizer.zero_grad()
            if estimator == "gradient":
                (p.pow(3).sum() + other.sum()).backward()
                optimizer.step()
            else:
                optimizer.step(lambda p=p, other=other: p.pow(3).sum() + other.sum())
        moved.append(p.detach())
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-12, atol=1e-12)


def test_between_the_entries_nothing_moves():
    base = torch.ones(20)
    p = nn.Parameter(base[::2])
    p.sum().backward()
    RandomBases([p], 3).step()
    assert torch.equal(base[1::2], torch.ones(10))
    assert not torch.equal(base[::2], torch.ones(10))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(1, 4).expand(3, 4), "entries of p share memory"),
        (torch.ones(6).as_strided((4, 3), (1, 1)), "entries of p share memory"),
        (torch.ones(3, dtype=torch.complex64), "p is torch.complex64 and P c is real"),
        (torch.ones(3).to(torch.float8_e4m3fn), "p is torch.float8_e4m3fn, in which PyTorch adds"),
    ],
)
def test_tensors_that_cannot_be_moved(tensor, message):
    q = nn.Parameter(torch.ones(5))
    with pytest.raises(SubspanError, match=message):
        RandomBases([("q", q), ("p", tensor.requires_grad_())], 2)


@JVP
@pytest.mark.parametrize("estimator", ["gradient", "forward", "evolution"])
def test_padding_rows_stay(estimator, tmp_path):
    """Unless another layer has the same table, whose gradients reach them."""

    def net(tied=False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(9, 4, padding_idx=2), nn.Linear(4, 9, bias=False)).double()
        with torch.no_grad():
            net[0].weight[2] = 1.0
        if tied:
            net[1].weight = net[0].weight
        return net

    ids, path = torch.tensor([1, 2, 2, 5]), tmp_path / "journal"
    for tied in (False, True):
        ours = net(tied)
        more = {} if tied else {"journal": path}
        optimizer = RandomBases(ours, 6, 0.1, estimator=estimator, weight_decay=0.1, **more)
        before = ours[0].weight.detach().clone()

        def closure(ours=ours, optimizer=optimizer):
            optimizer.zero_grad()
            loss = ours(ids).square().sum()
            if not optimizer.needs_closure:
                loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        assert torch.equal(ours[0].weight[2], before[2]) is not tied
        others = [0, 1, *range(3, 9)]
        assert (ours[0].weight[others] != before[others]).all()
        if not tied:
            again = net()
            replay(path, again)
            assert torch.equal(flat(again), flat(ours))


def test_what_others_write_into_the_gradient_of_a_padding_row_is_left_out():
    table = nn.Embedding(9, 4, padding_idx=2).double()
    table.weight.grad = torch.ones(9, 4, dtype=torch.float64)
    optimizer = RandomBases(table, 6, 0.1)
    g = table.weight.grad.clone()
    g[2] = 0
    P = dense(optimizer, 0)
    optimizer.step()
    torch.testing.assert_close(optimizer.coordinates, P.T @ g.reshape(-1))
    assert (table.weight.grad == 1).all()


def dropping():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4)).double()


@JVP
@pytest.mark.parametrize("estimator", ["forward", "evolution"])
def test_evaluations_that_belong_together_draw_the_same_numbers(estimator):
    """Forward mode gives backpropagation's coordinates for its mask, differences nearly so."""
    found, losses = [], []
    for how in ("gradient", estimator):
        net = dropping()
        # Each pair of differences has a mask of its own: of one vector there is one pair.
        optimizer = RandomBases(net, 6 if estimator == "forward" else 1, estimator=how, sigma=1e-4)
        torch.manual_seed(5)

        def closure(net=net, how=how):
            loss = cross_entropy(net(X), Y)
            if how == "gradient":
                loss.backward()
            return loss

        losses.append(float(optimizer.step(closure).detach()))
        found.append(optimizer.coordinates)
        after = torch.rand(3)
        torch.manual_seed(5)
        closure()
        assert torch.equal(torch.rand(3), after)  # as after one evaluation
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_pairs_of_evaluations_draw_anew():
    net, masks = dropping(), []
    net[2].register_forward_hook(lambda _, x, y: masks.append((y != 0) | (x[0] == 0)))
    RandomBases(net, 3, estimator="evolution", sigma=1e-9).step(lambda: cross_entropy(net(X), Y))
    assert len(masks) == 6
    for first, second in zip(masks[::2], masks[1::2], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(masks[0], masks[2])


def test_what_cannot_be_copied(tmp_path):
    optimizer = RandomBases(mlp(), 5, journal=tmp_path / "journal")
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(SubspanError, match=r"with a journal cannot be copied.*load_state_dict"):
            copied(optimizer)


# ---- steps that fail -----------------------------------------------------------------------------


def test_a_gradient_that_is_no_number_makes_a_step_void():
    net = mlp()
    optimizer = RandomBases(net, 10)
    run(net, optimizer, 2)
    before = flat(net)
    net[0].weight.grad[0, 0] = float("nan")
    optimizer.step()
    assert torch.equal(flat(net), before)
    assert (optimizer.steps, optimizer.skipped) == (3, 1)
    strict = RandomBases(net, 10, nonfinite="error")
    with pytest.raises(
        SubspanError,
        match="a coordinate of step 0 is not finite: lower the learning rate, or give nonf",
    ):
        strict.step()
    assert torch.equal(flat(net), before)


def test_no_gradient_at_all_is_an_error():
    optimizer = RandomBases(mlp(), 10)
    with pytest.raises(SubspanError, match=r"no parameter has a gradient: call backward\(\)"):
        optimizer.step()
    assert optimizer.steps == 0


def test_parameters_that_are_exchanged_are_refused_before_anything_moves():
    net, other = mlp(), mlp()
    optimizer = RandomBases(net, 10)
    run(net, optimizer, 1)
    before = flat(net)
    optimizer.param_groups[0]["params"] = list(other.parameters())
    loss_of(other).backward()
    with pytest.raises(SubspanError, match="other parameters than bases were drawn for"):
        optimizer.step()
    assert torch.equal(flat(net), before)
    assert torch.equal(flat(other), flat(mlp()))


@pytest.mark.parametrize(
    "leave_out", [lambda groups: groups.pop(), lambda groups: groups[1]["params"].pop()]
)
def test_parameters_that_are_taken_out_are_refused_and_not_moved(leave_out):
    net = mlp()
    optimizer = RandomBases([{"params": layer.parameters()} for layer in (net[0], net[2])], 10)
    run(net, optimizer, 1)
    before = flat(net)
    leave_out(optimizer.param_groups)
    with pytest.raises(SubspanError, match="other parameters than bases were drawn for"):
        run(net, optimizer, 1)
    assert torch.equal(flat(net), before)


def test_settings_of_a_group_that_no_step_reads_are_refused():
    net, other = mlp(), mlp()
    optimizer = RandomBases(net, [5, 5], compartments="layer")
    twin = RandomBases(other, (5, 5), compartments="layer")
    twin.load_state_dict(optimizer.state_dict())
    run(other, twin, 1)
    before = flat(net)
    optimizer.param_groups[0]["dim"][0] = 50
    with pytest.raises(SubspanError, match="another value would be left unread"):
        run(net, optimizer, 1)
    assert torch.equal(flat(net), before)


def test_a_momentum_that_is_set_later_needs_a_basis_that_stays():
    net = mlp()
    optimizer, before = RandomBases(net, 10), flat(net)
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(SubspanError, match="momentum needs a basis that stays"):
        run(net, optimizer, 1)
    assert torch.equal(flat(net), before)


def test_parameters_cannot_come_later():
    optimizer = RandomBases(mlp(), 10)
    with pytest.raises(SubspanError, match="parameters cannot be added later"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(20))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 213}, "has 212 weights|dim=213 must be"),
        ({"dim": None}, "dim must be a positive integer"),
        ({"dim": 0}, "dim must be a positive integer"),
        ({"dim": [5, 200], "compartments": "layer"}, "compartment '2' has 68 weights"),
        ({"distribution": "rademaker"}, "unknown distribution 'rademaker'.*rademacher"),
        ({"estimator": "evolutoin"}, "unknown estimator 'evolutoin': did you mean evolution"),
        ({"workers": "share"}, "unknown workers 'share'.*shared"),
        ({"workers": "shared"}, "workers='shared' needs a process group: start with torchrun"),
        ({"nonfinite": "ignore"}, "unknown nonfinite"),
        ({"redraw_every": 0}, "redraw_every must be a positive integer or None, got 0"),
        ({"momentum": 0.9}, "momentum needs a basis that stays"),
        ({"momentum": 1.0, "redraw_every": 2}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"lr": -1.0}, "lr must be a number >= 0, got -1.0"),
        ({"lr": None}, "lr must be a number >= 0, got None"),
        ({"weight_decay": float("inf")}, "weight_decay must be a number >= 0"),
        ({"sigma": 0.0}, "sigma must be a positive number"),
        ({"check_every": -1}, "check_every must be an integer >= 0"),
        ({"seed": -1}, "seed"),
        ({"compartments": "layers"}, "compartments must be 'global'"),
        ({"s": 3}, "has no options, got 's'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(SubspanError, match=message):
        RandomBases(mlp(), **{"dim": 10} | options)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"redraw_every": None}, "redraw_every is one for all groups: give it to RandomBases"),
        ({"seed": 3}, "seed is one for all groups: give it to RandomBases itself"),
        ({"maximize": True}, "RandomBases has no maximize: leave it out"),
        ({"momentum": 0.9}, "momentum needs a basis that stays"),
        ({"lr": -1.0}, "lr must be a number >= 0, got -1.0"),
    ],
)
def test_bad_groups(group, message):
    with pytest.raises(SubspanError, match=message):
        RandomBases([{"params": mlp().parameters(), "dim": 10} | group])


def test_parameters_that_are_given_twice():
    net = mlp()
    with pytest.raises(SubspanError, match=r"^some parameters appear in more than one"):
        RandomBases([{"params": net.parameters()}, {"params": net.parameters()}], 10)


def test_nothing_to_train():
    frozen = mlp().requires_grad_(False)
    for nothing in (frozen, []):
        with pytest.raises(SubspanError, match=r"nothing to train|an empty parameter list"):
            RandomBases(nothing, 10)
    trained, still = nn.Parameter(torch.ones(30)), torch.ones(30, dtype=torch.int64)
    for frozen in (*([still], []), list(mlp().requires_grad_(False).named_parameters())):
        groups = [{"params": frozen}]
        if not frozen or isinstance(frozen[0], torch.Tensor):
            groups.insert(0, {"params": [trained]})
        message = f"nothing to train in group {len(groups) - 1} .* no tensor in it requires a grad"
        with pytest.raises(SubspanError, match=message):
            RandomBases(groups, 10)
