"""Runs spread by Ray: a cluster on this machine, and what is refused without one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import uuid

import psutil
import pytest

from subspan import SubspanError
from subspan.experiments import reproduce
from subspan.sweeps import cluster
from subspan.sweeps.running import Running
from subspan.sweeps.sweep import sweep
from subspan.training.config import Training
from tests.processes import RUNS, begun, ended, here, start, telling, until
from tests.runs import SWEEP, a_sweep, record_of, sweep_of


@pytest.fixture
def nobody():
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_an_address_that_does_not_answer(nobody, cli, in_tmp_path):
    said = cli(*SWEEP, "--backend", "ray", "--ray-address", nobody)
    assert (said.code, said.out) == (2, "")
    assert f"no Ray answers at {nobody} ([Errno 111] Connection refused): give the host" in said.err
    said = cli(*SWEEP, "--backend", "ray", "--ray-address", "nonsense")
    assert (said.code, said.out) == (2, "")
    assert "no Ray answers at nonsense (Invalid address format: nonsense): give the" in said.err
    assert not (in_tmp_path / "run").exists()


def test_what_is_refused(cli, in_tmp_path, monkeypatch):
    said = cli(*SWEEP, "--ray-address", "here:1")
    assert said.code == 2
    assert "--ray-address here:1 is for --backend ray, got --backend loky: give ray, or" in said.err
    said = cli(*SWEEP, "--backend", "dask")
    assert said.code == 2
    assert "backend must be one of ['loky', 'ray'], got dask" in said.err
    with pytest.raises(SubspanError, match="unknown backend 'dask': known are loky, ray"):
        sweep(a_sweep(), in_tmp_path / "run", Running(backend="dask"))
    for name in ("dlrt-timing", "minut-sparse-benchmark"):
        with pytest.raises(SubspanError, match=f"{name} measures times: on this machine alone"):
            reproduce(name, in_tmp_path / "run", Running(backend="ray"))
    monkeypatch.setitem(sys.modules, "ray", None)
    said = cli(*SWEEP, "--backend", "ray")
    assert said.code == 2
    assert "--backend ray needs Ray: pip install 'subspan[ray]'" in said.err
    assert not (in_tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("there", "device", "jobs", "many", "each"),
    [
        ({"CPU": 8.0}, "auto", -1, 8, {"scheduling_strategy": "SPREAD"}),
        ({"CPU": 8.0, "GPU": 4.0}, "cpu", 3, 3, {"scheduling_strategy": "SPREAD"}),
        ({"CPU": 8.0, "GPU": 4.0}, "auto", -1, 4, {"num_gpus": 1, "num_cpus": 0}),
        ({"CPU": 1.0}, "cpu", -1, 1, {"scheduling_strategy": "SPREAD"}),
        (
            {"CPU": 8.0},
            "cpu",
            9,
            None,
            "has 8 CPUs and 0 GPUs; expected at least 9 CPUs",
        ),
        ({"CPU": 8.0, "GPU": 2.0}, "auto", 3, None, "and 2 GPUs; expected at least 3 GPUs"),
        ({}, "cpu", -1, None, "has 0 CPUs and 0 GPUs; expected at least 1 CPUs"),
    ],
)
def test_a_run_for_each_core_or_gpu(there, device, jobs, many, each, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    if many is None:
        with pytest.raises(SubspanError, match=each):
            cluster.reserve(Training(device=device), jobs)
        return
    assert cluster.reserve(Training(device=device), jobs) == (many, each)


@pytest.mark.slow
def test_the_same_as_without(tmp_path):
    """In processes of Ray's; the same seeds, rates and accuracies."""
    telling(tmp_path)
    one = start(tmp_path, "--backend", "ray", "--jobs", 2)
    code, out, err = ended(one)
    assert (code, err) == (0, "")
    assert "raylet" not in out
    assert sorted(kind for kind, _ in begun(tmp_path)) == ["full", "hash"]
    assert one.pid not in {pid for _, pid in begun(tmp_path)}
    assert here(tmp_path, "--jobs", 1, "--out", "other") == 0
    ours, theirs = sweep_of(tmp_path / "run"), sweep_of(tmp_path / "other")
    assert ours["status"] == "complete"
    for a, b in zip(
        [ours["baseline"], *ours["rows"]], [theirs["baseline"], *theirs["rows"]], strict=True
    ):
        for key in ("method", "dim", "lr", "seeds", "test_score", "val_score", "tried_lrs"):
            assert a[key] == b[key]
    for name in RUNS:
        files = [tmp_path / out / "runs" / name / "model.safetensors" for out in ("run", "other")]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_a_process_that_is_killed(tmp_path):
    """The run is tried again, once, and alone; the other goes on."""
    telling(tmp_path, "die-full")
    code, out, _ = ended(start(tmp_path, "--backend", "ray", "--jobs", 2, "--seeds", 2))
    assert code == 0
    result = sweep_of(tmp_path / "run")
    [failure] = result["failed"]
    assert failure["run"] == RUNS[0]
    assert "its process was killed twice" in failure["error"]
    assert result["rows"][0]["seeds"] == [0, 1]
    assert f"a worker process was killed; one at a time, once more: {RUNS[0]}" in out
    assert [kind for kind, _ in begun(tmp_path)].count("full") == 2


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_signal(jobs, tmp_path):
    telling(tmp_path, "slow")
    one = start(tmp_path, "--backend", "ray", "--jobs", jobs)
    until(lambda: len(begun(tmp_path)) == jobs, one)
    os.killpg(one.pid, signal.SIGINT)
    code, _, err = ended(one)
    assert code == 130
    assert "stopped, 0 of 2 runs are complete; to go on, give the same command again" in err
    runs = list((tmp_path / "run" / "runs").iterdir())
    assert [record_of(run)["status"] for run in runs] == ["interrupted"] * jobs
    assert all((run / "state.pt").exists() for run in runs)
    until(lambda: not any(psutil.pid_exists(pid) for _, pid in begun(tmp_path)))


@pytest.mark.slow
def test_a_cluster_that_is_joined(nobody, tmp_path, monkeypatch):
    """It is there before and afterwards, and takes nobody without its token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex)
    telling(tmp_path)
    (tmp_path / "extra.py").write_text(EXTRA)
    port = nobody.partition(":")[2]
    head = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            "--port",
            port,
            "--num-cpus",
            "2",
            "--include-dashboard",
            "false",
            "--disable-usage-stats",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: answers(nobody), head)
        for _ in range(2):
            words = ("--backend", "ray", "--ray-address", nobody, "--jobs", 2, "--seeds", 2)
            assert ended(start(tmp_path, *words, "--import", "extra"))[0] == 0
            assert head.poll() is None
        said = ended(start(tmp_path, *words[:-4], "--jobs", 3, "--out", "other"))
        assert said[0] == 2
        assert "has 2 CPUs and 0 GPUs; expected at least 3 CPUs, one for each" in said[2]
    finally:
        head.terminate()
        head.wait(30)
    assert sweep_of(tmp_path / "run")["status"] == "complete"
    imported = {int(line) for line in (tmp_path / "imported").read_text().splitlines()}
    assert imported > {pid for _, pid in begun(tmp_path)}


EXTRA = """
import os
from pathlib import Path

with open(Path(__file__).parent / "imported", "a") as file:
    file.write(f"{os.getpid()}\\n")
"""


def answers(address):
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port))).close()
    except OSError:
        return False
    return True
