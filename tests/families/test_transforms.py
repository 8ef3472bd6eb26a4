"""The transforms and tilings that structured families are made of, against their matrices."""

import math

import pytest
import torch

import subspan
from subspan import SubspanError
from subspan.families.fastfood import walsh_hadamard
from subspan.families.kronecker import Kronecker, ceil_sqrt
from subspan.families.orthogonal import hartley


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 17, 30, 97, 101, 256])
def test_hartley_is_its_matrix_and_its_own_inverse(n: int) -> None:
    angle = 2 * math.pi * torch.outer(torch.arange(n), torch.arange(n)).double() / n
    matrix = (angle.cos() + angle.sin()) / math.sqrt(n)
    x = torch.randn(n, dtype=torch.float64)
    torch.testing.assert_close(hartley(x), matrix @ x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(hartley(hartley(x)), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_walsh_hadamard_is_its_matrix_and_its_own_inverse(n: int) -> None:
    parity = [[(a & b).bit_count() % 2 for b in range(n)] for a in range(n)]
    matrix = (1 - 2 * torch.tensor(parity)).double() / math.sqrt(n)
    x = torch.randn(3, n, dtype=torch.float64)
    torch.testing.assert_close(walsh_hadamard(x), x @ matrix)
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), x)


@pytest.mark.parametrize("D", [1, 2, 3, 31, 127, 509])
def test_orthogonal_fills_the_space_at_primes(D: int) -> None:
    P = subspan.projection("orthogonal", out_dim=D, in_dim=D, seed=1).dense()
    identity = torch.eye(D, dtype=torch.float64)
    assert (P.T @ P - identity).abs().max() < 1e-12
    assert (P @ P.T - identity).abs().max() < 1e-12


@pytest.mark.parametrize(("D", "d"), [(96, 20), (64, 64), (7, 1), (40, 2)])
def test_whole_blocks_of_fastfood_have_columns_of_norm_1(D: int, d: int) -> None:
    P = subspan.projection("fastfood", out_dim=D, in_dim=d, seed=1).dense()
    assert (P.norm(dim=0) - 1).abs().max() < 1e-12


def test_fastfood_is_nearly_gaussian() -> None:
    P = subspan.projection("fastfood", out_dim=4096, in_dim=100, seed=1).dense() * 64
    assert abs(float(P.mean())) < 0.01
    assert abs(float((P**4).mean()) - 3) < 0.15


def test_fastfood_refuses_more_blocks_than_it_has_numbers_for() -> None:
    subspan.projection("fastfood", out_dim=1 << 34, in_dim=9)
    with pytest.raises(SubspanError, match="use a larger in_dim"):
        subspan.projection("fastfood", out_dim=1 << 34, in_dim=8)


@pytest.mark.parametrize("n", [*range(1, 50), 2**34 - 1, 2**34, (1 << 17) ** 2 + 1])
def test_ceil_sqrt(n: int) -> None:
    root = ceil_sqrt(n)
    assert (root - 1) ** 2 < n <= root**2


@pytest.mark.parametrize(("D", "d"), [(1, 1), (36, 9), (37, 10), (61_706, 1000), (2**34, 3)])
def test_kronecker_tiles_cover_the_matrix(D: int, d: int) -> None:
    a, b, p, q = Kronecker(D, d).tile
    assert (a - 1) * b < D <= a * b
    assert (p - 1) * q < d <= p * q
    assert abs(a - b) <= 1
    assert abs(p - q) <= 1
