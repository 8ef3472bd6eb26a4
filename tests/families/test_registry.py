"""Making a projection by name, and what is refused."""

from dataclasses import dataclass

import pytest

import subspan
from subspan import Projection, SubspanError
from subspan.families import registry
from tests.reference import DOMAINS


def test_the_families() -> None:
    assert list(subspan.projections()) == sorted([*DOMAINS, "stored"])
    for name, family in subspan.projections().items():
        p = subspan.projection(name, out_dim=9, in_dim=2, seed=1, stream=2)
        assert type(p) is family
        assert (p.family, p.out_dim, p.in_dim, p.seed, p.stream) == (name, 9, 2, 1, 2)
        assert family.__doc__
        assert "\n" not in family.__doc__.split("\n\n")[0]  # a summary of one line, for tables


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_dim": 0}, r"^in_dim must be an integer in \[1, 2147483647\], got 0$"),
        ({"in_dim": -3}, "^in_dim must be an integer"),
        ({"in_dim": 2.0}, "^in_dim must be an integer"),
        ({"in_dim": True}, "^in_dim must be an integer"),
        ({"in_dim": "2"}, "^in_dim must be an integer"),
        ({"in_dim": 10}, "dimension d=10 does not fit in D=9 weights; use d <= 9$"),
        ({"out_dim": 0}, "^out_dim must be an integer"),
        ({"out_dim": 2**40 + 1}, "^out_dim must be an integer"),
        ({"seed": -1}, "^seed must be an integer"),
        ({"seed": 1 << 64}, "^seed must be an integer"),
        ({"stream": 1 << 24}, "^stream must be an integer"),
        ({"s": 3}, "^projection 'hash' has no options, got 's'$"),
        ({"name": "hsh"}, "^unknown projection 'hsh': did you mean hash"),
        ({"name": "sparse", "t": 3}, "^unknown option of projection 'sparse' 't': known are s$"),
        ({"name": None}, "^unknown projection 'None'"),
    ],
)
def test_refusals(arguments: dict[str, object], message: str) -> None:
    values = {"name": "hash", "out_dim": 9, "in_dim": 2} | arguments
    with pytest.raises(SubspanError, match=message):
        subspan.projection(**values)


def test_a_name_is_taken_once() -> None:
    with pytest.raises(TypeError, match="'hash' is registered already"):

        @dataclass(frozen=True)
        class Again(Projection, family="hash"):
            pass

    assert registry.FAMILIES["hash"].__name__ == "Hash"
