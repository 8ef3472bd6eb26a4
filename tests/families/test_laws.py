"""Every registered family, at every size and with its options, held to every law."""

from typing import Any

import pytest

import subspan
from subspan import Projection
from tests import laws

# One weight; one coordinate; as many coordinates as weights; a prime number of weights; blocks of
# every family whole and cut short.
SIZES = [(1, 1), (131, 1), (23, 23), (509, 20), (300, 70)]

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "sparse": [{}, {"s": 1}, {"s": 2.6}, {"s": "sqrt_d"}, {"s": "sqrt_D"}],
    "stored": [{}, {"of": "sparse", "layout": "csr"}],
}

EXEMPT = {
    # All entries are positive: their mean is not 0, and any two weights move together.
    (laws.no_direction_is_preferred, "sparse2"),
}


def cases(sizes: list[tuple[int, int]], held_to: list[laws.Law]) -> list[Any]:
    """All families with their options, times sizes, times laws."""
    return [
        pytest.param(
            law,
            subspan.projection(
                family, out_dim=out_dim, in_dim=in_dim, seed=7 << 32, stream=3, **options
            ),
            id="-".join([law.__name__, family, *map(str, options.values()), f"{out_dim}x{in_dim}"]),
        )
        for family in subspan.projections()
        for options in OPTIONS.get(family, [{}])
        for out_dim, in_dim in sizes
        for law in held_to
        if (law, family) not in EXEMPT
    ]


@pytest.mark.parametrize(("law", "p"), cases(SIZES, laws.LAWS))
def test_law(law: laws.Law, p: Projection) -> None:
    law(p)


@pytest.mark.parametrize(("law", "p"), cases(SIZES[-1:], laws.COSTLY))
def test_costly_law(law: laws.Law, p: Projection) -> None:
    law(p)
