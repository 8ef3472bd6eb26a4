"""Kernels are found by the files in their folder."""

import importlib
import sys
from pathlib import Path

import pytest

from subspan import kernels

FILE = "from subspan.kernels import Kernel\nKERNELS = {{{family!r}: Kernel({number}, None)}}\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a package, whose modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    folder = tmp_path / "device"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "helpers.py").write_text("X = 1\n")  # serves no family
    (folder / "first.py").write_text(FILE.format(family="toeplitz", number=1))
    yield folder
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_every_file_brings_its_families(package: Path) -> None:
    (package / "second.py").write_text(FILE.format(family="circulant", number=2))
    found = kernels.collect(importlib.import_module("device"))
    assert {family: kernel.matvec for family, kernel in found.items()} == {
        "toeplitz": 1,
        "circulant": 2,
    }


def test_two_files_for_one_family_are_an_error(package: Path) -> None:
    (package / "second.py").write_text(FILE.format(family="toeplitz", number=2))
    with pytest.raises(TypeError, match=r"device\.second has a second kernel for 'toeplitz'"):
        kernels.collect(importlib.import_module("device"))
