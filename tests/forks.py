"""Processes that begin at once: forks of a server that has imported PyTorch for all of them.

``multiprocessing`` has one such server for each process of pytest.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Literal, NamedTuple

# What takes longest to import; tests/runs.py adds to it. Nothing of it may start a thread, and
# kernels for the CPU are not among it: forks of a process that has imported these do without.
IMPORTED = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "subspan.adapters",
    "subspan.checkpoint",
    "subspan.optim",
    "pytest",
]
LIMIT = 400  # seconds for a program


class Ended(NamedTuple):
    """The result of a program."""

    returncode: int
    stdout: str
    stderr: str


def server() -> ForkServerContext:
    """The context of :mod:`multiprocessing` whose processes are forks of the server."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    return multiprocessing.get_context("forkserver")


class Program:
    """``python WORDS`` under way: a script or ``-m module`` with its arguments.

    Warnings are errors. What it prints goes through files in the folder ``files``. With a session
    of its own it is the first of a group of processes, as a terminal would make it. The names are
    those of :class:`subprocess.Popen`.
    """

    def __init__(
        self,
        words: Sequence[str],
        where: Path,
        env: Mapping[str, str],
        files: Path,
        warn: Literal["error", "ignore"] = "error",
        *,
        start_new_session: bool = False,
    ) -> None:
        self.words, self.streams = list(words), [files / "stdout", files / "stderr"]
        how = (self.words, where, dict(env), self.streams, warn, start_new_session)
        self.process = server().Process(target=_run, args=how)
        self.process.start()
        self.pid, self.kill, self.terminate = (
            self.process.pid,
            self.process.kill,
            self.process.terminate,
        )

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self.process.exitcode

    def communicate(self, timeout: float = LIMIT) -> tuple[str, str]:
        """Wait for its end; returns what it has printed."""
        self.process.join(timeout)
        if self.poll() is None:
            self.kill()
            raise AssertionError(f"{' '.join(self.words)} has not ended in {timeout} seconds")
        out, err = (stream.read_text() for stream in self.streams)
        return out, err


def python(
    words: Sequence[str],
    where: Path,
    env: Mapping[str, str],
    files: Path,
    warn: Literal["error", "ignore"] = "error",
) -> Ended:
    """Run a :class:`Program` to its end."""
    program = Program(words, where, env, files, warn)
    said = program.communicate()
    return Ended(program.process.exitcode or 0, *said)


def python_code(code: str, folder: Path, **env: str) -> Ended:
    """A program in a folder, which gets its text and what it prints; it must end well."""
    (folder / "program.py").write_text(code)
    ended = python([str(folder / "program.py")], folder, env, folder)
    assert ended.returncode == 0, ended.stderr
    return ended


def _run(
    words: list[str],
    where: Path,
    env: dict[str, str],
    streams: list[Path],
    warn: Any,
    session: bool,
) -> None:
    if session:
        os.setsid()
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(env)
    os.chdir(where)
    warnings.simplefilter(warn)
    module = words[0] == "-m"
    sys.argv = words[module:]
    try:
        if module:
            sys.path.insert(0, str(where))
            sys.modules.pop(words[1], None)  # runpy warns of what is imported already
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        threading._shutdown()  # it ends the workers of joblib, for which multiprocessing waits
