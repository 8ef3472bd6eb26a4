"""The transforms and tilings that structured families are made of, against their matrices."""

import math

import pytest
import torch

import subspan
from subspan import SubspanError
from subspan.families.fastfood import walsh_hadamard
from subspan.families.kronecker import Kronecker, ceil_sqrt
from subspan.families.orthogonal import inverse, levels, transform
from tests.reference import butterflies


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 31, 32, 33, 64, 96, 100, 161, 1000, 1023, 4097])
def test_butterflies_are_orthogonal_and_those_of_the_format(n: int) -> None:
    x = torch.randn(n, dtype=torch.float64)
    y = transform(x)
    expected = torch.tensor(butterflies(x.tolist()), dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inverse(y), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y.norm(), x.norm(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [64, 96, 500, 511])
def test_butterflies_mix_everything_with_everything(n: int) -> None:
    # Of ±1/√n alone, the mean of n² T⁴ is 1; of normal entries it is 3. A level that is missing or
    # meets the wrong partners leaves half of the entries empty: 2 or more.
    T = torch.stack([transform(e) for e in torch.eye(n, dtype=torch.float64)], dim=1)
    assert float((T**4).mean()) * n**2 < 1.5
    assert levels(n) == math.ceil(math.log2(math.ceil(n / 32))) + 5


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
