"""One run: its files and its record, what it repeats, what it refuses, and how it fails."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import subspan.training.loop as loop
import subspan.training.train as trainer
from subspan import files, layers, report
from subspan.errors import SubspanError
from subspan.experiments import gallery
from subspan.sweeps.running import Running
from subspan.sweeps.sweep import sweep
from subspan.training import data
from subspan.training.evaluate import evaluate, evaluate_checkpoint, rebuild
from subspan.training.prepare import rehearse
from subspan.training.records import RunRecord
from subspan.training.schema import to_json
from subspan.training.tasks import classification
from subspan.training.tasks.classification import Classification
from subspan.training.train import completed, prepare, train
from tests.runs import STEPS, WEIGHTS, a_run, a_sweep, contents, copied, record_of

KEYS = {
    *("format", "status", "config", "test_score", "val_score", "best_epoch"),
    *("trainable_parameters", "stored_parameters", "weights", "checkpoint_bytes"),
    *(
        "score",
        "seconds_total",
        "seconds_per_step",
        "peak_memory_bytes",
        "bytes_sent_per_step",
        "history",
        "processes",
        "device",
    ),
    *("versions", "notes", "digest", "error", "log"),
}


def test_the_record(trained):
    record = record_of(trained)
    assert set(record) == KEYS
    assert (record["format"], record["status"], record["error"]) == (2, "complete", None)
    assert record["config"]["options"] == {"dim": 40}
    assert record["config"]["method"] == "hash"
    assert record["trainable_parameters"] == record["stored_parameters"] == 40
    assert record["weights"] == WEIGHTS
    assert record["checkpoint_bytes"] == (trained / "model.safetensors").stat().st_size
    assert record["checkpoint_bytes"] <= 4 * 40 + 2048
    assert [row["epoch"] for row in record["history"]] == [1, 2]
    for row in record["history"]:
        assert set(row) == {
            *("epoch", "train_loss", "val_loss", "val_score", "learning_rate", "seconds")
        }
        assert all(math.isfinite(value) for value in row.values())
    # One-cycle begins at 1/25 of its highest rate.
    assert record["history"][0]["learning_rate"] == pytest.approx(0.3 / 25)
    assert record["history"][1]["train_loss"] < record["history"][0]["train_loss"]
    assert 0.3 < record["test_score"] <= 1
    assert 0 < record["seconds_per_step"] * STEPS * 2 <= record["seconds_total"]
    assert 10**7 < record["peak_memory_bytes"] < 10**12
    assert record["processes"] == 1
    assert record["versions"]["torch"] == torch.__version__
    assert set(os.listdir(trained)) == {"record.json", "model.safetensors"}


def test_the_best_epoch_is_kept(tmp_path, monkeypatch):
    """The first of equals on validation; the best and the last state are there after every one."""
    accuracies, seen, test_losses = iter([0.5, 0.9, 0.7, 0.9]), [], []

    def fake(model, task, part):
        loss, accuracy = evaluate(model, task, part)
        if part == "validation":
            return loss, next(accuracies)
        test_losses.append(loss)
        return loss, accuracy

    monkeypatch.setattr(loop, "evaluate", fake)

    def report(row):
        record = record_of(tmp_path)
        assert record["status"] == "running"
        assert record["history"][-1] == to_json(row)
        seen.append([(tmp_path / f"{name}.safetensors").read_bytes() for name in ("best", "last")])
        names = {"record.json", "best.safetensors", "last.safetensors", ".lock"}
        assert set(os.listdir(tmp_path)) - {"state.pt"} == names

    record = train(a_run(dim=30, epochs=4), tmp_path, report=report)
    bests, lasts = zip(*seen, strict=True)
    assert len(set(lasts)) == 4
    assert bests == (lasts[0], lasts[1], lasts[1], lasts[1])
    assert (record.best_epoch, record.val_score) == (2, 0.9)
    assert (tmp_path / "model.safetensors").read_bytes() == lasts[1]
    found = evaluate_checkpoint(tmp_path / "model.safetensors")
    assert record.test_score == found["test_accuracy"]
    assert test_losses == [found["test_loss"]]  # two epochs may well have one accuracy
    assert set(os.listdir(tmp_path)) == {"record.json", "model.safetensors"}


def test_the_test_set_is_read_once_and_at_the_end(tmp_path, monkeypatch):
    uses = []

    def watched(model, task, part):
        uses.append(part)
        return evaluate(model, task, part)

    monkeypatch.setattr(loop, "evaluate", watched)
    train(a_run(dim=10, epochs=3), tmp_path)
    assert uses == ["validation"] * 3 + ["test"]


def test_the_same_run_twice_is_the_same(tmp_path):
    records = []
    for name in ("a", "b"):
        torch.manual_seed(len(records))  # what is drawn before does not matter
        records.append(train(a_run(dim=20, epochs=2), tmp_path / name))
    for key in ("test_score", "val_score", "best_epoch"):
        assert getattr(records[0], key) == getattr(records[1], key)
    rows = [[replace(row, seconds=0.0) for row in record.history] for record in records]
    assert rows[0] == rows[1]
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert models[0] == models[1]


def test_folders_are_paths_or_texts(tmp_path):
    run, points = str(tmp_path / "run"), str(tmp_path / "sweep")
    found = train(a_run(dim=5), run)
    assert train(a_run(dim=5), run) == found == completed(a_run(dim=5), run) == report.read(run)
    sweep(a_sweep(dims=("5",), baseline=None), points, Running(jobs=1))
    for folder in (run, points):
        assert report.write(folder)[0] == Path(folder) / "curve.png"
    assert gallery.write(str(tmp_path), f"{tmp_path}/all.md").is_file()


def test_another_seed_is_another_run(tmp_path):
    ready = [prepare(a_run(dim=20, seed=seed)) for seed in (0, 1, 2**63 + 1)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(
            ready[a].task.images.validation.images, ready[b].task.images.validation.images
        )
        assert torch.equal(ready[a].task.images.test.images, ready[b].task.images.test.images)
        assert ready[a].model.base_fingerprint != ready[b].model.base_fingerprint
        assert ready[a].model.layout != ready[b].model.layout
    record = train(a_run(dim=20, seed=2**63 + 1), tmp_path)
    found = evaluate_checkpoint(tmp_path / "model.safetensors")
    assert found["test_accuracy"] == record.test_score


def test_a_complete_run_is_not_repeated(trained, tmp_path, monkeypatch):
    out = copied(trained, tmp_path / "run")
    before = contents(out)
    monkeypatch.setattr(trainer, "prepare", None)
    run = a_run(dim=40, epochs=2)
    record = RunRecord.read(trained)
    assert train(run, out) == record
    assert train(run, out, overwrite=True) == record
    assert completed(run, out) == record
    assert contents(out) == before


@pytest.mark.parametrize("spoil", ["interrupted", "running", "failed", "no model"])
def test_a_run_that_is_not_complete_is_repeated(spoil, trained, tmp_path):
    out = copied(trained, tmp_path / "run")
    if spoil == "no model":
        (out / "model.safetensors").unlink()
    else:
        (out / "record.json").write_text(json.dumps(record_of(out) | {"status": spoil}))
        (out / "best.safetensors").write_bytes(b"half")
        (out / ".last.safetensors.x7.tmp").write_bytes(b"half")
    record = train(a_run(dim=40, epochs=2), out)
    assert record.status == "complete"
    assert record.test_score == record_of(trained)["test_score"]
    assert set(os.listdir(out)) == {"record.json", "model.safetensors"}


def test_a_run_is_given_as_its_dataclass(tmp_path):
    run = a_run(dim=5).as_dict()
    for use in (prepare, rehearse, lambda run: train(run, tmp_path / "run")):
        with pytest.raises(SubspanError, match=r"^run must be a Run, got {"):
            use(run)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_configuration(trained, tmp_path):
    out = copied(trained, tmp_path / "run")
    before = contents(out)
    with pytest.raises(SubspanError, match=r"another configuration \(epochs 2 → 1\): give another"):
        train(a_run(dim=40, epochs=1), out)
    with pytest.raises(SubspanError, match="overwrite must be true or false, got 'no'"):
        train(a_run(dim=40, epochs=1), out, overwrite="no")
    assert contents(out) == before
    record = train(a_run(dim=40, epochs=1), out, overwrite=True)
    assert record.config["epochs"] == 1
    assert RunRecord.read(out) == record


def test_overwriting_leaves_nothing_of_the_other_run(trained, tmp_path):
    """A failure must not leave a record beside a model that it does not describe."""
    out = copied(trained, tmp_path / "run")
    with pytest.raises(SubspanError, match="stopped being finite"):
        train(a_run(dim=40, optimizer="sgd", lr=1e30), out, overwrite=True)
    assert os.listdir(out) == ["record.json"]
    assert record_of(out)["status"] == "failed"


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "{}", '{"format": 1}', '{"format": 1, "config": 3}']
)
def test_a_damaged_record(text, tmp_path):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(SubspanError, match=r"record\.json is damaged or no record"):
        train(a_run(dim=40), tmp_path)
    assert (tmp_path / "record.json").read_text() == text
    train(a_run(dim=40), tmp_path, overwrite=True)
    assert record_of(tmp_path)["status"] == "complete"


def test_what_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"somebody's")
    with pytest.raises(SubspanError, match="is there without a record of its training"):
        train(a_run(dim=40), tmp_path)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(
        SubspanError, match=r"has a sweep\.json of something else: give another --out"
    ):
        train(a_run(dim=40), tmp_path)
    (tmp_path / "record.json").write_text(json.dumps({"format": 99}))
    (tmp_path / "sweep.json").unlink()
    with pytest.raises(SubspanError, match=r"has format 99; .* reads up to 2: upgrade"):
        train(a_run(dim=40), tmp_path)


def test_patience(tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.6, 0.6, 0.55, 0.7, 0.1])
    monkeypatch.setattr(loop, "evaluate", lambda *_: (1.0, next(accuracies)))
    record = train(a_run(dim=10, epochs=9, patience=2), tmp_path)
    # The second epoch of 0.6 is no better than the first; the last value is the test set's.
    assert [row.val_score for row in record.history] == [0.5, 0.6, 0.6, 0.55]
    assert (record.best_epoch, record.val_score, record.test_score) == (2, 0.6, 0.7)


def not_a_number_after(steps, monkeypatch):
    calls = []
    plain = classification.cross_entropy

    def spoiled(scores, labels, **how):
        if not how:  # the evaluation sums up
            calls.append(1)
        return plain(scores, labels, **how) * (math.nan if len(calls) > steps else 1)

    monkeypatch.setattr(classification, "cross_entropy", spoiled)


def test_a_loss_that_stops_being_finite_keeps_the_best_state(tmp_path, monkeypatch):
    not_a_number_after(2 * STEPS + 3, monkeypatch)
    with pytest.raises(
        SubspanError, match=r"finite in epoch 3: lower --lr 0.3; best.safetensors holds"
    ):
        train(a_run(dim=30, epochs=5), tmp_path)
    record = record_of(tmp_path)
    assert record["status"] == "failed"
    assert "stopped being finite in epoch 3" in record["error"]
    assert len(record["history"]) == 2
    assert record["val_score"] == max(row["val_score"] for row in record["history"])
    assert record["test_score"] is None
    assert set(os.listdir(tmp_path)) == {"record.json", "best.safetensors", "last.safetensors"}
    model, _ = rebuild(tmp_path / "best.safetensors")
    digits = data.load("digits")
    assert evaluate(model, Classification(digits, "mlp-8"), "validation")[1] == record["val_score"]
    assert all(w.isfinite().all() for w in rebuild(tmp_path / "last.safetensors")[0].parameters())


@pytest.mark.parametrize(("error", "said"), [(OSError("full"), "full"), (SystemExit(1), "Sys")])
@pytest.mark.parametrize("place", ["on_start", "on_step"])
def test_what_is_told_may_fail(place, error, said, tmp_path):
    def fail(*_):
        raise error

    with pytest.raises(type(error)):
        train(a_run(dim=5), tmp_path / "run", **{place: fail})
    record = record_of(tmp_path / "run")
    assert record["status"] == "failed"
    assert record["error"].startswith(said)


def torn(input_shape, classes):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    nn.init.constant_(net[1].bias[2:3], math.inf)
    return net


def test_weights_that_are_spoiled_from_the_start(tmp_path):
    """Which no lower rate would mend."""
    with pytest.raises(SubspanError, match=r"^1\.bias of the network is not finite before"):
        train(a_run(net="tests.training.test_train:torn", dim=20), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def another_each_time(input_shape, classes):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    drawn = torch.from_numpy(np.random.default_rng().normal(size=3))
    net.register_buffer("drawn", drawn, persistent=False)
    return net


ONE = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def always_one(input_shape, classes):
    return ONE


def around_one(input_shape, classes):
    return nn.Sequential(ONE, nn.Identity())


def without_values(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))


@pytest.mark.parametrize(
    ("name", "init", "said"),
    [
        ("another_each_time", "own", "your function makes another network at every call"),
        ("another_each_time", "seed", "your function makes another network at every call"),
        ("without_values", "own", r"1\.weight has no values yet: run a batch"),
    ],
)
def test_networks_that_no_file_could_find_again(name, init, said, tmp_path):
    run = a_run(net=f"tests.training.test_train:{name}", dim=20, init=init)
    with pytest.raises(SubspanError, match=said):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["always_one", "around_one"])
@pytest.mark.parametrize("options", [{"method": "hash", "dim": 20}, {"method": "full"}])
def test_a_function_may_return_one_network_always(name, options, tmp_path):
    """Or one part; which a run leaves as it was, so that another one begins there, too."""
    run = a_run(net=f"tests.training.test_train:{name}", **options)
    losses = [train(run, tmp_path / str(i)).history[0].train_loss for i in range(2)]
    assert losses[0] == losses[1]


def test_a_file_of_all_weights_needs_no_function_that_makes_them_again():
    net = prepare(a_run("full", net="tests.training.test_train:another_each_time")).model
    assert sum(p.numel() for p in net.parameters()) == 650


class Doubling(layers.LowRankLinear):
    """A class that a file cannot name: a loaded layer would be a plain LowRankLinear."""


def of_an_unregistered_layer(input_shape, classes):
    return nn.Sequential(nn.Flatten(), Doubling(64, classes, 2))


def test_what_could_not_be_saved_is_refused_before_the_first_step(tmp_path):
    run = a_run("full", net="tests.training.test_train:of_an_unregistered_layer")
    with pytest.raises(
        SubspanError, match=r"'1' cannot be saved, .*Doubling.*: register the class"
    ):
        train(run, tmp_path / "run", on_start=lambda *_: pytest.fail("it began"))
    assert not (tmp_path / "run").exists()


def test_a_last_step_that_spoils_the_weights(tmp_path, monkeypatch):
    """Only the validation loss can tell; nothing of that state may be kept."""
    losses = iter([1.0, math.inf])
    monkeypatch.setattr(loop, "evaluate", lambda *_: (next(losses), 0.5))
    with pytest.raises(SubspanError, match="stopped being finite in epoch 2"):
        train(a_run(dim=30, epochs=3), tmp_path)
    record = record_of(tmp_path)
    assert (record["status"], record["best_epoch"], len(record["history"])) == ("failed", 1, 1)


def test_an_interrupt_is_recorded(tmp_path, ctrl_c):
    def report(row):
        if row.epoch == 2:
            ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        train(a_run(dim=30, epochs=5), tmp_path, report=report)
    record = record_of(tmp_path)
    assert record["status"] == "interrupted"
    assert len(record["history"]) == 2
    assert set(record) == KEYS


@pytest.mark.parametrize("after", [0, 1, 2, 3, 6, 9])
def test_a_full_disk_leaves_whole_files(after, tmp_path, monkeypatch):
    """After so many files were written, no other one is."""
    written = []
    synced = os.fsync

    def fsync(descriptor):
        if len(written) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(1)
        synced(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left on device"):
            train(a_run(dim=30, epochs=3), tmp_path)
    assert len(written) == after
    names = set(os.listdir(tmp_path))
    models = {f"{name}.safetensors" for name in ("best", "last", "model")}
    assert names <= models | {"record.json", "state.pt"}
    assert ("record.json" in names) == (after > 0)
    for name in names & models:
        rebuild(tmp_path / name)
    if after:
        assert record_of(tmp_path)["status"] == "running"
    assert train(a_run(dim=30, epochs=3), tmp_path).status == "complete"


SAFE_TO_KILL = """
import sys
from pathlib import Path
from tests.runs import a_run
from subspan.training.train import train
train(a_run(dim=30, epochs=400), Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.4, 1.1])
def test_killed_at_any_moment(delay, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", SAFE_TO_KILL, str(out)])
    while not (out / "record.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    process.wait()
    record = record_of(out)
    assert record["status"] == "running"
    assert set(record) == KEYS
    for path in out.glob("*.safetensors"):
        rebuild(path)
    done = train(a_run(dim=30, epochs=2), out, overwrite=True)
    assert record_of(out) == done
    assert set(os.listdir(out)) == {"record.json", "model.safetensors"}
