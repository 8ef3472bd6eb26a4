"""``benchmarks/scaling.py``: a tiny run, what it writes, and that it goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import scaling

import subspan
from tests.forks import Ended, python

ROOT = Path(__file__).parents[2]


def run(out: Path, *words: str) -> Ended:
    return python(["-m", "benchmarks.scaling", "--out", str(out), *words], ROOT, {}, out.parent)


@pytest.mark.slow
def test_points_a_picture_and_nothing_twice(tmp_path):
    words = ["--families", "hash,rademacher", "--most-weights", "1e5", "--seconds", "0.01"]
    out = tmp_path / "out"
    said = run(out, *words)
    assert said.returncode == 0, said.stderr
    record = json.loads((out / "scaling.json").read_text())
    sizes = [(p["family"], p["out_dim"], p["in_dim"]) for p in record["points"]]
    assert sizes == [
        (f, 10**5, d) for f in ("hash", "rademacher") for d in (10**2, 10**3, 10**4, 10**5)
    ]
    assert all(p["seconds"] > 0 for p in record["points"])
    slow = record["points"][-1]
    assert slow["rows"] < slow["out_dim"]  # 10^10 signs are not counted out in 0.01 s
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
    again = run(out, *words)
    assert "hash          D=" not in again.stdout
    assert json.loads((out / "scaling.json").read_text()) == record


def test_exponents_are_those_of_the_law():
    points = [
        {"out_dim": D, "in_dim": d, "seconds": 1e-6 * D * d**0.5}
        for D in (10**5, 10**6, 10**7)
        for d in (10**2, 10**4)
    ]
    assert scaling.exponents(points) == pytest.approx((1, 0.5))
    assert scaling.exponents(points[:3]) is None  # too few
    fast = [point | {"seconds": 1e-5} for point in points]
    assert scaling.exponents(fast) is None  # overheads


# ---- against adding ------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Vectors of 2,000 numbers, pieces of 1,000."""
    monkeypatch.setattr(scaling, "VECTOR", 2000)
    monkeypatch.setattr(scaling, "PIECE", 1000)
    monkeypatch.setattr(scaling, "ADDING_WEIGHTS", (1500, 4500))
    monkeypatch.setattr(scaling, "ADDING_DIMS", (10, 100))
    monkeypatch.setattr(scaling, "LINEAR", (1500, 4500))


def test_vectors_that_are_gone_over_again_are_whole_ones():
    """Numbers added and rows multiplied are as many as if they were there at once."""
    a = torch.zeros(2000)
    scaling.add(a, torch.ones(2000), 4500)
    assert a.sum() == 4500
    p, g = subspan.projection("hash", out_dim=4500, in_dim=10), torch.randn(2000)
    whole = torch.cat((g, g, g[:500]))
    torch.testing.assert_close(scaling.backward(p, g), p.rmatvec(whole))
    assert scaling.pieces(4500, 2000) == [range(2000), range(2000, 4000), range(4000, 4500)]


def test_products_against_adding(small, tmp_path, capsys):
    record = {"machine": {"device": "a processor"}}
    scaling.measure_adding(record, tmp_path / "scaling.json", 1e-3, 1e9)
    first, second = record["adding"]
    assert [first["out_dim"], second["out_dim"]] == [1500, 4500]
    assert list(first["dims"]) == ["10", "100"]
    assert set(first["dims"]["10"]) == {"forward", "backward", "new"}
    # A new vector would be too large; the smaller D takes turns with the larger one.
    small = {f"{way}-small{drawn}" for way in ("forward", "backward") for drawn in ("", "-drawn")}
    assert set(second["dims"]["10"]) == {"forward", "backward"} | small
    for row in record["adding"]:
        for timing in (row["add"], *row["dims"]["10"].values(), *row["dims"]["100"].values()):
            assert 0 < timing["low"] <= timing["median"] <= timing["high"] < 1
    assert json.loads((tmp_path / "scaling.json").read_text()) == record
    assert (tmp_path / "adding.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    of_100 = second["dims"]["100"]
    times = of_100["backward-small"]["median"], of_100["backward-small-drawn"]["median"]
    kept, drawn = (
        f"{of_100['backward']['median'] / time / 3:.2f} times as long as one of 1,500"
        for time in times
    )
    assert f"Pᵀ g, d = 100: a weight of 4,500 takes {kept}, {drawn} without a kept index" in said
    line = next(line for line in said.splitlines() if line.split()[:3] == ["4,500", "10", "P"])
    time, whole = second["dims"]["10"]["forward"]["median"], second["add"]["median"]
    assert line.split()[4:] == [f"{1e9 * time / 4500:.3f}", f"{time / whole:.2f}"]
    left = scaling.draw_adding(record["adding"], "a processor").axes[0].lines[0]
    assert left.get_ydata()[1] == pytest.approx(time / whole)


def test_adding_goes_on_where_it_was(small, tmp_path, monkeypatch):
    record = {"machine": {"device": "a processor"}}
    scaling.measure_adding(record, tmp_path / "scaling.json", 1e-3, 2000)
    assert [row["out_dim"] for row in record["adding"]] == [1500]
    before = record["adding"][0]
    scaling.measure_adding(record, tmp_path / "scaling.json", 1e-3, 1e9)
    assert [row["out_dim"] for row in record["adding"]] == [1500, 4500]
    assert record["adding"][0] is before


def test_an_unknown_part_is_refused(tmp_path):
    said = run(tmp_path / "out", "--parts", "add")
    assert said.returncode == 2
    assert "unknown part 'add': one of families, adding" in said.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_family_is_refused(tmp_path):
    said = run(tmp_path / "out", "--families", "hush")
    assert said.returncode == 2
    assert "unknown family 'hush': one of hash," in said.stderr
    assert not (tmp_path / "out").exists()
