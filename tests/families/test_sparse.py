"""Promises of the sparse families beyond the laws, and a bug of the published code held off."""

import math

import pytest
import torch

import subspan
from subspan import SubspanError

ALL = [
    ("sparse", {"s": "sqrt_d"}),
    ("sparse-original", {}),
    ("sparse2", {}),
    ("sparse2full", {}),
]


@pytest.mark.parametrize("s", [1, 2, 3, 3.4, 10, 99, 101, 10**9, "sqrt_d", "sqrt_D"])
@pytest.mark.parametrize(("D", "d"), [(100, 26), (101, 50), (7, 7)])
def test_every_column_has_one_nonzero_per_block(D: int, d: int, s: float | str) -> None:
    p = subspan.projection("sparse", out_dim=D, in_dim=d, s=s)
    run = {"sqrt_d": round(math.sqrt(d)), "sqrt_D": round(math.sqrt(D))}.get(str(s), s)
    blocks = math.ceil(D / round(float(run)))
    P = p.dense()
    assert (P != 0).sum(dim=0).eq(blocks).all()
    assert P[P != 0].abs().eq(1 / math.sqrt(blocks)).all()
    for block in P.split(round(float(run))):
        assert (block != 0).sum(dim=0).eq(1).all()


def test_entries_have_the_distribution_of_achlioptas() -> None:
    # ±√(3/D) with probability 1/6 each, 0 with probability 2/3; places within blocks alike.
    D, d = 3000, 400
    P = subspan.projection("sparse", out_dim=D, in_dim=d).dense()
    signs = (P * math.sqrt(D / 3)).round()
    assert torch.equal(signs * (1 / math.sqrt(D / 3)), P)
    for value, chance in ((-1, 1 / 6), (0, 2 / 3), (1, 1 / 6)):
        share = float((signs == value).double().mean())
        assert abs(share - chance) < 4 * math.sqrt(chance * (1 - chance) / (D * d))
    places = (P != 0).view(D // 3, 3, d).sum(dim=(0, 2)).double()
    assert ((places - D * d / 9).abs() < 4 * math.sqrt(2 * D * d / 27)).all()


@pytest.mark.parametrize("family", ["sparse-original", "sparse2"])
def test_minuts_variants_have_his_density(family: str) -> None:
    D, d = 4000, 400
    P = subspan.projection(family, out_dim=D, in_dim=d).dense()
    share = float((P != 0).double().mean())
    assert abs(share - 0.05) < 4 * math.sqrt(0.05 * 0.95 / (D * d))
    assert len(P.abs().unique()) == 2
    positive = float((P > 0).sum() / (P != 0).sum())
    assert positive == 1 if family == "sparse2" else abs(positive - 0.5) < 0.01


def test_sparse2full_has_both_signs_and_equal_columns() -> None:
    D, d = 4000, 400
    P = subspan.projection("sparse2full", out_dim=D, in_dim=d).dense()
    assert (P != 0).sum(dim=0).eq(D // 20).all()
    assert abs(float((P > 0).sum() / (P != 0).sum()) - 0.5) < 0.01


@pytest.mark.parametrize(("family", "options"), ALL)
def test_columns_do_not_share_a_support(family: str, options: dict[str, str]) -> None:
    """The bug of Minut's published code: one random state for all directions.

    There the union of all supports was 3.4 % of the weights, for which nothing else was ever moved.
    With independent columns of density 1/√d nearly every weight is reached, and two columns meet
    as often as chance has it.
    """
    D, d = 6144, 144
    nonzero = subspan.projection(family, out_dim=D, in_dim=d, **options).dense() != 0
    assert nonzero.any(dim=1).double().mean() > 0.9999
    overlap = nonzero.double().T @ nonzero.double()
    pairs = overlap[torch.ones(d, d, dtype=torch.bool).triu(1)]
    expected = D / d  # of D rows, each column has 1/√d
    assert abs(float(pairs.mean()) / expected - 1) < 0.02
    assert pairs.max() < 2.5 * expected
    per_row = nonzero.sum(dim=1).double()  # binomial: 12 ± 3.3
    assert abs(float(per_row.mean()) / 12 - 1) < 0.02
    assert abs(float(per_row.var()) / 11 - 1) < 0.1


@pytest.mark.parametrize("s", [0, 0.5, -1, math.nan, math.inf, 2**31 + 1, True, None, "sqrt", [3]])
def test_bad_rows_per_nonzero(s: object) -> None:
    with pytest.raises(SubspanError, match=r"s must be a number in \[1, 2\^31\], 'sqrt_d' or"):
        subspan.projection("sparse", out_dim=10, in_dim=2, s=s)
