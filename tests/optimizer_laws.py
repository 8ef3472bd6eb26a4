"""The laws of every optimizer. A law is a function of one :class:`Case`.

tests/optim/test_laws.py enrols every variant by one row; an optimizer of somebody else is held to
them by

    for law in optimizer_laws.LAWS:
        law(Case("mine", lambda: …, lambda net: …))

Weights are compared as the network uses them: factored layers are expanded.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from subspan import SubspanError
from subspan.layers import LowRank, merge

X = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(20) % 4


@dataclass(frozen=True)
class Case:
    """One optimizer in one setting.

    Attributes:
        name: of the row.
        build: makes a network of float64 with 8 inputs and 4 outputs, always the same, with parts
            "0" and "2".
        optimizer: makes the optimizer of such a network.
        step: the weights that a step leads to, from the network before it and its optimizer.
        closure: "none": gradients are there before a step; "backward": a closure evaluates them;
            "loss": the closure gives the loss alone.
        shares: whether weights without a gradient of their own move all the same, by a basis or a
            memory that they share with others.
        error: of a step's weights against the reference, relative.
    """

    name: str
    build: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], Optimizer]
    step: Callable[[nn.Module, Any], Tensor]
    closure: str = "none"
    shares: bool = False
    error: float = 1e-9

    def pair(self) -> tuple[nn.Module, Any]:
        """A new network and its optimizer."""
        net = self.build()
        return net, self.optimizer(net)


Law = Callable[[Case], None]
LAWS: list[Law] = []


def law(function: Law) -> Law:
    """Enrol a law."""
    LAWS.append(function)
    return function


def loss_of(net: nn.Module) -> Tensor:
    return cross_entropy(net(X.to(next(net.parameters()).dtype)), Y)


def weights(net: nn.Module) -> Tensor:
    """All weights of a network, factored layers expanded."""
    net = copy.deepcopy(net)
    if any(isinstance(m, LowRank) for m in net.modules()):
        net = merge(net)
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def train(
    case: Case,
    net: nn.Module,
    optimizer: Any,
    steps: int = 1,
    loss: Callable[[nn.Module], Tensor] = loss_of,
    between: Callable[[], Any] = lambda: None,
) -> list[Any]:
    """Make some steps as the optimizer wants them; returns what they return.

    Args:
        case: whose optimizer it is.
        net: the network.
        optimizer: of it.
        steps: how many.
        loss: of the network.
        between: is called after each backward pass.
    """

    def backward() -> Tensor:
        optimizer.zero_grad()
        value = loss(net)
        value.backward()
        between()
        return value

    found = []
    for _ in range(steps):
        if case.closure == "none":
            backward()
            found.append(optimizer.step())
        else:
            found.append(
                optimizer.step(backward if case.closure == "backward" else lambda: loss(net))
            )
    return found


def assert_same(one: nn.Module, other: nn.Module, error: float = 1e-9) -> None:
    expected = weights(other)
    assert (weights(one) - expected).norm() <= error * expected.norm()


def moved(before: Tensor, net: nn.Module) -> bool:
    return bool((weights(net) - before).norm() > 1e-7 * before.norm())


def part(net: nn.Module, name: str) -> Tensor:
    layer = net.get_submodule(name)
    assert isinstance(layer.bias, Tensor)
    assert isinstance(layer.weight, Tensor)
    return torch.cat([layer.weight.detach().reshape(-1), layer.bias.detach()]).clone()


# ---- what a step is ------------------------------------------------------------------------------


@law
def a_step_equals_its_formula(case: Case) -> None:
    net, optimizer = case.pair()
    twin = case.build()
    loss_of(twin).backward()
    expected = case.step(twin, optimizer)
    train(case, net, optimizer)
    assert (weights(net) - expected).norm() <= case.error * expected.norm()
    assert moved(weights(twin), net)


@law
def a_rate_of_zero_changes_nothing(case: Case) -> None:
    net, optimizer = case.pair()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(case, net, optimizer, 3)
    assert_same(net, case.build(), 1e-12)


@law
def groups_have_their_own_rates(case: Case) -> None:
    """The rates of all groups but one are zero, which then stay; together they do what one does."""
    net, optimizer = case.pair()
    for alone in range(len(optimizer.param_groups)):
        net, optimizer = case.pair()
        rest: dict[int, Tensor] = {}
        for number, group in enumerate(optimizer.param_groups):
            if number != alone:
                group["lr"] = 0.0
                rest |= {id(p): p.detach().clone() for p in group["params"]}
        before = weights(net)
        train(case, net, optimizer)
        assert moved(before, net)
        factors = {id(p) for m in net.modules() if isinstance(m, LowRank) for p in (m.U, m.S, m.V)}
        for p in net.parameters():
            if id(p) in rest and id(p) not in factors:  # which may turn, with the same product
                assert torch.equal(p, rest[id(p)])


@law
def schedulers_turn_what_they_should(case: Case) -> None:
    net, optimizer = case.pair()
    schedule = LambdaLR(optimizer, lambda step: float(step < 2))
    seen = [weights(net)]
    for _ in range(3):
        train(case, net, optimizer)
        schedule.step()
        seen.append(weights(net))
    assert [bool((a - b).norm() > 1e-9) for a, b in itertools.pairwise(seen)] == [1, 1, 0]

    net, optimizer = case.pair()
    names = {"momentum", "betas"} & optimizer.defaults.keys()
    assert len(names) <= 1
    if not names:
        with pytest.raises(ValueError, match="must support momentum or beta1"):
            OneCycleLR(optimizer, 0.1, total_steps=5)
        return
    (name,) = names
    schedule = OneCycleLR(optimizer, 0.1, total_steps=5)
    values = []
    for _ in range(4):
        train(case, net, optimizer)
        schedule.step()
        values.append(optimizer.param_groups[0][name])
    assert len(set(values)) > 2


# ---- gradients that others scale -----------------------------------------------------------------


@law
def clipping_is_a_smaller_loss(case: Case) -> None:
    if case.closure == "loss":
        return  # there are no gradients
    net, optimizer = case.pair()
    other, theirs = case.pair()
    loss_of(net).backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1e9)
    half = float(norm) / 2
    clip = lambda: nn.utils.clip_grad_norm_(net.parameters(), half)  # noqa: E731
    if case.closure == "backward":  # whose second evaluation has another norm
        clip = lambda: [p.grad.mul_(0.5) for p in net.parameters() if p.grad is not None]  # noqa: E731
    train(case, net, optimizer, between=clip)
    train(case, other, theirs, loss=lambda net: loss_of(net) / 2)
    assert_same(net, other, 1e-5)


@law
def gradients_add_up_over_passes(case: Case) -> None:
    if case.closure != "none":
        return
    (net, optimizer), (other, theirs) = case.pair(), case.pair()
    for some in (slice(0, 8), slice(8, 20)):
        (cross_entropy(net(X[some]), Y[some], reduction="sum") / 20).backward()
    optimizer.step()
    train(case, other, theirs)
    assert_same(net, other)


@law
def autocast_around_a_step_is_that_of_its_passes(case: Case) -> None:
    """A step itself has the precision of the weights."""

    def steps(inside: bool) -> Tensor:
        net = case.build().float()
        optimizer: Any = case.optimizer(net)

        def backward() -> Tensor:
            optimizer.zero_grad()
            loss_of(net).backward()
            return loss_of(net)

        cast = torch.autocast("cpu", torch.bfloat16)
        closure = backward if case.closure != "loss" else lambda: loss_of(net)
        for _ in range(2):
            if case.closure == "none":
                cast(backward)()
            with cast if inside else nullcontext():
                own = closure if inside else cast(closure)
                optimizer.step(*([] if case.closure == "none" else [own]))
        return weights(net)

    before = weights(case.build().float())
    torch.testing.assert_close(steps(True) - before, steps(False) - before, rtol=1e-3, atol=1e-5)


@law
def a_gradient_scaler_changes_nothing(case: Case) -> None:
    """And it skips a step whose gradients overflow."""
    if case.closure != "none":
        return
    (net, optimizer), (other, theirs) = case.pair(), case.pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for unscale in (False, True, False):
        for steps in range(2):
            optimizer.zero_grad()
            scaler.scale(loss_of(net)).backward()
            if steps == 0 and not unscale:
                before = weights(net)
                next(p for p in net.parameters() if p.grad is not None).grad.fill_(torch.inf)  # type: ignore[union-attr]
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            if steps == 0 and not unscale:
                assert torch.equal(weights(net), before)
        train(case, other, theirs, 2 if unscale else 1)
    assert_same(net, other)


# ---- state and copies ----------------------------------------------------------------------------


@law
def training_goes_on_bit_for_bit(case: Case) -> None:
    whole, optimizer = case.pair()
    train(case, whole, optimizer, 5)
    first, optimizer = case.pair()
    train(case, first, optimizer, 3)
    file = io.BytesIO()
    torch.save({"net": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second = case.build()
    second.load_state_dict(state["net"])
    optimizer = case.optimizer(second)
    for _ in range(2):  # whatever PyTorch adds to an optimizer when it loads
        optimizer.load_state_dict(state["optimizer"])
    train(case, second, optimizer, 2)
    assert torch.equal(weights(second), weights(whole))


@law
def hooks_of_others_change_a_state_that_is_loaded(case: Case) -> None:
    net, optimizer = case.pair()
    train(case, net, optimizer, 2)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["weight_decay"]  # as in a state that somebody has to bring up to date

    def update(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        state = copy.deepcopy(state)
        for group in state["param_groups"]:
            group |= {"weight_decay": 0.0, "lr": 0.125}
        for value in (v for values in state["state"].values() for v in values.values()):
            if isinstance(value, Tensor):
                value.fill_(0.25)
        return state

    optimizer = case.optimizer(net)
    optimizer.register_load_state_dict_pre_hook(update)
    for _ in range(2):
        optimizer.load_state_dict(state)
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}
    moments = [v for of in optimizer.state.values() for v in of.values() if isinstance(v, Tensor)]
    assert all(bool((v == 0.25).all()) for v in moments)
    assert bool(moments) is any(state["state"].values())


@law
def copies_make_the_same_steps(case: Case) -> None:
    """Alone and with a scheduler, which covers the method ``step``; and leave each other alone."""

    def ways() -> Iterator[Callable[[Any], Any]]:
        yield copy.deepcopy
        yield lambda both: pickle.loads(pickle.dumps(both))
        yield lambda both: copy.deepcopy(both[::-1])[::-1]  # the optimizer first

    for copied in ways():
        net, optimizer = case.pair()
        LambdaLR(optimizer, lambda step: 1.0)
        train(case, net, optimizer, 2)
        twin, its = copied((net, optimizer))
        assert torch.equal(weights(twin), weights(net))
        before = weights(net)
        for _ in range(2):
            train(case, twin, its)
        assert torch.equal(weights(net), before)
        train(case, net, optimizer, 2)
        assert torch.equal(weights(twin), weights(net))
        assert its.state_dict()["param_groups"][0]["lr"] == optimizer.param_groups[0]["lr"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net, optimizer = case.pair()
        schedule = LambdaLR(optimizer, lambda step: 0.5**step)
        train(case, net, optimizer)
        twin, its, schedules = copy.deepcopy((net, optimizer, schedule))
        for n, o, s in ((net, optimizer, schedule), (twin, its, schedules)):
            s.step()
            train(case, n, o)
    assert torch.equal(weights(twin), weights(net))


# ---- what has no gradient ------------------------------------------------------------------------


@law
def frozen_parameters_stay(case: Case) -> None:
    """Before the optimizer is made, and afterwards, where it may refuse instead."""
    net = case.build()
    net.get_submodule("0").requires_grad_(False)
    before = part(net, "0"), part(net, "2")
    train(case, net, case.optimizer(net), 2)
    assert torch.equal(part(net, "0"), before[0])
    assert not torch.equal(part(net, "2"), before[1])

    net, optimizer = case.pair()
    train(case, net, optimizer)
    net.get_submodule("0").requires_grad_(False)
    before = part(net, "0"), part(net, "2")
    refusal = ""
    try:
        train(case, net, optimizer)
    except SubspanError as error:
        refusal = str(error)
    assert torch.equal(part(net, "0"), before[0])
    assert torch.equal(part(net, "2"), before[1]) == ("0.weight has been frozen" in refusal)


@law
def a_part_that_a_batch_does_not_use_stays(case: Case) -> None:
    if case.shares or case.closure == "loss":
        return  # a basis of all weights moves all of them

    def without_the_first(net: nn.Module) -> Tensor:
        last = net.get_submodule("2")
        return cross_entropy(last(torch.cat([X, X], dim=1)), Y)

    net, optimizer = case.pair()
    train(case, net, optimizer, 2)
    before = part(net, "0"), part(net, "2")
    train(case, net, optimizer, loss=without_the_first)
    assert torch.equal(part(net, "0"), before[0])
    assert not torch.equal(part(net, "2"), before[1])
    train(case, net, optimizer)
    assert not torch.equal(part(net, "0"), before[0])


@law
def a_rate_that_is_no_number_is_refused(case: Case) -> None:
    """A scheduler that divides by zero, say: all weights would be lost in a step."""
    net, optimizer = case.pair()
    before = weights(net)
    for rate in (math.nan, torch.tensor(math.inf)):
        optimizer.param_groups[-1]["lr"] = rate
        with pytest.raises(SubspanError, match="lr must be a number >= 0, a scheduler set"):
            train(case, net, optimizer)
        assert torch.equal(weights(net), before)
        assert optimizer.steps == 0


@law
def no_gradient_at_all_is_refused(case: Case) -> None:
    net, optimizer = case.pair()
    before = weights(net)
    match = r"no parameter has a gradient|needs step\(closure\)"
    with pytest.raises(SubspanError, match=match):
        optimizer.step()
    if case.closure != "loss":
        with pytest.raises(SubspanError, match="no parameter has a gradient"):
            optimizer.step(lambda: torch.zeros(()))
    assert torch.equal(weights(net), before)


@law
def a_closure_is_honoured(case: Case) -> None:
    """It is called, its gradients count, and a step returns its (first) loss."""
    (net, optimizer), (other, theirs) = case.pair(), case.pair()
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net)
        if case.closure != "loss":
            loss.backward()
        seen.append(float(loss.detach()))
        return loss

    found = optimizer.step(closure)
    assert seen
    assert float(found.detach()) == pytest.approx(seen[0], rel=0.1 if case.closure == "loss" else 0)
    train(case, other, theirs)
    assert torch.equal(weights(net), weights(other))


@law
def numbers_that_are_not_finite_change_nothing(case: Case) -> None:
    """They are an error, or make the step void: the next ones are those of a twin without it."""
    (net, optimizer), (other, theirs) = case.pair(), case.pair()
    if not hasattr(optimizer, "nonfinite"):
        return  # an optimizer without this rule
    train(case, net, optimizer)
    train(case, other, theirs)
    before = weights(net)

    def broken(net: nn.Module) -> Tensor:
        return loss_of(net) * float("nan")

    optimizer.nonfinite = "error"
    with pytest.raises(SubspanError, match=r"step 1 is not finite: lower .* nonfinite='skip'"):
        train(case, net, optimizer, loss=broken)
    assert torch.equal(weights(net), before)
    optimizer.nonfinite = "skip"
    [loss] = train(case, net, optimizer, loss=broken)
    assert torch.equal(weights(net), before)
    assert (optimizer.steps, optimizer.skipped) == (2, 1)
    assert loss is None or loss.isnan()
    for group in theirs.param_groups:
        group["steps"] += 1
    train(case, net, optimizer, 2)
    train(case, other, theirs, 2)
    assert torch.equal(weights(net), weights(other))
