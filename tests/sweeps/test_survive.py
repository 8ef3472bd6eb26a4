"""Sweeps that share a folder, that are killed, stopped or out of room: real processes."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import psutil
import pytest

from subspan import SubspanError, files
from subspan.errors import Stopped
from subspan.sweeps import backends
from subspan.sweeps import folder as module
from subspan.sweeps.folder import SweepFolder
from subspan.sweeps.result import SweepRecord
from subspan.sweeps.runner import KILLED
from subspan.sweeps.running import Running
from subspan.sweeps.sweep import sweep
from subspan.training import locks
from subspan.training import train as trainer
from subspan.training.config import Training
from tests.processes import RUNS, begun, ended, here, start, telling, until
from tests.runs import a_run, a_sweep, contents, record_of, sweep_of

ROOT = Path(__file__).parents[2]


def whole(folder: Path) -> dict:
    """The result of a sweep in which everything is complete, and nothing else is left."""
    result = sweep_of(folder)
    assert (result["status"], result["failed"]) == ("complete", [])
    assert len(result["rows"]) == 1
    assert result["baseline"]
    assert sorted(os.listdir(folder / "runs")) == RUNS
    assert {".locks"} & set(os.listdir(folder)) == set()
    assert not list(folder.rglob("*.tmp"))
    return result


# ---- two sweeps in one folder --------------------------------------------------------------------


def test_two_sweeps_divide_the_work(tmp_path):
    """Each trains one of the two runs; the one that is done first waits, and both tell of both."""
    telling(tmp_path, "wait-hash", "wait-full")
    one = start(tmp_path, "--jobs", 1)
    until(lambda: begun(tmp_path), one)
    two = start(tmp_path, "--jobs", 1)
    until(lambda: len(begun(tmp_path)) == 2, one, two)
    assert begun(tmp_path) == [("hash", one.pid), ("full", two.pid)]
    (tmp_path / "wait-hash").unlink()
    done = tmp_path / "run" / "runs" / RUNS[1]
    until(lambda: (done / "record.json").exists() and record_of(done)["status"] == "complete", one)
    time.sleep(1)
    assert one.poll() is None
    assert sweep_of(tmp_path / "run")["status"] == "running"
    (tmp_path / "wait-full").unlink()
    said = [ended(one), ended(two)]
    assert [(code, err) for code, _, err in said] == [(0, ""), (0, "")]
    assert "waiting for 1 run of another sweep\n" in said[0][1]
    for name in RUNS:
        assert all(f"{name}: validation" in out for _, out, _ in said)
    assert len(begun(tmp_path)) == 2
    whole(tmp_path / "run")


@pytest.mark.slow
def test_a_sweep_takes_over_from_one_that_is_killed(tmp_path):
    telling(tmp_path, "wait-hash")
    one = start(tmp_path, "--jobs", 1)
    until(lambda: begun(tmp_path), one)
    two = start(tmp_path, "--jobs", 1)
    record = tmp_path / "run" / "runs" / RUNS[0] / "record.json"
    until(lambda: record.exists() and record_of(record.parent)["status"] == "complete", one, two)
    one.kill()
    assert ended(one)[0] == -signal.SIGKILL
    (tmp_path / "wait-hash").unlink()
    code, out, err = ended(two)
    assert (code, err) == (0, "")
    assert "waiting for 1 run of another sweep\n" in out
    assert [kind for kind, _ in begun(tmp_path)] == ["hash", "full", "hash"]
    whole(tmp_path / "run")


@pytest.mark.slow
def test_different_configurations_race(tmp_path):
    """One has the folder; the other is refused, and so is one that would replace it."""
    telling(tmp_path, "wait-hash")
    racing = [start(tmp_path, "--jobs", 1, "--dims", dims) for dims in (10, 20)]
    until(lambda: any(one.poll() is not None for one in racing))
    loser, winner = sorted(racing, key=lambda one: one.poll() is None)
    code, out, err = ended(loser)
    assert (code, out) == (2, "")
    assert "run belongs to another configuration (dims" in err
    until(lambda: begun(tmp_path), winner)
    before = sweep_of(tmp_path / "run")
    code, out, err = ended(start(tmp_path, "--dims", 30, "--overwrite"))
    assert (code, out) == (2, "")
    assert "a sweep of another configuration is under way in run: wait for its end" in err
    assert sweep_of(tmp_path / "run") == before
    (tmp_path / "wait-hash").unlink()
    code, _, err = ended(winner)
    assert (code, err) == (0, "")
    assert sweep_of(tmp_path / "run")["status"] == "complete"
    assert len(begun(tmp_path)) == 2


def test_a_run_that_is_trained_without_the_sweep(tmp_path):
    """By a person, or by processes that have lost their sweep: the sweep waits, and takes it."""
    folder, said = tmp_path / "runs" / "hash-dim10-lr0.3-seed0", []
    config = a_sweep(dims=("10",))
    with contextlib.ExitStack() as stack:
        stack.enter_context(locks.lock_folder(folder))

        def say(what):
            said.append(what)
            stack.close()
            trainer.train(a_run(dim="10"), folder)

        result = sweep(config, tmp_path, Running(jobs=1, say=say))
    assert said == ["waiting for 1 run of another sweep"]
    assert (result.status, result.failed, len(result.rows)) == ("complete", [], 1)


@pytest.mark.parametrize(("jobs", "threads"), [(2, 4), (-1, 1), (30, 1)])
def test_threads_do_not_depend_on_what_is_left(jobs, threads, monkeypatch):
    """Eight cores for twenty runs; joblib would divide them by the runs that it is given."""
    monkeypatch.setattr(joblib, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with backends.open_backend(Running(jobs=jobs), Training(), runs=20) as backend:
        assert backend.keywords == {
            "many": 8 if jobs == -1 else jobs,
            "options": {"inner_max_num_threads": threads},
        }
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with backends.open_backend(Running(jobs=jobs), Training(), runs=20) as backend:
        assert backend.keywords["options"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_a_sweep_of_runs_in_two_processes_dies(number, tmp_path):
    """Killed, its run goes on and the next sweep waits for it; stopped twice, all of it ends."""
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "two.py"]
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "src")))
    how = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}}
    folder = tmp_path / "run" / "runs" / "rbd-dim20-lr1-seed0"

    def epochs():
        record = folder / "record.json"
        return len(record_of(folder)["history"]) if record.exists() else 0

    with subprocess.Popen(command, **how) as one:
        until(lambda: epochs() > 1, one)
        family = psutil.Process(one.pid).children(recursive=True)
        assert len(family) >= 3  # torchrun and its two
        assert locks.is_locked(folder / locks.FILE)
        one.send_signal(number)
        if number == signal.SIGTERM:
            time.sleep(0.1)
            one.send_signal(number)
    assert one.returncode != 0
    if number == signal.SIGTERM:
        until(lambda: not any(p.is_running() and p.status() != "zombie" for p in family))
        assert not locks.is_locked(folder / locks.FILE)
    before = epochs()
    said = subprocess.run(command, **how, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert ("waiting for 1 run" in said.stdout) == (number == signal.SIGKILL)
    record = record_of(folder)
    assert (record["status"], record["processes"]) == ("complete", 2)
    assert [row["epoch"] for row in record["history"]] == list(range(1, 41))
    assert before < 40


TWO = """
import sys, time
from pathlib import Path
from torch import nn
from subspan.sweeps.sweep import sweep
from tests.runs import a_sweep

class Paced(nn.Sequential):
    def forward(self, x):
        if self.training:
            time.sleep(0.01)
        return super().forward(x)

def net(input_shape, classes):
    return Paced(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, classes))

if __name__ == "__main__":
    config = a_sweep(net="two:net", methods=("rbd",), dims=("20",), lrs=(1.0,), baseline=None,
                     processes=2, epochs=40)
    try:
        sweep(config, Path("run"), Running(jobs=1, say=print))
    except KeyboardInterrupt:
        sys.exit(1)
"""


def first(*dims, status="running"):
    return SweepRecord(status=status, config={"dims": list(dims)}, baseline=None, rows=[])


def test_a_folder_that_is_shared(tmp_path):
    """By sweeps of one configuration; the last to leave takes the locks with it."""
    one, two, other = (SweepFolder(tmp_path) for _ in range(3))
    with one.join(first(1), overwrite=False):
        with two.join(first(1), overwrite=False):
            with locks.lock_folder(two.run("a")):
                assert one.is_busy("a")
            assert not one.is_busy("a")
            with (
                pytest.raises(SubspanError, match="under way"),
                other.join(first(2), overwrite=True),
            ):
                pass
            two.ask_to_stop()
            assert (one.is_stopping(), two.is_stopping()) == (False, True)
            # A sweep that was interrupted does not take back what another has completed.
            one.write(first(1, status="complete"))
            two.write(first(1, status="interrupted"))
            assert sweep_of(tmp_path)["status"] == "complete"
        assert (tmp_path / module.LOCKS).is_dir()
    assert not (tmp_path / module.LOCKS).exists()
    with other.join(first(2), overwrite=True):
        assert sweep_of(tmp_path)["config"] == {"dims": [2]}


def test_locks_that_are_left_behind(tmp_path):
    """A sweep that was killed holds none of them."""
    out = tmp_path / "run"
    one = SweepFolder(out)
    with one.join(first(1), overwrite=False), locks.lock_folder(one.run(RUNS[1])):
        left = contents(out)
    for name, content in left.items():
        if content is None:
            (out / name).mkdir(exist_ok=True)
        else:
            (out / name).write_bytes(content[0])
    (out / "sweep.json").unlink()
    assert (out / module.LOCKS).exists()
    assert (one.run(RUNS[1]) / locks.FILE).exists()
    sweep(a_sweep(dims=("10",)), out, Running(jobs=1))
    whole(out)


# ---- a worker is killed --------------------------------------------------------------------------


def test_a_killed_worker_is_replaced(tmp_path):
    """Its run is tried again, and so is the one whose process is killed with it; no other is."""
    telling(tmp_path, "wait-hash", "fork-workers")
    one = start(tmp_path, "--jobs", 2, "--dims", "10,20,40,80")
    until(lambda: len(begun(tmp_path)) == 2, one)
    pids = [pid for _, pid in begun(tmp_path)]
    assert one.pid not in pids
    os.kill(pids[0], signal.SIGKILL)
    # The other worker of the pool is killed with it: only then may runs end.
    until(lambda: not any(map(psutil.pid_exists, pids)), one)
    (tmp_path / "wait-hash").unlink()
    code, out, err = ended(one)
    assert (code, err) == (0, "")
    _, _, names = out.partition("a worker process was killed; one at a time, once more: ")
    suspects = {f"hash-dim{dim}-lr0.3-seed0" for dim in (40, 80)}
    assert set(names.splitlines()[0].split(", ")) == suspects
    assert len(begun(tmp_path)) == 5 + 2
    result = sweep_of(tmp_path / "run")
    assert (result["status"], result["failed"], len(result["rows"])) == ("complete", [], 4)


@pytest.mark.slow
def test_a_run_that_kills_its_process_fails_alone(tmp_path):
    telling(tmp_path, "die-full")
    code, out, err = ended(start(tmp_path, "--jobs", 2, "--seeds", 2))
    assert (code, err) == (0, "")
    result = sweep_of(tmp_path / "run")
    assert result["failed"] == [{"run": RUNS[0], "error": KILLED}]
    assert result["status"] == "complete"
    assert result["rows"][0]["seeds"] == [0, 1]
    assert f"failed: {RUNS[0]}: its process was killed twice" in out
    assert [kind for kind, _ in begun(tmp_path)].count("full") == 2
    (tmp_path / "die-full").unlink()
    assert ended(start(tmp_path, "--jobs", 1, "--seeds", 2))[0] == 0
    assert sweep_of(tmp_path / "run")["baseline"]["seeds"] == [0, 1]


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "jobs"),
    [
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow),
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_lets_runs_save(number, jobs, tmp_path):
    """Ctrl-C goes to all processes of the terminal, SIGTERM to the sweep's own."""
    telling(tmp_path, "slow")
    one = start(tmp_path, "--jobs", jobs)
    until(lambda: len(begun(tmp_path)) == jobs, one)
    (os.killpg if number == signal.SIGINT else os.kill)(one.pid, number)
    code, _, err = ended(one)
    assert code == 128 + number
    assert err.startswith("\nsubspan sweep: stopped, 0 of 2 runs are complete; to go on, give the")
    result = sweep_of(tmp_path / "run")
    assert (result["status"], result["failed"]) == ("interrupted", [])
    runs = list((tmp_path / "run" / "runs").iterdir())
    assert len(runs) == jobs
    for run in runs:
        assert record_of(run)["status"] == "interrupted"
        assert (run / "state.pt").exists()
    assert not (tmp_path / "run" / ".locks").exists()
    (tmp_path / "slow").unlink()
    assert here(tmp_path, "--jobs", 1) == 0
    whole(tmp_path / "run")


@pytest.mark.slow
def test_a_second_signal_does_not_wait(tmp_path):
    telling(tmp_path, "wait-hash", "wait-full")
    one = start(tmp_path, "--jobs", 2)
    until(lambda: len(begun(tmp_path)) == 2, one)
    one.terminate()
    time.sleep(2)
    assert one.poll() is None
    one.terminate()
    code, out, err = ended(one)
    assert code == 143
    assert "a second signal does not wait for them" in out
    assert "stopped at once, 0 of 2 runs are complete" in err
    assert sweep_of(tmp_path / "run")["status"] == "interrupted"


# ---- no room -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_stops_all(number, tmp_path, monkeypatch):
    """When a run cannot write, complete ones stay, and no other is tried."""
    done, tried = [], []

    def no_room(_):
        raise OSError(number, os.strerror(number))

    def on_run(outcome, left):
        done.append(outcome.job.name)
        monkeypatch.setattr(files.os, "fsync", no_room)
        monkeypatch.setattr(trainer, "prepare", lambda run: tried.append(run) or prepare(run))
        monkeypatch.setattr(SweepRecord, "write", lambda *_: None)

    prepare = trainer.prepare
    config = a_sweep(dims=("10", "20", "40"))
    words = f"{os.strerror(number)}; 1 of 4 runs are complete and kept: make room"
    with pytest.raises(OSError, match=words) as caught:
        sweep(config, tmp_path, Running(jobs=1, on_run=on_run))
    assert caught.value.errno == number
    assert len(tried) == 1
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob(".locks"))
    assert record_of(tmp_path / "runs" / done[0])["status"] == "complete"
    before = contents(tmp_path / "runs" / done[0])
    result = sweep(config, tmp_path, Running(jobs=1))
    assert (len(result.rows), result.failed) == (3, [])
    assert contents(tmp_path / "runs" / done[0]) == before


@pytest.mark.slow
def test_a_full_disk_in_a_worker(tmp_path):
    """The others save where they are."""
    telling(tmp_path, "slow", "full-disk-full")
    one = start(tmp_path, "--jobs", 2)
    code, _, err = ended(one)
    assert code == 1
    assert "Disk quota exceeded; 0 of 2 runs are complete and kept: make room, and give the" in err
    assert sweep_of(tmp_path / "run")["failed"] == []
    if ("hash") in dict(begun(tmp_path)):
        assert record_of(tmp_path / "run" / "runs" / RUNS[1])["status"] == "interrupted"


def test_an_interrupt_before_a_step(tmp_path, monkeypatch):
    """Where the training itself does not listen, it is told at its first step."""

    def interrupted(run):
        signal.raise_signal(signal.SIGTERM)
        return prepare(run)

    prepare, before = trainer.prepare, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(trainer, "prepare", interrupted)
    with pytest.raises(Stopped, match="stopped, 0 of 3 runs are complete; to go on") as caught:
        sweep(a_sweep(epochs=2), tmp_path, Running(jobs=1))
    assert caught.value.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    [run] = (tmp_path / "runs").iterdir()
    assert record_of(run)["status"] == "interrupted"
    assert (run / "state.pt").exists()
