"""``benchmarks/scaling.py``: a tiny run, what it writes, and that it goes on where it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import scaling

ROOT = Path(__file__).parents[1]


def run(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.scaling", "--out", str(out), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_points_a_picture_and_nothing_twice(tmp_path):
    words = ["--families", "hash,rademacher", "--most-weights", "1e5", "--seconds", "0.01"]
    said = run(tmp_path, *words)
    assert said.returncode == 0, said.stderr
    record = json.loads((tmp_path / "scaling.json").read_text())
    sizes = [(p["family"], p["out_dim"], p["in_dim"]) for p in record["points"]]
    assert sizes == [
        (f, 10**5, d) for f in ("hash", "rademacher") for d in (10**2, 10**3, 10**4, 10**5)
    ]
    assert all(p["seconds"] > 0 for p in record["points"])
    slow = record["points"][-1]
    assert slow["rows"] < slow["out_dim"]  # 10^10 signs are not counted out in 0.01 s
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    again = run(tmp_path, *words)
    assert "hash          D=" not in again.stdout
    assert json.loads((tmp_path / "scaling.json").read_text()) == record


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


def test_an_unknown_family_is_refused(tmp_path):
    said = run(tmp_path / "out", "--families", "hush")
    assert said.returncode == 2
    assert "unknown family 'hush': one of hash," in said.stderr
    assert not (tmp_path / "out").exists()
