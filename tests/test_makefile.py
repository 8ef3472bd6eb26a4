"""The Makefile's checks of a machine before it installs, and the source of PyTorch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CPU = "https://download.pytorch.org/whl/cpu"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@pytest.fixture
def make(tmp_path):
    """Run make in a folder where nothing is installed yet."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)

    def run(*words):
        return subprocess.run(["make", "-C", str(tmp_path), *words], capture_output=True, text=True)

    return run


@pytest.mark.parametrize("target", ["demo", "test", "docs"])
def test_only_pytorch_comes_from_another_index(target, make):
    def installs(*words):
        lines = make("-n", target, *words).stdout.replace("\\\n", " ").splitlines()
        return [line.split("constraints.txt")[1].split() for line in lines if " pip " in line]

    plain = installs()
    assert plain[0] == ["torch"]
    assert installs(f"TORCH_INDEX={CPU}") == [["--index-url", CPU, "torch"], *plain[1:]]
    extras = [words[1] for words in plain[1:]]
    further = {"demo": [], "test": ["'.[dev]'"], "docs": ["'.[docs]'"]}
    assert extras == ["'.[lab]'", *further[target]]


def test_an_older_python_is_refused(make, tmp_path):
    python = tmp_path / "python3.9"
    python.write_text(
        "#!/bin/sh\n"
        """exec python3 -c 'import sys; sys.version_info = (3, 9, 2); exec(sys.argv[1])' "$2"\n"""
    )
    python.chmod(0o755)
    said = make("demo", f"PYTHON={python}")
    assert said.returncode != 0
    assert f"subspan needs Python 3.11 or later, and {python} is 3.9: name another" in said.stderr
    assert not (tmp_path / ".venv").exists()
