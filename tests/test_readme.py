"""The README's examples run, from the top, in one session."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    exec("".join(blocks), {"__name__": "readme"})
    assert (tmp_path / "model.safetensors").stat().st_size < 2048 + 4 * 200
    assert "dense network" in capsys.readouterr().out
