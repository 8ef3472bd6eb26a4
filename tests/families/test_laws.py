"""Every registered family, at every size and with its options, held to every law."""

from typing import Any

import pytest

import subspan
from subspan import Projection
from tests import laws, reference

# One weight; one coordinate; as many coordinates as weights; a prime number of weights; blocks of
# every family whole and cut short.
SIZES = [(1, 1), (131, 1), (23, 23), (509, 20), (300, 70)]

OPTIONS: dict[str, list[dict[str, Any]]] = reference.OPTIONS | {
    "sparse": [{}, {"s": 1}, {"s": 2.6}, {"s": "sqrt_d"}, {"s": "sqrt_D"}],
    "sparse2full": [{}],
    "stored": [{}, {"of": "sparse", "layout": "csr"}],
}

# What the operator does to a projection is the same for all its options, and nearly so for every
# family: one with kernels for updates, one of independent entries, and one that computes all rows.
QUICK = ("hash", "gaussian", "orthogonal")
OPERATOR = (
    laws.products_are_differentiable_twice,
    laws.the_operator_is_well_made,
    laws.a_step_that_changes_does_not_recompile,
)

EXEMPT = {
    # All entries are positive: their mean is not 0, and any two weights move together.
    (laws.no_direction_is_preferred, "sparse2"),
}


def marks(law: laws.Law, family: str) -> tuple[Any, ...]:
    if law not in OPERATOR:
        return ()
    return (pytest.mark.heavy, *(() if family in QUICK else (pytest.mark.slow,)))


def cases(sizes: list[tuple[int, int]], held_to: list[laws.Law]) -> list[Any]:
    """All families times sizes times laws; of further options only some."""
    found = []
    for family in subspan.projections():
        for number, options in enumerate(OPTIONS.get(family, [{}])):
            for out_dim, in_dim in sizes[-2:] if number else sizes:
                p = subspan.projection(
                    family, out_dim=out_dim, in_dim=in_dim, seed=7 << 32, stream=3, **options
                )
                label = "-".join([family, *map(str, options.values()), f"{out_dim}x{in_dim}"])
                found += [
                    pytest.param(
                        law,
                        p,
                        id=f"{law.__name__}-{label}",
                        marks=marks(law, family),
                    )
                    for law in held_to
                    if (law, family) not in EXEMPT and not (number and law in OPERATOR)
                ]
    return found


@pytest.mark.parametrize(("law", "p"), cases(SIZES, laws.LAWS))
def test_law(law: laws.Law, p: Projection) -> None:
    law(p)


@pytest.mark.parametrize(("law", "p"), cases(SIZES[-1:], laws.COSTLY))
def test_costly_law(law: laws.Law, p: Projection) -> None:
    law(p)
