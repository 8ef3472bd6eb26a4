"""The integrators as functions: exactness, order, optimality, and small singular values."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from subspan.linalg import rank_of
from subspan.optim import integrators
from subspan.optim.integrators import INTEGRATORS, USV

N, M = 12, 9


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def basis(n, r, seed=0):
    return torch.linalg.qr(rand(n, r, seed=seed)).Q


def point(values, seed=0):
    """Some W with these singular values and a core that is not diagonal."""
    r = len(values)
    left, right = basis(r, r, seed + 2), basis(r, r, seed + 3)
    core = left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T
    return USV(basis(N, r, seed), core, basis(M, r, seed + 1))


def slopes(G, at):
    return USV(G @ at.V, at.U.T @ G @ at.V, G.T @ at.U)


def tangent(G, at):
    """P(G) = G VVᵀ + UUᵀ G − UUᵀ G VVᵀ."""
    left, right = at.U @ at.U.T, at.V @ at.V.T
    return G @ right + left @ G - left @ G @ right


def best(W, r):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r] @ S[:r].diag() @ Vh[:r]


class Move:
    """A step of a registered integrator, at the same rank or through a wider one."""

    def __init__(self, name, wider=False, number=0):
        self.integrator, self.wider, self.number = INTEGRATORS[name], wider, number
        self.__name__ = f"{name}{'-wider' * wider}-{number}"

    def __call__(self, at, gradient, h, r=None):
        slope = slopes(gradient(at.dense()), at)
        if not self.integrator.tangents:
            slope = USV(slope.U @ at.S.T, slope.S, slope.V @ at.S)
        if self.wider:
            new = self.integrator.wider_step(at, slope, h)
        else:
            new = self.integrator.first_step(at, slope, h, self.number)
        if self.integrator.second_step:
            core = new.U.T @ gradient(new.dense()) @ new.V
            new = self.integrator.second_step(new, core, h)
        if self.wider:
            new = integrators.truncated(new, integrators.spectrum(new), r or at.rank)
        return new


# The laws of this file hold for every integrator that is registered.
ROBUST = [
    Move(name, wider, number)
    for name, integrator in INTEGRATORS.items()
    if integrator.tangents
    for wider, number in ((False, 0), (False, 1), (True, 0))
    if not wider or integrator.wider_step
]
TWICE = [move for move in ROBUST if move.integrator.second_step]
WIDER = [move for move in ROBUST if move.wider]
parallel, retracted, retracted_v = (
    Move("parallel", True),
    Move("parallel"),
    Move("parallel", False, 1),
)
vanilla = Move("vanilla")


SPECTRA = [[3.0, 1.0, 0.5, 0.2], [3.0, 1.0, 1e-4, 1e-8], [1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("step", ROBUST, ids=lambda move: move.__name__)
def test_bases_stay_orthonormal(step, spectrum):
    at = point(spectrum)
    for seed in range(5):
        at = step(at, lambda W, seed=seed: rand(N, M, seed=seed) + W, 0.1)
        for U in (at.U, at.V):
            torch.testing.assert_close(U.T @ U, torch.eye(U.shape[1], dtype=U.dtype))


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_parallel_is_a_step_along_the_projected_gradient(spectrum):
    at, G, h = point(spectrum), rand(N, M, seed=9), 0.1
    wide = integrators.parallel(at, slopes(G, at), h)
    torch.testing.assert_close(wide.dense(), at.dense() - h * tangent(G, at))
    assert wide.rank == 8


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_retraction_is_a_projection_of_the_same(spectrum):
    at, G, h = point(spectrum), rand(N, M, seed=9), 0.1
    W = at.dense() - h * tangent(G, at)
    U, _ = torch.linalg.qr(W @ at.V)
    torch.testing.assert_close(retracted(at, lambda _: G, h).dense(), U @ U.T @ W)
    V, _ = torch.linalg.qr(W.T @ at.U)
    torch.testing.assert_close(retracted_v(at, lambda _: G, h).dense(), W @ V @ V.T)


@pytest.mark.parametrize("step", [retracted, retracted_v], ids=lambda move: move.__name__)
def test_retraction_differs_from_truncation_by_the_square_of_the_step(step):
    at, G = point([3.0, 1.0, 0.5, 0.2]), rand(N, M, seed=9)
    differences = [
        float((step(at, lambda _: G, h).dense() - parallel(at, lambda _: G, h).dense()).norm())
        for h in (1e-2, 5e-3, 2.5e-3)
    ]
    for coarse, fine in pairwise(differences):
        assert coarse / fine > 3.7


@pytest.mark.parametrize("step", TWICE, ids=lambda move: move.__name__)
@pytest.mark.parametrize("spectrum", SPECTRA[:2])
def test_a_flow_of_rank_r_is_followed_exactly(step, spectrum):
    """Ẇ = Ȧ(t) with A of rank r: the increment A(t₁) − A(t₀) is all that the steps need."""
    at, target = point(spectrum), point(spectrum, seed=50)
    increment = target.dense() - at.dense()
    after = step(at, lambda _: -increment, 1.0)
    torch.testing.assert_close(after.dense(), target.dense())


@pytest.mark.parametrize("step", ROBUST, ids=lambda move: move.__name__)
def test_all_are_consistent(step):
    """One step is W − h P(G) up to the square of h."""
    at, G = point([3.0, 1.0, 0.5, 0.2]), rand(N, M, seed=9)
    errors = []
    for h in (1e-3, 5e-4):
        expected = at.dense() - h * tangent(G, at)
        errors.append(float((step(at, lambda _: G, h).dense() - expected).norm()))
    assert errors[0] < 1e-3
    assert errors[0] / errors[1] > 3.7


@pytest.mark.parametrize("step", ROBUST, ids=lambda move: move.__name__)
def test_full_rank_is_gradient_descent(step):
    W, G = rand(N, M), rand(N, M, seed=1)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    after = step(USV(U, S.diag(), Vh.T), lambda _: G, 0.3)
    torch.testing.assert_close(after.dense(), W - 0.3 * G)


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.3, 0.9])
def test_truncation_is_optimal_and_within_its_tolerance(tolerance):
    """The orientation of V matters (erratum): a core perturbed by 1 % tells it."""
    at = point([3.0, 1.0, 0.5, 0.2])
    at = USV(at.U, at.S + 0.01 * rand(4, 4, seed=8) * at.S.norm() / 4, at.V)
    core = integrators.spectrum(at)
    r = rank_of(core.S, tolerance)
    after = integrators.truncated(at, core, r)
    torch.testing.assert_close(after.dense(), best(at.dense(), r))
    assert (after.dense() - at.dense()).norm() <= tolerance * at.dense().norm() + 1e-12
    if r > 1:  # and not at one less
        less = best(at.dense(), r - 1)
        assert (less - at.dense()).norm() > tolerance * at.dense().norm()
    assert torch.equal(after.S, after.S.diag().diag())


def test_the_wrong_transpose_is_not_optimal():
    """The published codes do this: a control that the test above can fail."""
    at = point([3.0, 1.0, 0.5, 0.2])
    left, sigma, right = torch.linalg.svd(at.S)
    wrong = (at.U @ left[:, :2]) @ sigma[:2].diag() @ (at.V @ right[:, :2]).T
    right_error = (best(at.dense(), 2) - at.dense()).norm()
    assert (wrong - at.dense()).norm() > 2 * right_error


def descend(step, at, target, steps, h=0.2):
    """Towards a target of rank r: ½ ‖W − A‖², in relative distance."""
    for _ in range(steps):
        at = step(at, lambda W: W - target, h)
    return float((at.dense() - target).norm() / target.norm())


@pytest.mark.parametrize("step", ROBUST, ids=lambda move: move.__name__)
@pytest.mark.parametrize("smallest", [1e-2, 1e-8])
def test_small_singular_values_do_not_matter(step, smallest):
    target = point([3.0, 1.0, 0.5, 0.2], seed=60).dense()
    at = point([1.0, smallest, smallest, smallest])
    assert descend(step, at, target, 60) < 1e-4


def test_plain_descent_stalls_at_small_singular_values():
    target = point([3.0, 1.0, 0.5, 0.2], seed=60).dense()
    assert descend(vanilla, point([1.0, 1e-8, 1e-8, 1e-8]), target, 60) > 0.3


@pytest.mark.parametrize("step", WIDER, ids=lambda move: move.__name__)
def test_the_rank_grows_to_what_the_flow_needs(step):
    target = point([3.0, 1.0, 0.5, 0.2], seed=60).dense()
    at = point([1.0])
    for _ in range(60):
        at = step(at, lambda W: W - target, 0.2, min(2 * at.rank, 4))
    assert at.rank == 4
    assert (at.dense() - target).norm() < 1e-4 * target.norm()
