"""Orthonormal bases, of random, dependent and vanishing columns; least squares."""

from __future__ import annotations

import pytest
import torch

from subspan.linalg import complement, conjugate_gradients, polish, rank_of, svd

TYPES = [torch.float32, torch.float64]


def basis(n, r, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, r, dtype=dtype, generator=generator)).Q


def off(u):
    """How far columns are from orthonormal, in roundings."""
    gram = u.T @ u - torch.eye(u.shape[1], dtype=u.dtype)
    return float(gram.abs().max()) / torch.finfo(u.dtype).eps


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-9, 0.0])
@pytest.mark.parametrize("n", [40, 9, 5])
@pytest.mark.parametrize("axes", [False, True])
def test_new_directions(dtype, scale, n, axes):
    """However little of A lies outside the span of U, the columns are orthonormal and hold it."""
    u = torch.eye(n, dtype=dtype)[:, :5] if axes else basis(n, 5, dtype)
    a = u @ basis(5, 5, dtype, seed=2) + scale * basis(n, 5, dtype, seed=3)
    new = complement(u, a)
    assert new.shape == (n, min(5, n - 5))
    both = torch.cat([u, new], dim=1)
    assert off(both) < 256
    torch.testing.assert_close(both @ (both.T @ a), a)


def test_polish_squares_the_error():
    u = basis(30, 4) + 1e-5 * basis(30, 4, seed=5)
    before, after = off(u), off(polish(u))
    eps = torch.finfo(torch.float64).eps
    assert before * eps > 1e-6
    assert after * eps < 2 * (before * eps) ** 2


@pytest.mark.parametrize(
    ("values", "tolerance", "expected"),
    [
        ([3.0, 4.0, 0.0], 0.0, 2),
        ([4.0, 3.0], 0.6, 1),
        ([4.0, 3.0], 0.59, 2),
        ([1.0, 1.0, 1.0, 1.0], 0.5, 3),
        ([0.0, 0.0], 0.5, 0),
        ([1e-30, 1e-31], 0.0, 2),
    ],
)
def test_rank_of(values, tolerance, expected):
    assert rank_of(torch.tensor(values).sort(descending=True).values, tolerance) == expected


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)])
@pytest.mark.parametrize("fails", ["", "raises", "no numbers"])
def test_svd(shape, fails, monkeypatch):
    """LAPACK's failure on a finite float32 matrix is made up for."""
    a = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    lapack = torch.linalg.svd

    def stubborn(matrix, **options):
        if fails == "raises" and matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")
        u, s, vh = lapack(matrix, **options)
        if fails == "no numbers" and matrix.dtype == torch.float32:
            u[0, 0] = float("nan")
        return u, s, vh

    monkeypatch.setattr(torch.linalg, "svd", stubborn)
    u, s, v = svd(a)
    k = min(shape)
    assert (u.shape, s.shape, v.shape) == ((shape[0], k), (k,), (shape[1], k))
    torch.testing.assert_close(u @ s.diag() @ v.T, a)
    torch.testing.assert_close(s, torch.linalg.svdvals(a))
    if fails == "raises":
        with pytest.raises(RuntimeError, match="failed to converge"):
            svd(a * float("nan"))


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_conjugate_gradients_solve_least_squares(start):
    """From any start; of a matrix of deficient rank, to the solution that is nearest to it."""
    a, b = basis(20, 6) @ torch.diag(torch.tensor([3.0, 2, 1, 1, 0.1, 0]).double()), basis(20, 1)
    a = a @ basis(6, 6, seed=1).T
    calls = []

    def image(x):
        calls.append(x)
        return a @ x

    x = torch.full((6,), start, dtype=torch.float64)
    arguments = {"image": image, "adjoint": lambda y: a.T @ y, "x": x, "target": b[:, 0]}
    found = conjugate_gradients(**arguments, tolerance=1e-12, steps=100)
    exact = x + torch.linalg.pinv(a, rtol=1e-8) @ (b[:, 0] - a @ x)
    torch.testing.assert_close(found, exact)
    # Five different singular values that count need five steps, and a tolerance or a limit less.
    assert len(calls) < 12
    calls.clear()
    conjugate_gradients(**arguments, tolerance=1e-12, steps=2)
    assert len(calls) == 3
    near = conjugate_gradients(**arguments, tolerance=0.1, steps=100)
    slope = (a.T @ (b[:, 0] - a @ near)).norm() / (a.T @ b[:, 0]).norm()
    assert 1e-3 < slope <= 0.1
    zero = conjugate_gradients(image, lambda y: a.T @ y, 0 * x, 0 * b[:, 0], tolerance=0, steps=9)
    assert not zero.any()
