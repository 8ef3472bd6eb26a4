"""The README's examples run, from the top, in one session."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
GUIDE = README.parent / "docs" / "laboratory.md"


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    exec("".join(blocks), {"__name__": "readme"})
    assert (tmp_path / "model.safetensors").stat().st_size < 2048 + 4 * 200
    assert "dense network" in capsys.readouterr().out


def test_the_guide_to_tasks(tmp_path, monkeypatch):
    """Its task is trained as it says."""
    from subspan.sweeps.sweep import sweep
    from subspan.training.config import Sweep, Training

    [code] = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (tmp_path / "guide_to_tasks.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = Sweep(
        Training(task="guide_to_tasks:waves", epochs=40, batch_size=20), dims=("3", "10"),
        lrs=(0.3,), baseline_lrs=(0.03,),
    )  # fmt: skip
    result = sweep(config, tmp_path / "out", jobs=1)
    assert result["failed"] == []
    assert result["baseline"]["mean_test_score"] < 0.1
    assert result["rows"][1]["mean_test_score"] < 0.1
    assert 3 <= result["d_int"]["hash"]["value"] <= 10
