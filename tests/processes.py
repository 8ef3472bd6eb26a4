"""Sweeps in processes of their own, of a network that tells what it does and can be told to wait.

The network is in the current folder of the command, where also the files are by which it is told.
It knows the baseline, which trains its parameters, from a run in a subspace, which takes them away.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from subspan.cli import main
from tests.forks import Program

NET = '''
import errno, os, signal, time
from pathlib import Path
from torch import nn

here = Path(__file__).parent
if (here / "fork-workers").exists():
    from tests.processes import fork_workers

    fork_workers()


class Net(nn.Sequential):
    """``begun`` gets a line for each training: "kind pid"; files are commands."""

    def forward(self, x):
        if self.training and not hasattr(self, "begun"):
            self.begun = kind = "hash" if "subspan_global" in self._parameters else "full"
            with open(here / "begun", "a") as file:
                file.write(f"{kind} {os.getpid()}\\n")
            if (here / f"die-{kind}").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            if (here / f"full-disk-{kind}").exists():
                raise OSError(errno.EDQUOT, "Disk quota exceeded")
            while (here / f"wait-{kind}").exists():
                time.sleep(0.01)
        if self.training and (here / "slow").exists():
            time.sleep(0.3)
        return super().forward(x)


def net(classes):
    return Net(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, classes))
'''
SWEEP = [
    "sweep",
    "--net",
    "telling:net",
    "--epochs",
    "3",
    "--dims",
    "10",
    "--lrs",
    "0.3",
    "--baseline_lrs",
    "0.01",
    "--out",
    "run",
]
RUNS = ["full-lr0.01-seed0", "hash-dim10-lr0.3-seed0"]


def telling(folder: Path, *commands: str) -> None:
    """Put the network into a folder, and what it is told."""
    (folder / "telling.py").write_text(NET)
    for command in commands:
        (folder / command).touch()


def start(folder: Path, *words: object) -> Program:
    """A sweep of two runs, in a process group of its own as a terminal would make it."""
    # Also of the processes that it starts. The server of forks may be older than what Ray is told.
    env = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    return Program(
        ["-m", "subspan.cli", *SWEEP, *map(str, words)],
        folder,
        env | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"},
        Path(tempfile.mkdtemp(dir=folder)),
        start_new_session=True,
    )


def fork_workers() -> None:
    """Let joblib's workers be forks, which import nothing anew, in a process without threads."""
    from joblib.externals.loky.backend.context import set_start_method

    warnings.filterwarnings("ignore", "`fork` start method")
    set_start_method("fork", force=True)


def here(folder: Path, *words: object) -> int:
    """The same sweep in this process, for what needs no other one; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        try:
            return main([*SWEEP, *map(str, words)])
        finally:
            sys.modules.pop("telling", None)  # which is in another folder for another test


def begun(folder: Path) -> list[tuple[str, int]]:
    """The trainings so far: the kind and the process of each."""
    file = folder / "begun"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(kind, int(pid)) for kind, pid in (line.split() for line in lines)]


def until(what: Callable[[], object], *sweeps: Program) -> None:
    """Wait for something while sweeps live."""
    end = time.monotonic() + 90
    while not what():
        for sweep in sweeps:
            assert sweep.poll() is None, sweep.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def ended(sweep: Program) -> tuple[int, str, str]:
    """How a sweep ended, and that it left no process behind."""
    try:
        out, err = sweep.communicate(timeout=90)
    finally:
        left = of_group(sweep.pid)
        if left:
            os.killpg(sweep.pid, signal.SIGKILL)
    assert not left
    return sweep.poll(), out, err


def of_group(group: int) -> list[psutil.Process]:
    """The processes of a group, a second after its first has ended."""
    end = time.monotonic() + 5
    while True:
        left = [p for p in psutil.process_iter() if in_group(p, group)]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.05)


def in_group(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
