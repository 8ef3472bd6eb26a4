"""Train in child processes that are killed: ``python -m tests.training.killed OUT HOW SEED KILLS``.

A process of its own, which has imported everything and started no thread, so that it can fork
children at once. It prints how many of them were killed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

# What a training imports on its way, which takes longer than the training itself.
import torch._dynamo
import torch.distributed.fsdp  # noqa: F401

import subspan.kernels.cpu.hash  # noqa: F401
from subspan import files
from subspan.training.train import train
from tests.runs import a_run

RUN = a_run(dim=30, epochs=6, net="mlp-40", patience=5)


def child(out: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Train in a fork; returns its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            prepare()
            train(RUN, out)
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> bool:
    """Wait for it: whether it came to its end; False if it was killed."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0, "a child failed"
    return True


def at_random(out: Path, chance: random.Random, most: int) -> int:
    """SIGKILL at so many moments, in as many runs as that takes; each is then complete."""
    start = time.perf_counter()
    assert ended(child(out / "timed"))
    seconds = time.perf_counter() - start
    kills = runs = 0
    while kills < most:
        while True:
            pid = child(out / f"run{runs}")
            if kills < most:
                time.sleep(chance.uniform(0.02, 0.7) * seconds)
                os.kill(pid, signal.SIGKILL)
            if ended(pid):
                break
            kills += 1
        runs += 1
    return kills


def in_a_write(out: Path, chance: random.Random, most: int) -> int:
    """SIGKILL after a part of a file was written, before it got its name, or just after."""
    kills = 0
    while kills < most:
        writes, where = chance.randrange(1, 25), chance.randrange(3)
        kills += not ended(child(out / "run0", lambda w=writes, h=where: die(w, h)))
        if (out / "run0" / "model.safetensors").exists() and kills < most:
            for file in (out / "run0").iterdir():
                file.unlink()
    assert ended(child(out / "run0"))
    return kills


def die(writes: int, where: int) -> None:
    """At the n-th write of a file: in the middle of it, before the renaming or behind it."""
    real, left = os, [writes]

    class Deadly:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def fsync(self, descriptor: int) -> None:
            left[0] -= 1
            if left[0] == 0 and where == 0:
                real.ftruncate(descriptor, 100)
                real.kill(real.getpid(), signal.SIGKILL)
            real.fsync(descriptor)

        def replace(self, old: str, new: str) -> None:
            if left[0] == 0 and where == 1:
                real.kill(real.getpid(), signal.SIGKILL)
            real.replace(old, new)
            if left[0] == 0:
                real.kill(real.getpid(), signal.SIGKILL)

    files.os = Deadly()  # type: ignore[assignment]


if __name__ == "__main__":
    folder, how, seed, most = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    folder.mkdir(parents=True, exist_ok=True)
    assert ended(child(folder / "whole"))
    how_many = {"at-random": at_random, "in-a-write": in_a_write}[how]
    print(how_many(folder, random.Random(seed), most))
