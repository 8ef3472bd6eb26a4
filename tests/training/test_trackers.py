"""Trackers are told every epoch once, whatever happened to the run, and change nothing in it."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from subspan.errors import Stopped
from subspan.training import state, trackers
from subspan.training.train import train
from tests.runs import STEPS, SWEEP, TRAIN, a_run, contents, record_of
from tests.training.test_resume import stop_in_epoch

RUN = a_run("rbd", dim=5, lr=1.0, epochs=3, compartments="layer")
SCORE = ("best_epoch", "checkpoint_bytes", "stored_parameters", "test_score")


@pytest.fixture(scope="session", autouse=True)
def trackio_store() -> Path:
    """Where Trackio keeps what tests log."""
    folder = Path(os.environ["TRACKIO_DIR"])
    import trackio.utils

    assert folder == trackio.utils.TRACKIO_DIR
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a test asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def a_second_later(monkeypatch):
    """TensorBoard's files are in the order of their names, and these have no more than seconds."""
    from tensorboard.summary.writer import event_file_writer

    seconds = itertools.count(int(time.time()))
    clock = SimpleNamespace(time=lambda: next(seconds))
    monkeypatch.setattr(event_file_writer, "time", clock)


def told_tensorboard(out: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(out / "subspan"))
    found.Reload()
    names = found.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in names}


def told_trackio(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the log of the one run that has the folder's name."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    names = {run.name for run in trackio.Api().runs("subspan")}
    [name] = [name for name in names if name.rpartition("-")[0] == out.name]
    found: dict[str, list[tuple[int, float]]] = {}
    for row in SQLiteStorage.get_logs("subspan", name):
        for key in row.keys() - {"step", "timestamp"}:
            found.setdefault(key, []).append((row["step"], row[key]))
    return found


TOLD = {"tensorboard": told_tensorboard, "trackio": told_trackio}


def expected(out: Path) -> dict[str, list[tuple[int, float]]]:
    """The record's own numbers, as a tracker has them."""
    record = record_of(out)
    found: dict[str, list[tuple[int, float]]] = {}
    for row in record["history"]:
        for name, value in trackers.numbers(row):
            if name != "epoch":
                found.setdefault(name, []).append((row["epoch"], value))
    return found | {name: [(len(record["history"]), record[name])] for name in SCORE}


def has_all(out: Path, *names: str) -> None:
    for name in names:
        told = TOLD[name](out)
        assert told.keys() == expected(out).keys()
        for key, values in expected(out).items():
            assert [step for step, _ in told[key]] == [step for step, _ in values], (name, key)
            assert [v for _, v in told[key]] == pytest.approx([v for _, v in values])


def result(out: Path) -> object:
    record = record_of(out)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in record["history"]]
    return rows, record["config"], (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain")
    train(RUN, out)
    return out


@pytest.mark.parametrize("names", [["tensorboard"], ["trackio"], ["tensorboard", "trackio"]])
def test_every_epoch_and_the_score(names, tmp_path, plain):
    out = tmp_path / f"whole-{'-'.join(names)}"
    train(RUN, out, log=names)
    has_all(out, *names)
    assert {"alignment/all/cosine", "val_score"} < expected(out).keys()
    assert result(out) == result(plain)
    files = {"record.json", "model.safetensors"} | ({"subspan"} & {*os.listdir(out)})
    assert set(os.listdir(out)) == files
    assert ("subspan" in files) == ("tensorboard" in names)
    before = contents(out)
    train(RUN, out, log=names)
    assert contents(out) == before


def test_trackio_is_told_the_configuration(tmp_path):
    import trackio

    train(RUN, tmp_path / "configured", log=["trackio"])
    [run] = [r for r in trackio.Api().runs("subspan") if r.name.startswith("configured-")]
    told = {"net": "mlp-8", "method": "rbd", "dim": 5, "compartments": "layer", "lr": 1.0}
    assert told.items() <= run.config.items()


def stopped(out: Path, after: int, log: list[str]) -> None:
    steps = iter(range(1, 1000))

    def step() -> None:
        if next(steps) == after:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        train(RUN, out, on_step=step, log=log)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (["tensorboard", "trackio"], ["tensorboard", "trackio"]),
        ([], ["tensorboard", "trackio"]),
        (["tensorboard"], ["trackio"]),
    ],
)
def test_a_run_that_goes_on(first, then, tmp_path, plain):
    """In the same log; a tracker that comes later is told what it missed."""
    out = tmp_path / f"gone-on-{'-'.join(first)}-{'-'.join(then)}"
    stopped(out, STEPS + 4, first)
    stopped(out, 4, then)
    train(RUN, out, log=then)
    has_all(out, *then)
    assert result(out) == result(plain)


def test_a_tracker_that_was_left_out_for_a_while(tmp_path):
    out = tmp_path / "with-a-gap"
    stopped(out, STEPS + 4, ["tensorboard", "trackio"])
    stopped(out, STEPS, ["tensorboard"])
    train(RUN, out, log=["trackio", "tensorboard"])
    has_all(out, "tensorboard", "trackio")


def test_killed_after_an_epoch_was_told(tmp_path, monkeypatch):
    """And before its state was written: TensorBoard shows it once."""
    out, writes = tmp_path / "killed", []
    write = state.write

    def fails(path, content):
        writes.append(1)
        if len(writes) == 2:
            raise OSError("power failure")
        write(path, content)

    monkeypatch.setattr(state, "write", fails)
    with pytest.raises(OSError, match="power failure"):
        train(RUN, out, log=["tensorboard"])
    assert [step for step, _ in told_tensorboard(out)["val_loss"]] == [1, 2]
    train(RUN, out, log=["tensorboard"])
    has_all(out, "tensorboard")


def test_another_run_in_the_same_folder_has_a_log_of_its_own(tmp_path):
    import trackio

    out = tmp_path / "overwritten"
    train(a_run(dim=5, epochs=4), out, log=["tensorboard", "trackio"])
    train(a_run(dim=6, epochs=2), out, overwrite=True, log=["tensorboard", "trackio"])
    has_all(out, "tensorboard")
    names = {run.name for run in trackio.Api().runs("subspan")}
    assert len([name for name in names if name.startswith("overwritten-")]) == 2


def test_what_is_no_number_is_left_out():
    row = {"a": 1, "b": {"c": 2.5, "d": "x", "e": [3, None, {"f": True}]}, "g": "h", "i": {}}
    told = [("a", 1), ("b/c", 2.5), ("b/e/0", 3), ("b/e/2/f", True)]
    assert list(trackers.numbers(row)) == told
    assert list(trackers.numbers([])) == []


# ---- refused, and by command ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [TRAIN, SWEEP, ["reproduce", "minut-mnist-mlp", "--out", "run"]]
)
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("tensorbord", "unknown tracker 'tensorbord': did you mean tensorboard?"),
        ("tensorboard,", "log has an empty entry"),
        ("wandb", "the tracker wandb is not installed: pip install 'subspan[wandb]'"),
        ("tensorboard,comet_ml", "the tracker comet_ml is not installed: pip install comet_ml"),
    ],
)
def test_refused(command, names, message, cli, in_tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    said = cli(*command, "--log", names)
    assert (said.code, message in said.err) == (2, True), said.err
    assert not Path("run").exists()


def test_a_tracker_that_does_not_start(cli, in_tmp_path, monkeypatch):
    import trackio

    def init(**options):
        raise RuntimeError("not logged in")

    monkeypatch.setattr(trackio, "init", init)
    said = cli(*TRAIN, "--log", "tensorboard,trackio")
    assert (said.code, "cannot log to tensorboard, trackio: not logged in" in said.err) == (2, True)
    assert record_of(Path("run"))["status"] == "failed"
    assert "leave it out of --log" in said.err
    said = cli("train", "--resume", "--out", "run", "--log", "tensorboard")
    assert said.code == 0
    has_all(Path("run"), "tensorboard")


def test_by_command(cli, in_tmp_path):
    assert cli(*TRAIN, "--log", "tensorboard").code == 0
    has_all(Path("run"), "tensorboard")


def test_resume_goes_on_in_the_same_log(cli, in_tmp_path, monkeypatch):
    """Though nothing but the folder is said."""
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 1)
        assert cli(*TRAIN, "--epochs", "3", "--log", "tensorboard").code == 130
    assert cli("train", "--resume", "--out", "run").code == 0
    assert record_of(Path("run"))["log"] == ["tensorboard"]
    has_all(Path("run"), "tensorboard")


def test_every_run_of_a_sweep(cli, in_tmp_path):
    said = cli(*SWEEP, "--lrs", "0.3", "--baseline-lrs", "0.01", "--log", "[tensorboard]")
    assert (said.code, said.err) == (0, "")
    runs = sorted(Path("run/runs").iterdir())
    assert len(runs) == 2
    for out in runs:
        has_all(out, "tensorboard")


def test_a_benchmark_has_no_runs_to_log(cli, in_tmp_path):
    said = cli("reproduce", "dlrt-timing", "--log", "tensorboard", "--out", "run")
    assert (said.code, "has no runs to log: leave out --log" in said.err) == (2, True)
    assert not Path("run").exists()
