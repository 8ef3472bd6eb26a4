"""DLRT: laws of whole trainings, memory, state, and refusals."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization
from torch.optim import SGD, Adam

from subspan import SubspaceModel, SubspanError
from subspan.layers import LowRank, factorize, merge
from subspan.optim import DLRT
from tests.nets import batch, build

X = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(20) % 4
INTEGRATORS = ["parallel", "kls", "kls-adaptive", "vanilla"]
ROBUST = INTEGRATORS[:3]


def mlp(rank=3, dtype=torch.float64, **options):
    net = build("mlp", dtype)
    return factorize(net, **({"rank": rank} | options))


def loss_of(net):
    out = net(X.to(next(net.parameters()).dtype))
    return cross_entropy(out if out.dtype == torch.float64 else out.float(), Y)


def run(net, optimizer, steps=5, calls=None):
    """The losses of some steps."""

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        if calls is not None:
            calls.append(float(loss.detach()))
        return loss

    return [float(optimizer.step(closure).detach()) for _ in range(steps)]


def dense(net):
    """All weights of a network, factored layers expanded."""
    plain = copy.deepcopy(net)
    merge(plain)
    return torch.cat([p.detach().reshape(-1) for p in plain.parameters()])


def options(integrator, **more):
    """Settings with which an integrator runs, at a rank that nothing changes."""
    return (
        {"integrator": integrator} | ({"tolerance": 0.0} if "adaptive" in integrator else {}) | more
    )


# ---- laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrator", ROBUST)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("widths", [(8, 16, 4), (8, 8, 8)])
def test_full_rank_is_sgd_on_the_dense_network(integrator, momentum, decay, widths):
    if integrator == "kls" and widths != (8, 8, 8):
        pytest.skip("the S-step sees the weight projected to U₁, which is the weight if square")
    if integrator != "parallel" and momentum:
        pytest.skip("the S-step of kls has a momentum of its own")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(*widths[:2]), nn.ReLU(), nn.Linear(*widths[1:])).double()
    net = factorize(copy.deepcopy(plain), energy=1.0)
    ours = DLRT(net, 0.3, momentum=momentum, weight_decay=decay, **options(integrator))
    theirs = SGD(plain.parameters(), 0.3, momentum=momentum)
    for _ in range(5):
        with torch.no_grad():
            scale = 1 - 0.3 * decay
            before = [p.clone() for p in plain.parameters()]
        theirs.zero_grad()
        loss_of(plain).backward()
        theirs.step()
        with torch.no_grad():  # decoupled
            for p, old in zip(plain.parameters(), before, strict=True):
                p.add_(old, alpha=scale - 1)
        run(net, ours, 1)
        expected = torch.cat([p.detach().reshape(-1) for p in plain.parameters()])
        torch.testing.assert_close(dense(net), expected)


@pytest.mark.parametrize("integrator", ROBUST)
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_bases_are_orthonormal_after_every_step(integrator, base):
    net = mlp(dtype=torch.float32)
    settings = options(integrator, **({"tolerance": 0.1} if integrator != "kls" else {}))
    optimizer = DLRT(net, 0.05, base=base, **settings)
    for _ in range(10):
        run(net, optimizer, 1)
        for layer in (m for m in net if isinstance(m, LowRank)):
            for U in (layer.U.detach(), layer.V.detach()):
                torch.testing.assert_close(U.T @ U, torch.eye(layer.rank), atol=1e-5, rtol=0)


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("tolerance", [None, 0.02])
def test_the_loss_falls_with_small_steps(integrator, tolerance):
    settings = options(integrator)
    if tolerance is not None and integrator in ("parallel", "kls-adaptive"):
        settings["tolerance"] = tolerance
    net = mlp(4, init="random")
    losses = run(net, DLRT(net, 0.05, **settings), 30)
    for before, after in pairwise(losses):
        assert after < before + (0.01 if tolerance else 0)
    assert losses[-1] < losses[0] - 0.05


def test_the_adaptive_integrators_agree_to_first_order():
    found = {}
    for h in (1e-3, 5e-4):
        for integrator in ("parallel", "kls-adaptive"):
            net = mlp(3)
            run(net, DLRT(net, h, max_rank=3, **options(integrator, tolerance=0.0)), 1)
            found[integrator, h] = dense(net)
    errors = [float((found["parallel", h] - found["kls-adaptive", h]).norm()) for h in (1e-3, 5e-4)]
    assert errors[0] / errors[1] > 3.5


def test_adam_on_all_of_a_vector_is_adam():
    """A layer with one output has a basis U = ±1, and its K-gradient is the dense one turned."""
    plain = nn.Sequential(nn.Linear(8, 4)).double()
    net = copy.deepcopy(plain)
    net.append(nn.Identity())
    factorize(net, rank=4, exclude=None)
    bias = Adam([plain[0].bias], 0.01)
    ours = DLRT(net, 0.01, base="adam")
    for _ in range(3):
        loss_of(net).backward()
        plain[0].bias.grad = net[0].bias.grad.clone()
        bias.step()
        ours.step()
        ours.zero_grad()
        torch.testing.assert_close(net[0].bias, plain[0].bias)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_how_often_the_gradient_is_evaluated(integrator):
    net, calls = mlp(), []
    run(net, DLRT(net, 0.01, **options(integrator)), 4, calls)
    assert len(calls) == (8 if "kls" in integrator else 4)


@pytest.mark.parametrize("integrator", ["parallel", "vanilla"])
def test_no_closure_is_needed(integrator):
    nets = [mlp(), mlp()]
    run(nets[0], DLRT(nets[0], 0.1, integrator=integrator), 3)
    optimizer = DLRT(nets[1], 0.1, integrator=integrator)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(nets[1]).backward()
        assert optimizer.step() is None
    assert torch.equal(dense(nets[0]), dense(nets[1]))


# ---- ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrator", ["parallel", "kls-adaptive"])
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_ranks_follow_the_tolerance_and_memory_follows_the_ranks(integrator, base):
    net = mlp(4)
    optimizer = DLRT(
        net, 0.05, tolerance=0.5, integrator=integrator, base=base, momentum=0.9 * (base == "sgd")
    )
    run(net, optimizer, 4)
    assert max(optimizer.ranks.values()) < 4
    for name, layer in ((n, m) for n, m in net.named_modules() if isinstance(m, LowRank)):
        r, (n, m) = layer.rank, layer.shape
        assert optimizer.ranks[name] == r
        sizes = [p.untyped_storage().nbytes() // 8 for p in (layer.U, layer.S, layer.V)]
        assert sizes == [n * r, r * r, m * r]
        for p in (layer.U, layer.S, layer.V):
            memory = [t for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
            assert all(t.shape == p.shape for t in memory)


def test_ranks_grow_where_the_loss_asks_for_it():
    net = mlp(1)
    optimizer = DLRT(net, 0.5, tolerance=1e-3)
    run(net, optimizer, 3)
    assert max(optimizer.ranks.values()) > 1


def test_bounds_of_ranks():
    net = mlp(2)
    optimizer = DLRT(net, 0.5, tolerance=0.0, max_rank=3)
    run(net, optimizer, 3)
    assert set(optimizer.ranks.values()) == {3}
    net = mlp(4)
    optimizer = DLRT(net, 0.5, tolerance=0.99, min_rank=2)
    run(net, optimizer, 3)
    assert set(optimizer.ranks.values()) == {2}


def test_ranks_change_every_so_often_and_until_they_freeze():
    net = mlp(4)
    optimizer = DLRT(net, 0.05, tolerance=0.3, rank_every=2, freeze_after=4)
    may = []
    seen = []
    for _ in range(7):
        may.append(optimizer.ranks_may_change)
        run(net, optimizer, 1)
        seen.append(tuple(optimizer.ranks.values()))
    assert may == [True, False, True, False, False, False, False]
    assert seen[0] == seen[1]
    assert len(set(seen[2:])) == 1


@pytest.mark.parametrize("rank_every", [1, 3])
def test_a_target_is_reached_when_ranks_freeze(rank_every):
    net = mlp(4)
    optimizer = DLRT(net, 0.05, target_ratio=0.55, freeze_after=8, rank_every=rank_every)
    numbers = []
    for _ in range(8):
        run(net, optimizer, 1)
        layers = [m for m in net if isinstance(m, LowRank)]
        numbers.append(sum(layer.rank * sum(layer.shape) for layer in layers))
    assert numbers[-1] <= 0.45 * (8 * 16 + 16 * 4)
    assert numbers[0] > numbers[-1]


def test_a_target_below_the_least_ranks():
    net = mlp(4)
    optimizer = DLRT(net, 0.05, target_ratio=0.99, freeze_after=1)
    loss_of(net).backward()
    with pytest.raises(SubspanError, match="leaves 2 numbers, but min_rank 1 takes 44"):
        optimizer.step()


# ---- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrator", ROBUST)
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_training_goes_on_bit_for_bit(integrator, base):
    settings = options(integrator, base=base, momentum=0.9 * (base == "sgd"))
    if integrator != "kls":
        settings["tolerance"] = 0.2
    whole = mlp(4, torch.float32)
    run(whole, DLRT(whole, 0.05, **settings), 6)
    first = mlp(4, torch.float32)
    optimizer = DLRT(first, 0.05, **settings)
    run(first, optimizer, 3)
    file = io.BytesIO()
    torch.save({"net": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second = mlp(2, torch.float32)
    second.load_state_dict(state["net"])
    optimizer = DLRT(second, 0.1, **settings)
    optimizer.load_state_dict(state["optimizer"])
    run(second, optimizer, 3)
    assert optimizer.steps == 6
    assert torch.equal(dense(second), dense(whole))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"base": "adam"}])
def test_moments_of_16_bits_are_those_of_float32(dtype, options):
    net = mlp(3, dtype)
    optimizer = DLRT(net, 0.01, **options)
    run(net, optimizer, 3)
    other = copy.deepcopy(net)
    resumed = DLRT(other, 0.01, **options)
    resumed.load_state_dict(optimizer.state_dict())
    for each in (optimizer, resumed):
        of = [v for s in each.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        assert {v.dtype for v in of} == {torch.float32}
    assert run(net, optimizer, 3) == run(other, resumed, 3)
    assert torch.equal(dense(other), dense(net))


def test_a_state_of_other_ranks():
    net = mlp(4)
    optimizer = DLRT(net, 0.05, momentum=0.9)
    run(net, optimizer, 1)
    other = DLRT(mlp(2), 0.05, momentum=0.9)
    with pytest.raises(SubspanError, match="load the network's state first"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("other", [DLRT, Adam])
def test_a_state_of_another_optimizer(other):
    net = mlp()
    groups = [[p for p in net.parameters() if (p.dim() > 1) is factor] for factor in (True, False)]
    theirs = DLRT(net, base="adam") if other is DLRT else Adam([{"params": g} for g in groups])
    run(net, theirs, 1)
    optimizer = DLRT(net, 0.05)
    with pytest.raises(SubspanError, match=r"another optimizer, for it has no (momentum|begun_w)"):
        optimizer.load_state_dict(theirs.state_dict())
    run(net, optimizer, 1)


@pytest.mark.parametrize("named", [False, True])
def test_parameters_that_are_added_later(named):
    net, head = mlp(), nn.Linear(4, 4).double()
    optimizer, plain = DLRT(net, 0.1), SGD(copy.deepcopy(head).parameters(), 0.3)
    optimizer.add_param_group(
        {"params": head.named_parameters() if named else head.parameters(), "lr": 0.3}
    )
    loss_of(nn.Sequential(net, head)).backward()
    for p, q in zip(head.parameters(), plain.param_groups[0]["params"], strict=True):
        q.grad = p.grad.clone()
    optimizer.step()
    plain.step()
    for p, q in zip(head.parameters(), plain.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({}, "a factored layer cannot be added later"),
        ({"params": [nn.Parameter(torch.ones(2))], "lr": -1.0}, "lr must be a number >= 0"),
        ({"params": [nn.Parameter(torch.ones(2))], "tolerance": 0.1}, "tolerance is one for all"),
    ],
)
def test_groups_that_cannot_be_added(group, message):
    net = mlp()
    net[2].requires_grad_(False)
    optimizer = DLRT(net)
    net[2].requires_grad_(True)
    with pytest.raises(SubspanError, match=message):
        optimizer.add_param_group({"params": net[2].parameters()} | group)
    assert len(optimizer.param_groups) == 2


def test_schedules_clipping_accumulation_and_scaling():
    net = mlp()
    optimizer = DLRT(net, 0.1, tolerance=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(4):
        optimizer.zero_grad()
        for _ in range(2):
            scaler.scale(loss_of(net) / 2).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1e9)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    other = mlp()
    plain = DLRT(other, 0.1, tolerance=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(plain, 4)
    for _ in range(4):
        run(other, plain, 1)
        schedule.step()
    torch.testing.assert_close(dense(net), dense(other))


@pytest.mark.parametrize("kind", ["cnn", "encoder"])
def test_every_kind_of_network(kind):
    torch.manual_seed(0)
    net = factorize(build(kind), ratio=0.8)
    optimizer = DLRT(net, 0.05, tolerance=0.1)
    x, losses = batch(kind), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = cross_entropy(net(x), torch.arange(len(x)) % 4)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_half_precision_factors():
    net = mlp(3, torch.bfloat16)
    run(net, DLRT(net, 0.1, tolerance=0.05), 3)
    for layer in (m for m in net if isinstance(m, LowRank)):
        assert layer.U.dtype == torch.bfloat16
        gram = layer.U.detach().float().T @ layer.U.detach().float()
        torch.testing.assert_close(gram, torch.eye(layer.rank), atol=0.02, rtol=0)


# ---- gradients are gradients, and what others do to them -----------------------------------------


def penalised(net):
    """A loss with a second derivative in it."""
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    return loss_of(net) + slope.square().mean()


@pytest.mark.parametrize("loss", [loss_of, penalised])
def test_gradients_are_those_of_the_dense_network(loss):
    net = mlp(4)
    plain = merge(copy.deepcopy(net))
    optimizer = DLRT(net, 0.1)
    for network in (net, plain):
        loss(network).backward()
    for ours, theirs in ((net[0], plain[0]), (net[2], plain[2])):
        G, (U, S, V) = theirs.weight.grad, (p.detach() for p in (ours.U, ours.S, ours.V))
        torch.testing.assert_close(ours.U.grad, G @ V @ S.T)
        torch.testing.assert_close(ours.V.grad, G.T @ U @ S)
        torch.testing.assert_close(ours.tangents.of_k, G @ V)
        torch.testing.assert_close(ours.tangents.of_l, G.T @ U)
    optimizer.step()
    assert not torch.equal(dense(net), dense(mlp(4)))


def test_another_optimizer_goes_on():
    """DLRT, then Adam on the factors: the trajectory is that of layers that DLRT never saw."""
    net = mlp(4)
    optimizer = DLRT(net, 0.1)
    run(net, optimizer, 2)
    twin = pickle.loads(pickle.dumps(net))
    for network in (net, twin):  # the first with DLRT alive
        adam = Adam(network.parameters(), 0.01)
        for _ in range(3):
            adam.zero_grad()
            loss_of(network).backward()
            adam.step()
    torch.testing.assert_close(dense(net), dense(twin), rtol=1e-9, atol=1e-9)
    del optimizer
    gc.collect()
    assert net[0].tangents is None


def zeroed(net):
    net[0].S.grad.zero_()


CHANGES = {
    "clipped by value": lambda net: nn.utils.clip_grad_value_(net.parameters(), 1e-3),
    "one set to zero": zeroed,
    "one scaled": lambda net: net[0].V.grad.mul_(0.999),
    "decayed by hand": lambda net: [p.grad.add_(p, alpha=1e-4) for p in net.parameters()],
    "one cleared": lambda net: setattr(net[0].U, "grad", None),
    "noise": lambda net: net[0].U.grad.add_(1e-3 * torch.randn(16, 3, dtype=torch.float64)),
    "computed once more": lambda net: torch.autograd.backward(loss_of(net), inputs=[net[0].S]),
    "a penalty on factors": lambda net: sum(p.abs().sum() for p in net.parameters()).backward(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_changed_gradients_are_refused(change, dtype):
    torch.manual_seed(0)
    net = mlp(3, dtype)
    optimizer, before = DLRT(net, 0.1, momentum=0.9), dense(net)
    loss_of(net).backward()
    with torch.set_grad_enabled("penalty" in change or "once more" in change):
        CHANGES[change](net)
    with pytest.raises(SubspanError, match="gradients of layer '0' are not what the last backward"):
        optimizer.step()
    assert torch.equal(dense(net), before)
    run(net, optimizer, 1)  # clears them
    assert not torch.equal(dense(net), before)


@pytest.mark.parametrize("factor", [0.3, -2.0, 1e-5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scaled_gradients_scale_the_step(factor, dtype):
    """Each layer by a number of its own."""
    (net, twin), h = (mlp(3, dtype), mlp(3, dtype)), 0.5
    optimizer, other = DLRT(net, h), DLRT(twin, h)
    loss_of(net).backward()
    for p in net[0].parameters():
        p.grad.mul_(factor)
    optimizer.step()
    x = X.to(dtype)
    hidden = twin[0](x)
    hidden = factor * hidden + ((1 - factor) * hidden).detach()  # the same values
    out = twin[2](twin[1](hidden))
    cross_entropy(out.float() if dtype == torch.bfloat16 else out, Y).backward()
    other.step()
    rough = {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 0.05)
    torch.testing.assert_close(dense(net), dense(twin), rtol=rough, atol=rough)


def test_gradients_of_the_last_step_are_not_taken_twice():
    net = mlp()
    optimizer = DLRT(net, 0.1)
    loss_of(net).backward()
    optimizer.step()
    with pytest.raises(SubspanError, match="clear all of them before backward"):
        optimizer.step()
    loss_of(net).backward()  # on top of the old ones
    with pytest.raises(SubspanError, match="clear all of them before backward"):
        optimizer.step()
    for set_to_none in (True, False):
        net.zero_grad(set_to_none)
        loss_of(net).backward()
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"tolerance": 0.3}, {"integrator": "vanilla"}])
def test_a_step_between_forward_and_backward_is_noticed(options):
    """A GAN's loss through a discriminator that has made its step since would be another one's."""
    net = mlp()
    optimizer = DLRT(net, 0.1, **options)
    later = loss_of(net)
    loss_of(net).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()


@pytest.mark.parametrize(
    "clear", [lambda net, o: o.zero_grad(False), lambda net, o: net.zero_grad()]
)
def test_gradients_without_a_step_are_cleared(clear):
    net, twin = mlp(), mlp()
    optimizer = DLRT(net, 0.1)
    (3 * loss_of(net)).backward()
    clear(net, optimizer)
    loss_of(net).backward()
    optimizer.step()
    run(twin, DLRT(twin, 0.1), 1)
    assert torch.equal(dense(net), dense(twin))


def test_one_trains_a_layer_at_a_time():
    net = mlp()
    first, second = DLRT(net, 0.1), DLRT(net, 0.1)
    loss_of(net).backward()
    with pytest.raises(SubspanError, match="another DLRT has been made for layer '0' since"):
        first.step()
    second.step()


class Experts(nn.Module):
    """Two layers of which a batch uses one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)]).double()

    def forward(self, x, expert):
        return self.experts[expert](x)


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_a_layer_that_a_batch_does_not_use(integrator, base):
    """It stays, and its memory, too: what it does later is what it would have done at once."""
    settings = options(integrator, base=base, momentum=0.9 * (base == "sgd"))
    trained = []
    for order in ([0, 1, 0, 1], [0, 0, 1, 1]):
        net = factorize(Experts(), rank=2)
        optimizer = DLRT(net, 0.1, **settings)
        for number, expert in enumerate(order):
            optimizer.param_groups[0]["steps"] = 0 if integrator == "parallel" else number

            def closure(net=net, optimizer=optimizer, expert=expert):
                optimizer.zero_grad()
                loss = cross_entropy(net(X, expert), Y)
                loss.backward()
                return loss

            before = net.experts[1 - expert].weight.detach().clone()
            optimizer.step(closure)
            assert torch.equal(net.experts[1 - expert].weight, before)
        trained.append(dense(net))
    torch.testing.assert_close(*trained)


def test_a_target_counts_layers_that_a_batch_does_not_use():
    net = factorize(Experts(), rank=4)
    optimizer = DLRT(net, 0.1, target_ratio=0.5, freeze_after=4)
    for _ in range(4):
        optimizer.zero_grad()
        cross_entropy(net(X, 0), Y).backward()
        optimizer.step()
    assert sum(r * 12 for r in optimizer.ranks.values()) <= 0.5 * 64


def test_the_second_evaluation_uses_what_the_first_one_did():
    net, calls = factorize(Experts(), rank=2), iter([0, 1])
    optimizer, before = DLRT(net, 0.1, integrator="kls"), dense(net)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(net(X, next(calls)), Y)
        loss.backward()
        return loss

    with pytest.raises(SubspanError, match=r"does not use layer 'experts\.0', which the first one"):
        optimizer.step(closure)
    assert torch.equal(dense(net), before)


@pytest.mark.parametrize("integrator", ["kls", "kls-adaptive"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_closure_need_not_clear_the_gradients(integrator, momentum):
    net, other = mlp(), mlp()
    settings = options(integrator, momentum=momentum)
    optimizer, plain = DLRT(net, 0.1, **settings), DLRT(other, 0.1, **settings)

    def closure():
        loss = loss_of(net)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.zero_grad()
        optimizer.step(closure)
    run(other, plain, 3)
    assert torch.equal(dense(net), dense(other))


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"base": "adam"}])
def test_moments_of_another_shape_are_refused_before_anything_moves(options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(8, 8), factorize(nn.Linear(8, 6), rank=2))
    optimizer = DLRT(net, 0.1, **options)
    for rows in (8, 12):
        net[0].weight.data = torch.randn(rows, 8)  # as resize_token_embeddings() does
        optimizer.zero_grad()
        net(torch.arange(rows)).square().sum().backward()
        before = [p.detach().clone() for p in net.parameters()]
        if rows == 8:
            optimizer.step()
    with pytest.raises(SubspanError, match=r"the shape \[12, 8\] now, and its moments"):
        optimizer.step()
    for p, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(p.detach(), old)


def test_partly_frozen_layers_are_refused_before_anything_changes():
    net = mlp()
    optimizer, before = DLRT(net, 0.1), dense(net)
    loss_of(net).backward()
    net[2].U.requires_grad_(False)
    with pytest.raises(SubspanError, match="some factors of layer '2' are frozen"):
        optimizer.step()
    assert torch.equal(dense(net), before)


def test_images_without_a_batch():
    net = factorize(nn.Sequential(nn.Conv2d(3, 8, 3)).double(), rank=4)
    plain = merge(copy.deepcopy(net))
    optimizer, x = DLRT(net, 0.1), torch.randn(3, 8, 8, dtype=torch.float64)
    for network in (net, plain):
        network(x).square().sum().backward()
    torch.testing.assert_close(net[0].tangents.of_l, plain[0].weight.grad.flatten(1).T @ net[0].U)
    optimizer.step()


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>")  # of Dynamo
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_networks_train_alike(backend):
    net, twin = mlp(4), mlp(4)
    torch.compiler.reset()
    compiled = torch.compile(net, backend=backend)
    cross_entropy(compiled(X), Y)  # before anything watches it
    ours, theirs = (DLRT(network, 0.1, tolerance=0.2) for network in (net, twin))
    for _ in range(4):
        ours.zero_grad()
        cross_entropy(compiled(X), Y).backward()
        ours.step()
    run(twin, theirs, 4)
    assert ours.ranks == theirs.ranks
    torch.testing.assert_close(dense(net), dense(twin))


def test_autocast_agrees_with_its_own_gradients():
    net = mlp(3, torch.float32)
    optimizer = DLRT(net, 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(net(X.float()).float(), Y)
        loss.backward()
        optimizer.step()


def test_sparse_gradients_of_what_is_not_factored():
    trained = []
    for sparse in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(10, 8, sparse=sparse), nn.Linear(8, 4))
        factorize(net, rank=2)
        optimizer = DLRT(net, 0.1, base="adam")
        for _ in range(2):
            optimizer.zero_grad()
            cross_entropy(net(torch.arange(5)), torch.arange(5) % 4).backward()
            optimizer.step()
        trained.append(dense(net))
    torch.testing.assert_close(*trained)


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_complex_parameters_beside_the_factors(base):
    """A transform of Fourier layers, say."""
    net = mlp()
    net.register_parameter("filters", nn.Parameter(torch.ones(4, dtype=torch.complex128)))
    twin = nn.Parameter(net.filters.detach().clone())
    ours = DLRT(net, 0.1, base=base)
    theirs = {"sgd": SGD, "adam": Adam}[base]([twin], 0.1)
    for step in range(3):
        for p, optimizer in ((net.filters, ours), (twin, theirs)):
            optimizer.zero_grad()
            (p * torch.exp(1j * torch.arange(4.0)) - 2j * step).abs().square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(net.filters, twin)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": 1.0}, r"tolerance must be in \[0, 1\), got 1.0"),
        ({"base": "adam", "betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got"),
        ({"base": "adam", "betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0.9"),
        ({"base": "adam", "eps": -1e-8}, "eps must be a number >= 0, got -1e-08"),
        ({"tolerance": -0.1}, r"tolerance must be in \[0, 1\), got -0.1"),
        ({"tolerance": float("nan")}, r"tolerance must be in \[0, 1\), got nan"),
        ({"tolerance": 0.1, "target_ratio": 0.5}, "give a tolerance or a target_ratio, not both"),
        ({"target_ratio": 1.0}, r"target_ratio must be in \(0, 1\), got 1.0"),
        ({"target_ratio": 0.5}, "target_ratio needs freeze_after"),
        ({"integrator": "klsadaptive"}, "unknown integrator 'klsadaptive': did you mean kls-adapt"),
        ({"integrator": "kls-adaptive"}, "'kls-adaptive' needs a tolerance or a target_ratio"),
        ({"integrator": "kls", "tolerance": 0.1}, "integrator 'kls' keeps ranks as they are"),
        ({"base": "adm"}, "unknown base 'adm': did you mean adam"),
        ({"min_rank": 0}, "min_rank must be an integer >= 1, got 0"),
        ({"min_rank": 5}, "layer '2' has no rank 5, at most 4"),
        ({"max_rank": 1, "min_rank": 2}, "max_rank must be at least min_rank 2, got 1"),
        ({"max_rank": 2.5}, "max_rank must be an integer >= 1, got 2.5"),
        ({"rank_every": True}, "rank_every must be an integer >= 1, got True"),
        ({"rank_every": 0}, "rank_every must be an integer >= 1, got 0"),
        ({"freeze_after": 0}, "freeze_after must be an integer >= 1, got 0"),
        ({"freeze_after": 3, "adapt_from": 3}, "freeze_after 3 must be later than adapt_from 3"),
        ({"adapt_from": -1}, "adapt_from must be an integer >= 0, got -1"),
        ({"tolerance_warmup": 0.5}, "tolerance_warmup must be an integer >= 0, got 0.5"),
        ({"lr": -1.0}, "lr must be a number >= 0, got -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be a number >= 0, got nan"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"base": "adam", "momentum": 0.9}, "base 'adam' has no momentum, got 0.9: leave it out"),
        ({"betas": (0.5, 0.9)}, "base 'sgd' has no betas"),
        ({"workers": "independent"}, "unknown workers 'independent'"),
        ({"workers": "shared"}, "workers='shared' needs a process group"),
        ({"check_every": -1}, "check_every must be an integer >= 0, got -1"),
        ({"nonfinite": "skipp"}, "unknown nonfinite 'skipp': did you mean skip"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(SubspanError, match=message):
        DLRT(mlp(), **settings)


@pytest.mark.parametrize(("integrator", "adapts"), [(i, a) for i in ROBUST for a in (False, True)])
def test_bases_that_something_else_has_moved(integrator, adapts):
    """A new optimizer makes them orthonormal and leaves the weights; one that is there refuses."""
    if adapts is (integrator == "kls"):
        return
    net = mlp()
    settings = options(integrator) | ({"tolerance": 0.0, "max_rank": 3} if adapts else {})
    optimizer = DLRT(net, 0.0, **settings)
    run(net, DLRT(net, 0.1, integrator="vanilla"), 3)
    optimizer = DLRT(net, 0.0, **settings)
    for p in (net[0].U, net[0].V):
        torch.testing.assert_close(p.detach().T @ p.detach(), torch.eye(3, dtype=p.dtype))
    before = dense(net)
    run(net, optimizer, 1)
    torch.testing.assert_close(dense(net), before)
    run(net, SGD(net.parameters(), 0.5), 1)
    before = dense(net)
    with pytest.raises(SubspanError, match=r"bases of layer '0' are not orthonormal.*make a new"):
        run(net, optimizer, 1)
    assert torch.equal(dense(net), before)


@pytest.mark.parametrize("integrator", ["parallel", "kls"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"base": "adam"}])
def test_a_network_that_is_converted_goes_on(integrator, options):
    net = mlp(dtype=torch.float32)
    adapts = {"tolerance": 0.0} if integrator == "parallel" else {}
    optimizer = DLRT(net, 0.01, integrator=integrator, **options, **adapts)
    twin, its = copy.deepcopy((net, optimizer))
    run(net, optimizer, 2)
    run(twin, its, 4)
    net.double()
    run(net, optimizer, 2)
    torch.testing.assert_close(dense(net), dense(twin).double(), rtol=0, atol=1e-5)


def test_a_step_after_another_optimizer_is_that_of_the_weight():
    """Whatever bases it came with: W − h P(G)."""
    net = mlp(rank=3)
    run(net, Adam(net.parameters(), 0.05), 5)
    W = net[0].weight.detach().clone().requires_grad_()
    loss = cross_entropy(net[2](net[1](X @ W.T + net[0].bias)), Y)
    (G,) = torch.autograd.grad(loss, W)
    U, _, Vh = torch.linalg.svd(W.detach(), full_matrices=False)
    left, right = U[:, :3] @ U[:, :3].T, Vh[:3].T @ Vh[:3]
    projected = left @ G + G @ right - left @ G @ right
    run(net, DLRT(net, 1e-4), 1)
    torch.testing.assert_close(net[0].weight, W - 1e-4 * projected, rtol=0, atol=1e-6 * 1e-2)


def test_factors_that_are_computed_are_refused():
    ways = [
        lambda net: SubspaceModel(net, 5),
        lambda net: prune.l1_unstructured(net[0], "U", amount=0.5),
        lambda net: register_parametrization(net[0], "S", nn.Identity()),
    ]
    for change in ways:
        net = mlp()
        change(net)
        with pytest.raises(SubspanError, match=r"factors of layer '0' are computed \(from"):
            DLRT(net)


def test_factors_that_were_exchanged_are_refused():
    net = mlp()
    optimizer = DLRT(net, 0.1)
    run(net, optimizer, 1)
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    before = dense(net)
    with pytest.raises(SubspanError, match="layer '0' has other factors than the optimizer was"):
        run(net, optimizer, 1)
    assert torch.equal(dense(net), before)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_what_is_unfrozen_later_is_not_left_out_in_silence(integrator):
    net = mlp()
    net[0].requires_grad_(False)
    optimizer = DLRT(net, 0.1, **options(integrator))
    run(net, optimizer, 1)
    net[0].requires_grad_(True)
    before = dense(net)
    with pytest.raises(SubspanError, match=r"0\.U was frozen when the optimizer was made and has"):
        run(net, optimizer, 1)
    assert torch.equal(dense(net), before)
    for factor in "USV":
        getattr(net[0], factor).requires_grad_(False)
    optimizer.add_param_group({"params": net[0].bias})
    before = net[0].bias.detach().clone()
    run(net, optimizer, 1)
    assert not torch.equal(net[0].bias, before)


def test_networks_without_factors():
    with pytest.raises(SubspanError, match=r"no factored layer: call subspan.layers.factorize"):
        DLRT(build("mlp"))
    net = mlp()
    net[0].S.requires_grad_(False)
    with pytest.raises(SubspanError, match="some factors of layer '0' are frozen"):
        DLRT(net)
    with pytest.raises(SubspanError, match="every factored layer of the network is frozen"):
        DLRT(net.requires_grad_(False))


@pytest.mark.parametrize("names", ["U", "USV"])
def test_layers_that_share_a_factor(names):
    net = factorize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), rank=3)
    for name in names:
        setattr(net[1], name, getattr(net[0], name))
    with pytest.raises(SubspanError, match="layers '0' and '1' share a factor"):
        DLRT(net, integrator="vanilla", momentum=0.9)
    net[1] = net[0]
    DLRT(net)


def test_closures_that_are_none():
    net = mlp()
    optimizer = DLRT(net, 0.1, integrator="kls")
    loss_of(net).backward()
    with pytest.raises(SubspanError, match=r"needs step\(closure\); 'parallel' does without"):
        optimizer.step()
    with pytest.raises(SubspanError, match="the closure returned no loss"):
        optimizer.step(lambda: None)
    optimizer.zero_grad()
    with pytest.raises(SubspanError, match="no parameter has a gradient: call loss"):
        optimizer.step(lambda: torch.zeros(()))
    with pytest.raises(SubspanError, match=r"call loss.backward\(\) before step\(\)"):
        DLRT(net, 0.1).step()


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("evaluation", [1, 2])
def test_nothing_is_lost_when_a_step_fails(integrator, evaluation):
    """A gradient that is not finite, in the first evaluation or the second."""
    settings = options(integrator, momentum=0.9)
    net, twin = mlp(), mlp()
    optimizer, other = DLRT(net, 0.1, **settings), DLRT(twin, 0.1, **settings)
    run(net, optimizer, 2)
    run(twin, other, 2)
    calls = []

    def closure():
        calls.append(None)
        optimizer.zero_grad()
        loss = loss_of(net) * (float("nan") if len(calls) == evaluation else 1.0)
        loss.backward()
        return loss

    if evaluation == 2 and "kls" not in integrator:
        pytest.skip("evaluates once")
    with pytest.raises(SubspanError, match="a gradient of step 2 is not finite"):
        optimizer.step(closure)
    assert torch.equal(dense(net), dense(twin))
    assert run(net, optimizer, 3) == run(twin, other, 3)


@pytest.mark.parametrize("integrator", ROBUST)
def test_a_step_to_infinity_is_refused(integrator):
    net = mlp(dtype=torch.float32)
    before = dense(net)
    optimizer = DLRT(net, 3e38, **options(integrator))
    with pytest.raises(SubspanError, match="lower the learning rate"):
        run(net, optimizer, 3)
    if integrator != "kls":
        assert torch.isfinite(dense(net)).all()
    del before


@pytest.mark.parametrize("integrator", ROBUST)
def test_a_step_to_infinity_can_be_left_out(integrator):
    net, twin = mlp(), mlp()
    settings = options(integrator, momentum=0.9)
    optimizer, other = DLRT(net, 0.1, nonfinite="skip", **settings), DLRT(twin, 0.1, **settings)
    run(net, optimizer, 2)
    run(twin, other, 2)

    def steep():
        optimizer.zero_grad()
        loss = loss_of(net)
        (1e6 * loss).backward()
        return loss

    for group in optimizer.param_groups:
        group["lr"] = 1e308
    loss = float(optimizer.step(steep).detach())
    assert torch.equal(dense(net), dense(twin))
    assert (optimizer.steps, optimizer.skipped) == (3, 1)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for group in other.param_groups:
        group["steps"] += 1
    expected = run(twin, other, 3)
    assert loss == expected[0]
    assert run(net, optimizer, 3) == expected


def test_a_step_that_was_left_out_leaves_no_tangents():
    """Gradients may be cleared by the network, too, which knows of none."""
    net, twin = mlp(), mlp()
    optimizer, other = DLRT(net, 0.1, nonfinite="skip"), DLRT(twin, 0.1)
    (loss_of(net) * float("inf")).backward()
    optimizer.step()
    net.zero_grad(set_to_none=False)
    for network, its in ((net, optimizer), (twin, other)):
        its.param_groups[0]["steps"] = 0  # so that both begin with the same basis
        loss_of(network).backward()
        its.step()
    assert torch.equal(dense(net), dense(twin))


def test_a_weight_of_zeros_keeps_its_least_rank():
    net = mlp(3)
    with torch.no_grad():
        for layer in (m for m in net if isinstance(m, LowRank)):
            layer.S.zero_()
    optimizer = DLRT(net, 0.0, tolerance=0.1, min_rank=2)
    run(net, optimizer, 1)
    assert set(optimizer.ranks.values()) == {2}
