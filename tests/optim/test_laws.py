"""Every variant of our optimizers is held to the laws of tests/optimizer_laws.py: one row each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from subspan.layers import LowRank, factorize, merge
from subspan.optim import DLRT, RandomBases
from subspan.optim.estimators import ESTIMATORS
from subspan.optim.integrators import INTEGRATORS, USV, Integrator
from tests import optimizer_laws
from tests.nets import build
from tests.optimizer_laws import Case, loss_of, weights

# ---- RandomBases: θ − η P Pᵀ g -------------------------------------------------------------------


def bases(name: str, closure: str = "none", error: float = 1e-9, **options: Any) -> Case:
    """The first step has no momentum yet."""

    def optimizer(net: nn.Module) -> RandomBases:
        named = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
        groups = [{"params": [pair for pair in named if pair[0][0] == part]} for part in "02"]
        return RandomBases([group for group in groups if group["params"]], 9, lr=0.5, **options)

    def step(net: nn.Module, optimizer: RandomBases) -> Tensor:
        parts = optimizer.directions.compartments
        P = torch.block_diag(*[part.projections[0].dense(step=0) for part in parts])
        g = torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None])
        before = weights(net)
        return before - 0.5 * P @ (P.T @ (g + options.get("weight_decay", 0.0) * before))

    def mlp() -> nn.Module:
        return build("mlp", torch.float64)

    # Without a gradient is as with one of zeros: the others' decay and momentum go on.
    shares = not options.keys().isdisjoint({"momentum", "weight_decay"})
    return Case(name, mlp, optimizer, step, closure, shares, error)


# ---- DLRT: the integrators on gradients of the dense network -------------------------------------


def dlrt(name: str, integrator: str = "parallel", base: str = "sgd", **options: Any) -> Case:
    closure = "backward" if INTEGRATORS[integrator].second_step else "none"

    def optimizer(net: nn.Module) -> DLRT:
        more = {"tolerance": 0.0} if INTEGRATORS[integrator].adaptive else {}
        return DLRT(net, 0.1, integrator=integrator, base=base, **(more | options))

    def step(net: nn.Module, optimizer: DLRT) -> Tensor:
        return integrated(net, INTEGRATORS[integrator], base, optimizer.ranks_may_change)

    def mlp() -> nn.Module:
        return factorize(build("mlp", torch.float64), rank=3)

    return Case(name, mlp, optimizer, step, closure, error=1e-6 if base == "adam" else 1e-9)


def slope(base: str, g: Tensor) -> Tensor:
    """The first step of Adam is g / (|g| + ε)."""
    return g / (g.abs() + 1e-8) if base == "adam" else g


def integrated(net: nn.Module, integrator: Integrator, base: str, adapting: bool) -> Tensor:
    h = 0.1
    layers = {name: m for name, m in net.named_modules() if isinstance(m, LowRank)}
    at = {n: USV(*(p.detach() for p in (m.U, m.S, m.V))) for n, m in layers.items()}
    biases = {n: m.bias.detach() for n, m in layers.items()}

    def gradients(of: dict[str, USV]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        dense = merge(copy.deepcopy(net))
        for name, factors in of.items():
            dense.get_submodule(name).weight.data.copy_(factors.dense())
        dense.zero_grad()
        loss_of(dense).backward()
        found = {name: dense.get_submodule(name) for name in of}
        return {n: m.weight.grad for n, m in found.items()}, {
            n: m.bias.grad for n, m in found.items()
        }

    G, of_bias = gradients(at)
    after: dict[str, USV] = {}
    for name, here in at.items():
        U, S, V = here.U, here.S, here.V
        K, core, L = G[name] @ V, U.T @ G[name] @ V, G[name].T @ U
        if not integrator.tangents:
            K, L = K @ S.T, L @ S
        moves = USV(slope(base, K), slope(base, core), slope(base, L))
        if adapting and integrator.wider_step:
            after[name] = integrator.wider_step(here, moves, h)
        else:
            after[name] = integrator.first_step(here, moves, h, 0)
    if second := integrator.second_step:
        G, of_bias = gradients(after)
        after = {n: second(new, slope(base, new.U.T @ G[n] @ new.V), h) for n, new in after.items()}
    moved = {n: biases[n] - h * slope(base, of_bias[n]) for n in at}
    return torch.cat([t for n in at for t in (after[n].dense().reshape(-1), moved[n])])


CASES: list[Case] = [
    bases("rbd"),
    bases("rbd-tensor", compartments="tensor", weight_decay=0.1),
    bases("rbd-signs", distribution="rademacher"),
    bases("rbd-sparse", distribution="sparse"),
    bases("rbd-momentum", redraw_every=3, momentum=0.9),
    bases("fpd", redraw_every=None),
    bases("forward", "loss", estimator="forward"),
    bases("evolution", "loss", error=1e-4, estimator="evolution", sigma=1e-3),
    dlrt("parallel"),
    dlrt("parallel-momentum", momentum=0.9),
    dlrt("parallel-adam", base="adam"),
    dlrt("parallel-adapting", tolerance=0.0),
    dlrt("parallel-adapting-adam", base="adam", tolerance=0.0),
    dlrt("kls", "kls"),
    dlrt("kls-adam", "kls", "adam"),
    dlrt("kls-adaptive", "kls-adaptive"),
    dlrt("kls-adaptive-momentum", "kls-adaptive", momentum=0.9),
    dlrt("vanilla", "vanilla"),
    dlrt("vanilla-adam", "vanilla", "adam"),
]


# Other cases have these integrators, and others Adam; bases go one way for all families.
SLOW = ("rbd-sparse", "parallel-adapting-adam", "kls-adam", "vanilla-adam")


def marks(case: Case) -> Any:
    return pytest.mark.slow if case.name in SLOW else ()


# PyTorch's own forward mode scripts a few functions when it is first used.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=marks(c)) for c in CASES])
@pytest.mark.parametrize("law", optimizer_laws.LAWS, ids=lambda law: law.__name__)
def test_laws(law: Callable[[Case], None], case: Case) -> None:
    law(case)


def test_every_estimator_and_integrator_has_a_row() -> None:
    trained = [case.optimizer(case.build()) for case in CASES]
    assert {o.estimator for o in trained if isinstance(o, RandomBases)} == set(ESTIMATORS)
    assert {o.integrator for o in trained if isinstance(o, DLRT)} == set(INTEGRATORS)
