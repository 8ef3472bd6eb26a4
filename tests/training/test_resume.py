"""A run that was stopped or killed at any point ends as one that was not, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from subspan import SubspanError
from subspan.errors import Stopped
from subspan.training import locks, loop, machine, state
from subspan.training.tasks.classification import Classification
from subspan.training.train import train
from tests.forks import python
from tests.runs import STEPS, a_run, contents, copied, record_of, train_up_to
from tests.training.data.makers import image_folder
from tests.training.killed import RUN as KILLED

ROOT = Path(__file__).parents[2]
TIMES = ("seconds_total", "seconds_per_step", "peak_memory_bytes")


def measured(out: Path) -> dict[str, object]:
    """The record without what a clock says."""
    record = record_of(out)
    for row in record["history"]:
        row.pop("seconds")
    return {key: value for key, value in record.items() if key not in TIMES}


def same(out: Path, whole: Path) -> None:
    """Weights, history and record; and nothing else is left."""
    assert measured(out) == measured(whole)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert set(os.listdir(out)) == set(os.listdir(whole))


def build(input_shape, classes):
    """With buffers that training changes, and noise."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(4 * 36, classes),
    )


NOISY = "tests.training.test_resume:build"
RUNS = {
    "hash": {"dim": 30},
    "hash with bits": {"method": "hash", "dim": 30, "bits": 3},
    "full": {"lr": 0.003, "net": NOISY, "init": "own"},
    "subspace of a noisy net": {"dim": 50, "net": NOISY, "schedule": "cosine", "init": "own"},
    "momentum": {"method": "full", "lr": 0.01, "optimizer": "sgd", "schedule": "constant"},
    "rbd": {"method": "rbd", "dim": 20, "lr": 0.5},
    "rbd with a journal": {"method": "rbd", "dim": 20, "lr": 0.5, "journal": True},
    "fpd": {"method": "fpd", "dim": 20, "lr": 0.5, "momentum": 0.5},
    "nes": {"method": "nes", "dim": 3, "lr": 0.5},
    "dlrt": {"method": "dlrt", "tolerance": 0.2, "lr": 0.003},
    "dlrt with momentum": {"method": "dlrt", "tolerance": 0.2, "lr": 0.01, "optimizer": "sgd"},
    "stages": {"method": "prodsum", "stages": "4,12,36", "lr": 0.1},
    "images changed at random": {
        "dim": 30,
        "task_options": {"augment": ["affine", "crop", "flip"]},
    },
    "growing d": {"stages": "10,20,60", "schedule": "cosine"},
    "bf16": {"dim": 30, "mixed_precision": "bf16"},
    "stages in bf16": {
        "method": "prodsum",
        "stages": "4,12,36",
        "lr": 0.1,
        "mixed_precision": "bf16",
    },
}


def of(name):
    settings = dict(RUNS[name])
    method = settings.pop("method", "full" if name == "full" else "hash")
    return a_run(method, epochs=3, **settings)


@pytest.mark.parametrize("name", RUNS)
def test_stopped_twice_and_gone_on(name, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    train(of(name), whole)
    # Within an epoch, and at the end of one.
    for before, after in ((0, STEPS + 3), (STEPS + 3, 2 * STEPS)):
        steps = iter(range(before + 1, after + 1))
        starts = []

        def step(steps=steps, last=after):
            if next(steps) == last:
                signal.raise_signal(signal.SIGTERM)

        def start(*told, starts=starts):
            starts.append(told[:2])

        with pytest.raises(Stopped, match=f"stopped after {after} of {3 * STEPS} steps") as caught:
            train(of(name), out, on_step=step, on_start=start)
        assert caught.value.signal == signal.SIGTERM
        assert starts == [(3 * STEPS, before)]
        assert record_of(out)["status"] == "interrupted"
    done = train(of(name), out)
    assert done.status == "complete"
    same(out, whole)


# ---- killed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "seed", "kills"),
    [
        ("at-random", 0, 4),
        pytest.param("at-random", 0, 20, marks=pytest.mark.slow),
        ("in-a-write", 1, 3),
        pytest.param("in-a-write", 1, 8, marks=pytest.mark.slow),
        pytest.param("in-a-write", 2, 20, marks=pytest.mark.slow),
    ],
)
def test_killed(how, seed, kills, tmp_path):
    """SIGKILL at random moments; and while a file is being written."""
    words = ["-m", "tests.training.killed", str(tmp_path), how, str(seed), str(kills)]
    said = python(words, ROOT, {"OMP_NUM_THREADS": "1"}, tmp_path)
    assert said.returncode == 0, said.stderr
    assert int(said.stdout) == kills
    runs = [path for path in tmp_path.iterdir() if path.name.startswith("run")]
    assert runs
    for out in runs:
        same(out, tmp_path / "whole")


@pytest.mark.parametrize("missing", [("best", "last"), ("last",)])
def test_killed_while_it_finished(missing, tmp_path, monkeypatch):
    """The best state may have its last name already, the record not yet."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    train(KILLED, whole)

    def no_power(self):
        raise OSError("power failure")

    def stop(row):
        if row.epoch == KILLED.training.epochs:
            monkeypatch.setattr(loop.Loop, "finish", no_power)

    with pytest.raises(OSError, match="power failure"):
        train(KILLED, out, report=stop)
    monkeypatch.undo()
    (out / "last.safetensors").unlink()
    if "best" in missing:
        (out / "best.safetensors").rename(out / "model.safetensors")
    done = []
    train(KILLED, out, report=done.append)
    assert not done  # no epoch is repeated
    same(out, whole)


# ---- files and commands --------------------------------------------------------------------------

TRAIN = ("train", "--net", "mlp-16", "--dim", "9", "--epochs", "3", "--out", "run")


def stop_in_epoch(monkeypatch, epoch):
    from subspan.commands import train as command

    plain = command.TrainingProgress.epoch

    def report(self, row):
        plain(self, row)
        if row.epoch == epoch:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(command.TrainingProgress, "epoch", report)


def test_by_command(cli, in_tmp_path, monkeypatch):
    assert cli(*TRAIN[:-1], "whole").code == 0
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 2)
        said = cli(*TRAIN)
    assert said.code == 130
    words = f"stopped after {2 * STEPS} of {3 * STEPS} steps; to go on: subspan train --resume"
    assert said.err == f"\nsubspan train: {words} --out run\n"
    said = cli("train", "--resume", "--out", "run")
    assert (said.code, said.err) == (0, "")
    assert f"{3 * STEPS} steps, going on after {2 * STEPS}" in said.out
    assert "epoch   3/3" in said.out
    assert "epoch   2/3" not in said.out
    same(Path("run"), Path("whole"))
    said = cli("train", "--resume", "--out", "run")
    assert (said.code, "complete already, not repeated" in said.out) == (0, True)


def test_another_configuration(cli, in_tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 1)
        assert cli(*TRAIN).code == 130
    before = contents(in_tmp_path / "run")
    said = cli("train", "--resume", "--epochs", "4", "--out", "run")
    assert said.code == 2
    assert "run was begun with another configuration (epochs 3 → 4): leave that out" in said.err
    # What is said is compared, be it the default; and all that differs is told.
    words = ("--dim", "10", "--lr", "5", "--epochs", "10", "--net", "mlp-16")
    said = cli("train", "--resume", *words, "--out", "run")
    assert "another configuration (dim 9 → 10, epochs 3 → 10, lr 1.0 → 5.0)" in said.err
    said = cli(*TRAIN[:-4], "--epochs", "4", "--out", "run")
    assert "run belongs to another configuration (epochs 3 → 4)" in said.err
    assert contents(in_tmp_path / "run") == before
    said = cli("train", "--resume", "--out", "elsewhere")
    assert (said.code, said.out) == (2, "")
    assert "nothing was begun in elsewhere: it has no record.json" in said.err
    # Another run in its place has nothing of it.
    said = cli(*TRAIN[:-4], "--epochs", "1", "--out", "run", "--overwrite")
    assert said.code == 0
    assert len(record_of(in_tmp_path / "run")["history"]) == 1


SHIFT = 0.0


def shifted(input_shape, classes):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    with torch.no_grad():
        net[1].bias.add_(SHIFT)
    return net


def test_another_beginning(tmp_path, monkeypatch):
    """Initial weights or data that are others by now, which no configuration tells."""
    out, task = tmp_path / "run", Classification.size
    run = a_run(net="tests.training.test_resume:shifted", dim=20, epochs=2)

    with pytest.raises(Stopped):
        train(run, out, on_step=lambda: signal.raise_signal(signal.SIGTERM))
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "SHIFT", 0.5)
        with pytest.raises(SubspanError, match="run was trained from other initial weights"):
            train(run, out)
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "size", lambda self: task(self) - 8)
        words = "run was begun with 1,318 training samples, now there are 1,310: bring the data"
        with pytest.raises(SubspanError, match=words):
            train(run, out)
    assert contents(out) == before
    assert train(run, out).status == "complete"


@pytest.mark.parametrize("part", ["train", "test"])
def test_other_samples_of_the_same_number(part, tmp_path):
    """Two pictures change places: neither their number nor their mean tells."""
    folder, out = image_folder(tmp_path / "images"), tmp_path / "run"
    run = a_run(data=str(folder), net="linear", dim=5, epochs=2, batch_size=4, validation=0.1)
    with pytest.raises(Stopped):
        train(run, out, on_step=lambda: signal.raise_signal(signal.SIGTERM))
    before = contents(out)
    cats, dogs = folder / part / "cat", folder / part / "dog"
    for name in range(6):
        one, other = cats / f"{name:02}.png", dogs / f"{11 - name:02}.png"
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)
    with pytest.raises(SubspanError, match="other samples, or other labels of them: bring"):
        train(run, out)
    assert contents(out) == before


@pytest.mark.parametrize("spoil", ["missing", "cut short"])
def test_the_best_epoch_must_be_there(spoil, cli, in_tmp_path, monkeypatch):
    """Or all that is left would be trained in vain."""
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 2)
        cli(*TRAIN)
    best = Path("run/best.safetensors")
    whole = best.read_bytes()
    if spoil == "missing":
        best.unlink()
    else:
        best.write_bytes(whole[:-9])
    before = contents(in_tmp_path / "run")
    said = cli("train", "--resume", "--out", "run")
    assert said.code == 2
    assert "run/best.safetensors is " in said.err
    assert contents(in_tmp_path / "run") == before
    best.write_bytes(whole)
    assert cli("train", "--resume", "--out", "run").code == 0


def test_a_record_without_a_state(cli, in_tmp_path, monkeypatch):
    """The training begins anew, and says so."""
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 1)
        cli(*TRAIN)
    (Path("run") / state.FILE).unlink()
    said = cli("train", "--resume", "--out", "run")
    assert said.code == 0
    assert f"{3 * STEPS} steps, from the first on: there is no state of it to go on" in said.out


def test_one_at_a_time(tmp_path, in_tmp_path, cli):
    """Another process trains in this folder: nothing there is touched, nor an empty one left."""
    with locks.lock_folder(Path("run")):
        before = contents(tmp_path)
        said = cli(*TRAIN)
        assert said.code == 2
        words = "another process trains in run (it holds run/.lock): wait for its end, or give"
        assert words in said.err
        assert contents(tmp_path) == before
    assert not Path("run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / locks.FILE).touch()  # as a process that is killed leaves it
    assert not locks.is_locked(tmp_path / "run" / locks.FILE)
    assert cli(*TRAIN).code == 0
    assert set(os.listdir("run")) == {"model.safetensors", "record.json"}


def test_a_full_disk_after_a_signal(tmp_path, monkeypatch):
    """That nothing was saved is what must be said."""

    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def step():
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(state, "write", no_room)

    with pytest.raises(OSError, match="No space left on device"):
        train(a_run(dim=5), tmp_path / "run", on_step=step)
    record = record_of(tmp_path / "run")
    assert (record["status"], record["error"]) == ("failed", "[Errno 28] No space left on device")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda record: record.update(notes=3), "notes must be a list, got 3"),
        (lambda record: record.update(score="high"), "score must be a mapping, got 'high'"),
        (lambda record: record["config"].update(options=None), "options must be a mapping, got"),
    ],
)
def test_an_edited_record(edit, message, trained, tmp_path, cli):
    copied(trained, tmp_path / "run")
    record = record_of(tmp_path / "run")
    edit(record)
    (tmp_path / "run" / "record.json").write_text(json.dumps(record))
    before = contents(tmp_path / "run")
    said = cli("train", "--resume", "--out", tmp_path / "run")
    assert said.code == 2
    assert message in said.err
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("spoil", ["cut short", "edited", "newer"])
def test_a_damaged_state(spoil, cli, in_tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 1)
        cli(*TRAIN)
    path = Path("run") / state.FILE
    if spoil == "newer":
        torch.save({"format": 99}, path)
    else:
        whole = path.read_bytes()
        path.write_bytes(whole[:500] if spoil == "cut short" else b"x" + whole[1:])
    before = contents(in_tmp_path / "run")
    said = cli("train", "--resume", "--out", "run")
    assert said.code == 2
    expected = "has format 99" if spoil == "newer" else "is damaged, training cannot go on from it"
    assert expected in said.err
    assert contents(in_tmp_path / "run") == before


def test_a_state_of_another_run_is_not_used(tmp_path):
    """The record is replaced first: if all ends then, the state beside it is another run's."""
    out = tmp_path / "run"

    def stop(row):
        if row.epoch == 2:
            raise OSError("power failure")

    for lr in (0.1, 0.3):
        with pytest.raises(OSError, match="power failure"):
            train(a_run(dim=30, epochs=2, lr=lr), tmp_path / f"{lr}", report=stop)
    out.mkdir()
    (out / "record.json").write_bytes((tmp_path / "0.1" / "record.json").read_bytes())
    other = a_run(dim=30, epochs=2, lr=0.3)
    train(other, tmp_path / "whole")
    train(a_run(dim=30, epochs=2, lr=0.1), tmp_path / "other")
    content = json.loads((out / "record.json").read_text())
    assert content["config"]["lr"] == 0.1
    (out / state.FILE).write_bytes((tmp_path / "0.3" / state.FILE).read_bytes())
    train(a_run(dim=30, epochs=2, lr=0.1), out)
    same(out, tmp_path / "other")


def test_what_a_state_holds(tmp_path):
    run, out = a_run(dim=30, epochs=2), tmp_path / "run"
    train_up_to(STEPS + 2, run, out)
    content = torch.load(out / state.FILE, weights_only=True)
    assert set(content) == {
        *("format", "config", "header", "tensors", "optimizer", "schedule", "scaler"),
        *("generators", "history", "log", "best_score", "best_epoch", "sent", "notes"),
        *("processes", "device", "versions", "size", "samples", "done", "within"),
        "seconds_total",
    }
    assert set(content["within"]) == {"total", "seen", "seconds", "lr"}
    assert content["history"] == record_of(out)["history"]


def test_another_machine_is_noted(tmp_path, monkeypatch):
    """And every change of it, also after a part that was stopped."""
    run, out, real = a_run(dim=30, epochs=3), tmp_path / "run", machine.versions()
    for version in ("2.0", "2.1"):
        monkeypatch.setattr(machine, "versions", lambda v=version: real | {"torch": v})
        train_up_to(STEPS + 1, run, out)
    monkeypatch.setattr(machine, "device_name", lambda device: "an abacus")
    record = train(run, out)
    assert (record.versions["torch"], record.device) == ("2.1", "an abacus")
    first, second = record.notes
    assert first == f"torch: 2.0 up to step {STEPS}, then 2.1"
    assert second.startswith("device: ")
    assert second.endswith(f" up to step {2 * STEPS}, then an abacus")


def test_generators():
    """Generators draw on from where they were; two of them keep the second of a pair of normals."""

    def draw():
        return torch.rand(3).tolist(), random.gauss(0, 1), np.random.normal(), np.random.rand()

    state.seed_generators(0)
    draw()
    before = state.generators()
    expected = draw()
    for _ in range(3):
        draw()
    state.set_generators(before)
    assert draw() == expected


def test_what_is_no_configuration(tmp_path):
    from subspan.training.config import Run

    with pytest.raises(SubspanError, match="this is not the configuration of a run"):
        Run.from_dict({"epochs": 3})
    run = a_run(dim=5)
    assert Run.from_dict(run.as_dict()) == run
