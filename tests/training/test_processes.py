"""One run in several processes, by either launcher: one process on the joint batch, to rounding.

On CPUs, with Gloo; everything of accelerate and torch that is in between is the same on GPUs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from subspan import SubspanError, checkpoint
from subspan.sweeps.running import Running
from subspan.sweeps.sweep import sweep
from subspan.training import state
from subspan.training.config import Run
from subspan.training.evaluate import evaluate_checkpoint
from subspan.training.train import train
from tests import ranks
from tests.forks import Program, python
from tests.runs import STEPS, a_run, a_sweep, contents, record_of, train_up_to
from tests.training.test_resume import measured
from tests.training.test_trackers import has_all
from tests.training.together import RUNS

ROOT = Path(__file__).parents[2]


def command(launcher: str, processes: int, *words: object) -> list[str]:
    """A launcher's command line; to accelerate several processes are "multi_gpu", GPUs or not."""
    start = {
        "torchrun": ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"],
        "accelerate": [
            "accelerate.commands.launch",
            "--multi_gpu",
            f"--num_processes={processes}",
            "--num_machines=1",
            "--mixed_precision=no",
            "--dynamo_backend=no",
            "--main_process_port=0",
        ],
    }[launcher]
    return [sys.executable, "-m", *start, "-m", *map(str, words)]


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def launched(folder: Path, launcher: str, processes: int, *words: object) -> str:
    said = python(
        command(launcher, processes, *words)[1:],
        folder,
        environment(folder),
        Path(tempfile.mkdtemp(dir=folder)),
        "ignore",  # what launchers warn of is theirs
    )
    assert said.returncode == 0, said.stderr
    return said.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs in this process."""
    out = tmp_path_factory.mktemp("alone")
    for name, run in RUNS.items():
        train(run, out / name)
    return out


def close(out: Path, other: Path) -> None:
    """The same, but for rounding: the history, the score and every number of the model."""
    ours, theirs = record_of(out), record_of(other)
    assert len(ours["history"]) == len(theirs["history"])
    for row, expected in zip(ours["history"], theirs["history"], strict=True):
        for key in ("train_loss", "val_loss", "val_score", "learning_rate"):
            assert row[key] == pytest.approx(expected[key], rel=1e-5), key
    for key in ("test_score", "best_epoch", "trainable_parameters", "checkpoint_bytes"):
        assert ours[key] == theirs[key], key
    (_, a), (_, b) = (checkpoint.read(folder / "model.safetensors") for folder in (out, other))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name].double(), b[name].double(), rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        ("accelerate", 2),
        pytest.param("accelerate", 4, marks=pytest.mark.slow),
        pytest.param("torchrun", 2, marks=pytest.mark.slow),
        pytest.param("torchrun", 4, marks=pytest.mark.slow),
    ],
)
def test_one_process_on_the_joint_batch(launcher, processes, tmp_path, alone):
    launched(tmp_path, launcher, processes, "tests.training.together", tmp_path)
    for name in RUNS:
        record = record_of(tmp_path / name)
        assert (record["status"], record["processes"]) == ("complete", processes)
        assert record_of(alone / name)["processes"] == 1
        assert set(os.listdir(tmp_path / name)) == {"record.json", "model.safetensors"}
        close(tmp_path / name, alone / name)
        found = evaluate_checkpoint(tmp_path / name / "model.safetensors")
        assert found["test_accuracy"] == record["test_score"]


@pytest.mark.slow
def test_a_sweep_of_runs_in_two_processes_logs_each(tmp_path):
    config = a_sweep(dims=("5",), baseline=None, processes=2)
    result = sweep(config, tmp_path, Running(jobs=1, log=("tensorboard",)))
    assert not result.failed, result.failed
    [out] = (tmp_path / "runs").iterdir()
    assert record_of(out)["processes"] == 2
    has_all(out, "tensorboard")


# ---- stopped, killed, gone on --------------------------------------------------------------------

PACED = """
import time
from torch import nn

class Paced(nn.Sequential):
    def forward(self, x):
        if self.training:
            time.sleep(0.01)
        return super().forward(x)

def plain(input_shape, classes):
    return Paced(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, classes))

def noisy(input_shape, classes):
    return plain(input_shape, classes).append(nn.Dropout(0.2))
"""
EPOCHS, LOG = 12, ("--log-with", "tensorboard")


def a_training(net: str, out: str) -> list[str]:
    # 1,317 images: of the last 37 the second process has one more, for which it draws.
    words = f"train --net paced_net:{net} --dim 20 --epochs {EPOCHS} --lr 0.1 --optimizer sgd"
    words += " --validation 0.084"
    return ["subspan.cli", *words.split(), "--out", out]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the network."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "paced_net.py").write_text(PACED)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The run in two processes that nobody disturbed."""
    launched(folder, "torchrun", 2, *a_training("noisy", "whole"), *LOG)
    return folder / "whole"


def after_some_epochs(out: Path, *processes: Program | subprocess.Popen[str]) -> None:
    """Wait until three of them are saved."""
    deadline = time.monotonic() + 120
    while not (out / state.FILE).exists() or len(record_of(out)["history"]) < 3:
        assert all(one.poll() is None for one in processes), processes[0].communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def left(out: Path) -> str:
    """The status of a training that was disturbed."""
    record = record_of(out)
    assert 3 <= len(record["history"]) < EPOCHS
    return record["status"]


def disturbed(folder: Path, net: str, out: str, number: signal.Signals) -> str:
    """Signal the launcher after some epochs; SIGKILL, all processes. Returns what they said."""
    with subprocess.Popen(
        command("torchrun", 2, *a_training(net, out), *LOG),
        cwd=folder,
        env=environment(folder),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        after_some_epochs(folder / out, process)
        parent = psutil.Process(process.pid)
        every = parent.children(recursive=True) if number == signal.SIGKILL else []
        for one in [parent, *every]:
            one.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert left(folder / out) == ("running" if number == signal.SIGKILL else "interrupted")
    return said


def comparable(out: Path) -> dict[str, object]:
    return {k: v for k, v in measured(out).items() if k != "bytes_sent_per_step"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_all_are_stopped_and_go_on(number, folder, whole):
    """The result is that of an undisturbed run, with dropout and the trackers' log."""
    out = number.name
    said = disturbed(folder, "noisy", out, number)
    if number == signal.SIGTERM:
        assert "to go on: subspan train --resume --out SIGTERM" in said
    said = launched(
        folder,
        "torchrun",
        2,
        "subspan.cli",
        "train",
        "--resume",
        "--out",
        out,
        *LOG,
    )
    assert "steps, going on after " in said
    ours, theirs = comparable(folder / out), comparable(whole)
    losses = [[row.pop("train_loss") for row in record["history"]] for record in (ours, theirs)]
    assert ours == theirs
    # Of an epoch that was stopped within, the first process knows its own half until then.
    exact = [a == b for a, b in zip(*losses, strict=True)]
    assert exact.count(False) <= (1 if number == signal.SIGTERM else 0)
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    models = [(run / "model.safetensors").read_bytes() for run in (folder / out, whole)]
    assert models[0] == models[1]
    has_all(folder / out, "tensorboard")


def test_two_begin_and_one_goes_on(folder, monkeypatch):
    """Batches are the same: so is the result, but for rounding. The record says it."""
    two = ranks.start(["-m", *a_training("plain", "two-one")], 2, folder)
    after_some_epochs(folder / "two-one", *two)
    for program in two:
        program.kill()
        program.communicate()
    assert left(folder / "two-one") == "running"
    monkeypatch.syspath_prepend(str(folder))
    record = record_of(folder / "two-one")
    done = state.read(folder / "two-one" / state.FILE).progress.done
    run = Run.from_dict(record["config"])
    first, *others = train(run, folder / "two-one").notes
    assert first == f"processes: 2 up to step {done}, then 1"
    assert all(note.startswith("device: ") for note in others)  # with more threads, perhaps
    train(run, folder / "one")
    close(folder / "two-one", folder / "one")
    sys.modules.pop("paced_net")


def test_independent_workers_must_stay_as_many(tmp_path):
    run = a_run("rbd", dim=5, lr=0.5, epochs=2, workers="independent", journal=True)
    train_up_to(STEPS + 2, run, tmp_path)
    where = state.read(tmp_path / state.FILE)
    assert where.processes == 1
    state.write(tmp_path / state.FILE, replace(where, processes=2))
    before = contents(tmp_path)
    with pytest.raises(SubspanError, match=r"begun in 2 processes, .* got 1: go on in 2"):
        train(run, tmp_path)
    assert contents(tmp_path) == before
