"""The base's memory where bases turn: what is exact, and what new directions begin with."""

from __future__ import annotations

import torch

from subspan.optim.integrators import USV
from subspan.optim.moments import FIRST, SECOND, transport, turn_core

N, M, R = 9, 7, 3


def bases(r, seed):
    generator = torch.Generator().manual_seed(seed)
    U, V = (
        torch.linalg.qr(torch.randn(k, r, generator=generator, dtype=torch.float64)).Q
        for k in (N, M)
    )
    return USV(U, torch.eye(r, dtype=torch.float64), V)


def test_squares_follow_a_permutation_with_signs():
    old = bases(R, 0)
    order, signs = [2, 0, 1], torch.tensor([1.0, -1, -1], dtype=torch.float64)
    new = USV(old.U[:, order] * signs, old.S, old.V[:, order] * signs)
    k, s, l = (torch.rand(*shape, dtype=torch.float64) for shape in ((N, R), (R, R), (M, R)))  # noqa: E741
    states = {FIRST: k, SECOND: k}, {FIRST: s, SECOND: s}, {FIRST: l, SECOND: l}
    turn_core(states[1], old, new)
    transport(states, old, new)
    torch.testing.assert_close(states[0][FIRST], k[:, order] * signs)
    torch.testing.assert_close(states[2][FIRST], l[:, order] * signs)
    torch.testing.assert_close(states[1][FIRST], s[order][:, order] * signs * signs[:, None])
    torch.testing.assert_close(states[0][SECOND], k[:, order])
    torch.testing.assert_close(states[1][SECOND], s[order][:, order])


def test_squares_of_a_new_direction_are_the_mean_of_their_row():
    """A zero there would be an enormous step."""
    wide = bases(R + 1, 0)
    old = USV(wide.U[:, :R], wide.S[:R, :R], wide.V[:, :R])
    k, l = torch.rand(N, R, dtype=torch.float64), torch.rand(M, R, dtype=torch.float64)  # noqa: E741
    states = {FIRST: k, SECOND: k}, {}, {FIRST: l, SECOND: l}
    transport(states, old, wide)
    torch.testing.assert_close(states[0][SECOND][:, :R], k)
    torch.testing.assert_close(states[0][SECOND][:, R], k.mean(dim=1))
    torch.testing.assert_close(states[0][FIRST][:, R], torch.zeros(N, dtype=torch.float64))


def test_momentum_is_projected_to_the_new_tangent_space():
    """k' = B V', l' = Bᵀ U', s' = U'ᵀ B V' of the tangent vector B that k and l describe."""
    old, new = bases(R, 0), bases(R, 1)
    B = torch.randn(N, M, dtype=torch.float64)
    B = old.U @ (old.U.T @ B) + (B - old.U @ (old.U.T @ B)) @ old.V @ old.V.T
    states = {FIRST: B @ old.V}, {FIRST: old.U.T @ B @ old.V}, {FIRST: B.T @ old.U}
    transport(states, old, new)
    torch.testing.assert_close(states[0][FIRST], B @ new.V)
    torch.testing.assert_close(states[1][FIRST], new.U.T @ B @ new.V)
    torch.testing.assert_close(states[2][FIRST], B.T @ new.U)
