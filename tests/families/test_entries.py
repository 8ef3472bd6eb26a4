"""Entries of every family against docs/format.md and the golden files."""

import json
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import subspan
from subspan.families import Projection
from subspan.philox import Source
from tests.golden.write import PATH
from tests.reference import DOMAINS, ROUNDED, Matrix

MEANING = (
    "a random number has changed: every model that was stored as a seed and its coordinates comes "
    "out wrong. If that is meant, docs/format.md and the format version of checkpoints change too"
)
GOLDEN: dict[str, list[dict[str, Any]]] = json.loads(PATH.read_text())


def make(case: dict[str, Any]) -> Projection:
    """The projection of a golden case, and its float64 rows."""
    return subspan.projection(
        case["family"],
        **{name: case[name] for name in ("out_dim", "in_dim", "seed", "stream")},
        **case["options"],
    )


def assert_entries(P: torch.Tensor, expected: torch.Tensor, family: str) -> None:
    if family in ROUNDED:
        torch.testing.assert_close(P, expected, rtol=1e-10, atol=1e-14, msg=MEANING)
    else:
        assert torch.equal(P, expected), MEANING


@pytest.mark.parametrize("case", GOLDEN["projections"], ids=lambda case: f"{case['family']}")
def test_golden_entries(case: dict[str, Any]) -> None:
    rows = range(case["start"], case["start"] + len(case["entries"]))
    P = make(case).dense(step=case["step"], rows=rows)
    expected = [[float.fromhex(entry) for entry in row] for row in case["entries"]]
    assert_entries(P, torch.tensor(expected, dtype=torch.float64), case["family"])


@pytest.mark.parametrize("case", GOLDEN["weights"])
def test_golden_weights_of_hash_to_the_bit(case: dict[str, Any]) -> None:
    p = make(case | {"family": "hash", "options": {}})
    w = 1 / torch.arange(1, p.in_dim + 1).float()
    rows = range(case["start"], case["start"] + len(case["weights"]))
    weights = p.matvec(w, step=case["step"], rows=rows).tolist()
    assert [struct.pack(">f", x).hex() for x in weights] == case["weights"], MEANING


@pytest.mark.parametrize("case", GOLDEN["numbers"])
def test_golden_numbers(case: dict[str, Any]) -> None:
    source = Source(case["seed"], case["domain"], case["stream"])
    start, stop = case["start"], case["start"] + len(case["words"])
    where: Any = {"column": case["column"], "step": case["step"]}
    words = source.sequence(start, stop, **where).tolist()
    assert [f"{word:08x}" for word in words] == case["words"], MEANING
    assert source.signbits(start, stop, **where).tolist() == case["signbits"], MEANING
    integers = source.integers(start, stop, 1000, **where).tolist()
    assert integers == case["integers_below_1000"], MEANING
    uniforms = source.uniforms(start, stop, **where).tolist()
    assert [u.hex() for u in uniforms] == case["uniforms"], MEANING
    normals = source.normals(start, stop, dtype=torch.float64, **where).tolist()
    expected = [float.fromhex(z) for z in case["normals"]]
    assert normals == pytest.approx(expected, rel=1e-12), MEANING
    for size, images in case["permutations"].items():
        ours = source.permutation(int(size), **where)(torch.arange(len(images)))
        assert ours.tolist() == images, MEANING


def test_every_family_has_golden_entries_and_a_domain_of_its_own() -> None:
    drawn = {name: family for name, family in subspan.projections().items() if name != "stored"}
    assert {name: family.domain for name, family in drawn.items()} == DOMAINS
    assert len(set(DOMAINS.values())) == len(DOMAINS)
    assert {case["family"] for case in GOLDEN["projections"]} == set(DOMAINS)


@pytest.mark.parametrize("family", DOMAINS)
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_entries_follow_the_format(family: str, data: st.DataObject) -> None:
    d = data.draw(st.integers(1, 9), "d")
    D = data.draw(st.integers(d, 70), "D")
    seed = data.draw(st.integers(0, 2**64 - 1), "seed")
    stream = data.draw(st.integers(0, 2**24 - 1), "stream")
    step = data.draw(st.integers(0, 2**32 - 1), "step")
    start = data.draw(st.integers(0, D - 1), "start")
    rows = range(start, min(D, start + 5))
    options: dict[str, Any] = {}
    if family == "sparse":
        s = st.one_of(st.floats(1, 2**31), st.floats(1, 9), st.sampled_from(["sqrt_d", "sqrt_D"]))
        options = {"s": data.draw(s, "s")}
    p = subspan.projection(family, out_dim=D, in_dim=d, seed=seed, stream=stream, **options)
    if family == "sparse2full":
        options = {"s": "sqrt_d"}
    reference = Matrix(family, D, d, seed, stream, step, **options)
    expected = [[reference.entry(i, j) for j in range(d)] for i in rows]
    P = p.dense(step=step, rows=rows)
    assert_entries(P, torch.tensor(expected, dtype=torch.float64), family)
