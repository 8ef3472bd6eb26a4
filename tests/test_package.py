"""The wheel and the archive of the sources: what they hold, and that they work without a clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import subspan

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_{}(sys.argv[1]))"

pytestmark = pytest.mark.slow


def build(kind: str, sources: Path, out: Path) -> Path:
    """Build a "wheel" or an "sdist" of a folder; nothing is downloaded."""
    command = [sys.executable, "-c", BUILD.format(kind), str(out)]
    said = subprocess.run(command, cwd=sources, capture_output=True, text=True, check=True).stdout
    return out / said.splitlines()[-1]


def files(package: Path) -> set[str]:
    """The files that a wheel installs, without those about itself."""
    return {name for name in zipfile.ZipFile(package).namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is made of: building writes beside it."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", folder / "src", ignore=leave)
    return folder


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", sources, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel, sources):
    there = {path.relative_to(sources / "src") for path in sources.glob("src/subspan/**/*")}
    expected = {path.as_posix() for path in there if (sources / "src" / path).is_file()}
    assert {"subspan/py.typed", "subspan/report/page.html"} < expected
    assert files(wheel) == expected


def test_it_says_its_version_and_license(wheel):
    assert wheel.name == f"subspan-{subspan.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_archive_makes_the_same_wheel(wheel, sources, tmp_path):
    archive = build("sdist", sources, tmp_path)
    shutil.unpack_archive(archive, tmp_path, filter="data")
    [folder] = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert files(build("wheel", folder, tmp_path)) == files(wheel)


def test_installed_in_an_empty_environment_it_sweeps(wheel, tmp_path):
    """The libraries are those of this environment; subspan is the wheel's."""
    run = {"check": True, "capture_output": True, "text": True, "cwd": tmp_path}
    run["env"] = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    home = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], **run)
    python = home / "bin" / "python"
    install = [*("-m", "pip", "--python", python), *("install", "--no-index", "--no-deps", wheel)]
    subprocess.run([sys.executable, *install], **run)
    # A line of a .pth file is a folder, whose own .pth files, as of an editable install, are not
    # read. It comes after what is installed here.
    [packages] = home.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "libraries.pth").write_text("\n".join(others))
    where = subprocess.run([python, "-c", "import subspan; print(subspan.__file__)"], **run).stdout
    assert Path(where.strip()) == packages / "subspan" / "__init__.py"

    sweep = (
        "sweep --net mlp --data digits --methods hash --dims 10,30 --seeds 1 --epochs 1 --out out"
    )
    subprocess.run([home / "bin" / "subspan", *sweep.split()], **run)
    result = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert result["status"] == "complete"
    assert [row["dim"] for row in result["rows"]] == [10, 30]
    assert (tmp_path / "out" / "report.html").is_file()
