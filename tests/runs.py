"""Runs that take a second, the command line in this process, and what a folder holds.

The rooms whose tests want the fixtures import them in their ``conftest.py``.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from subspan.cli import main
from tests import forks

forks.IMPORTED += [
    "matplotlib.figure",
    "sklearn.datasets",
    "subspan.cli",
    "subspan.commands.train",
    "subspan.training.train",
]

NET = "mlp-8"  # 64-8-10 on digits: 610 weights
WEIGHTS = 610
TRAIN = ["train", "--net", NET, "--epochs", "1", "--dim", "5", "--out", "run"]
SWEEP = ["sweep", "--net", NET, "--epochs", "1", "--dims", "5", "--jobs", "1", "--out", "run"]
STEPS = 11  # of an epoch: 1318 images in batches of 128


class Said(NamedTuple):
    """The result of a command."""

    code: int
    out: str
    err: str


Cli = Callable[..., Said]


@pytest.fixture(scope="session", autouse=True)
def cache_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Images are decoded once for all processes of pytest-xdist, into no cache of the user's."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUBSPAN_CACHE", str(base / "cache"))
        yield


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder; networks that are imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command line as a terminal would, here: ``cli("train", "--net", …)``."""

    def run(*argv: object) -> Said:
        capsys.readouterr()
        try:
            code = main([str(word) for word in argv])
        except SystemExit as end:  # of --help
            code = int(end.code or 0)
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Make Ctrl-C work as in a terminal, also where tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, cache_once: None) -> Path:
    """The folder of a run that is complete: hash, d = 40, two epochs. Copy it to change it."""
    from subspan.training.train import train

    out = tmp_path_factory.mktemp("trained") / "run"
    train(a_run(dim=40, epochs=2), out)
    return out


def a_run(method: str = "hash", *, lr: float = 0.3, seed: int = 0, **settings: Any) -> Any:
    """A :class:`Run`; settings are the training's, and what is none of these the method's."""
    from subspan.training.config import Run, Training

    fields = Training.__dataclass_fields__
    training = {"net": NET, "epochs": 1} | {k: v for k, v in settings.items() if k in fields}
    options = {k: v for k, v in settings.items() if k not in fields}
    return Run(Training(**training), method, options, lr, seed)


def a_sweep(**settings: Any) -> Any:
    """A :class:`Sweep`, likewise; a run of it takes a second or less."""
    from subspan.training.config import Sweep, Training

    fields = Training.__dataclass_fields__
    training = {"net": NET, "epochs": 1} | {k: v for k, v in settings.items() if k in fields}
    rest = {"lrs": (0.3,), "baseline_lrs": (0.01,), "dims": ("10", "40")}
    rest |= {k: v for k, v in settings.items() if k not in fields}
    return Sweep(Training(**training), **rest)


def copied(folder: Path, to: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(folder, to)
    return to


def record_of(folder: Path) -> dict[str, Any]:
    """``record.json``."""
    return json.loads((folder / "record.json").read_text())


def sweep_of(folder: Path) -> dict[str, Any]:
    """``sweep.json``."""
    return json.loads((folder / "sweep.json").read_text())


def train_up_to(step: int, run: Any, out: Path) -> None:
    """Train, and fail after this step, of which the state on disk need not know yet."""
    from subspan.training.train import train

    steps = itertools.count(1)

    def fail() -> None:
        if next(steps) == step:
            raise OSError("power failure")

    with pytest.raises(OSError, match="power failure"):
        train(run, out, on_step=fail)


def contents(folder: Path) -> dict[str, Any]:
    """Everything in a folder: the bytes and the time of change of each file."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }
