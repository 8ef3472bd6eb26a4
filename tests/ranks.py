"""Processes of one group: they go through a module's ``SCENARIOS``, or run one program."""

from __future__ import annotations

import datetime
import importlib
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import forks

LIMIT = 400  # seconds for all ranks together


def _work(rank: int, world: int, module: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    scenarios = importlib.import_module(module).SCENARIOS
    torch.save({name: run(rank, world) for name, run in scenarios.items()}, f"{rank}.pt")
    os._exit(0)  # no farewell: its peers may be waiting


def go_through(module: str, world: int, folder: Path) -> list[dict[str, Any]]:
    """Return the observations of every rank, by scenario.

    Scenarios are called with the rank and the number of ranks, in a folder that all share; one in
    which a rank ends must be the last.
    """
    forks.server()
    processes = torch.multiprocessing.start_processes(
        _work, (world, module, str(folder)), nprocs=world, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + LIMIT
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def start(words: list[str], world: int, folder: Path) -> list[forks.Program]:
    """So many times ``python WORDS`` in a folder, in the environment that torchrun makes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "TORCHELASTIC_RESTART_COUNT": 0}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "GROUP_RANK": 0}
    programs = []
    for rank in range(world):
        own = env | {"RANK": rank, "LOCAL_RANK": rank, "ROLE_RANK": rank}
        texts = {name: str(value) for name, value in own.items()}
        said = Path(tempfile.mkdtemp(dir=folder))
        programs.append(forks.Program(words, folder, texts, said, "ignore"))
    return programs
