"""Sweeps on disk: which runs there are, what is repeated, and what ``sweep.json`` says."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest

import subspan.sweeps.worker as module
from subspan.errors import SubspanError
from subspan.sweeps.intrinsic import intrinsic_dimension
from subspan.sweeps.result import SweepRecord
from subspan.sweeps.running import Running
from subspan.sweeps.sweep import sweep
from subspan.training.schema import to_json
from tests.forks import python_code
from tests.runs import NET, WEIGHTS, a_run, a_sweep, contents, copied, record_of, sweep_of


@pytest.fixture(scope="module")
def swept(tmp_path_factory, cache_once):
    """The folder of a sweep of two dims and two seeds, and what it gave back."""
    out = tmp_path_factory.mktemp("swept") / "sweep"
    return out, sweep(a_sweep(seeds=2), out, Running(jobs=1))


RUNS = {
    f"{point}-seed{seed}"
    for point in ("full-lr0.01", "hash-dim10-lr0.3", "hash-dim40-lr0.3")
    for seed in (0, 1)
}


def test_the_table(swept):
    out, result = swept[0], sweep_of(swept[0])
    assert SweepRecord.read(out) == swept[1]
    assert (result["format"], result["status"], result["failed"]) == (2, "complete", [])
    assert set(os.listdir(out)) == {"sweep.json", "runs"}
    assert set(os.listdir(out / "runs")) == RUNS
    assert result["config"]["dims"] == ["10", "40"]
    assert result["config"]["net"] == NET
    rows = [result["baseline"], *result["rows"]]
    assert [(row["method"], row["dim"], row["label"]) for row in rows] == [
        ("full", WEIGHTS, "full"),
        ("hash", 10, "10"),
        ("hash", 40, "40"),
    ]
    for row, name in zip(
        rows, ("full-lr0.01", "hash-dim10-lr0.3", "hash-dim40-lr0.3"), strict=True
    ):
        done = [record_of(out / "runs" / f"{name}-seed{seed}") for seed in (0, 1)]
        assert row["seeds"] == [0, 1]
        for key in ("test_score", "val_score", "seconds_total", "peak_memory_bytes"):
            assert row[key] == [record[key] for record in done]
        assert row["mean_test_score"] == pytest.approx(sum(row["test_score"]) / 2)
        assert row["stored_parameters"] == row["trainable_parameters"] == row["dim"]
        assert row["weights"] == WEIGHTS
        assert row["checkpoint_bytes"] == done[0]["checkpoint_bytes"]
        assert row["tried_lrs"] == {f"{row['lr']:g}": done[0]["val_score"]}
        assert [r["config"]["seed"] for r in done] == [0, 1]
        assert row["test_score"][0] != row["test_score"][1]
    expected = intrinsic_dimension(
        [10, 40], [row["test_score"] for row in rows[1:]], rows[0]["test_score"]
    )
    assert result["d_int"] == {"hash": to_json(expected)}


@pytest.fixture
def counted(monkeypatch):
    """The names of the runs that are trained."""
    names = []

    def watched(run, out, **other):
        names.append(out.name)
        return train(run, out, **other)

    train = module.train
    monkeypatch.setattr(module, "train", watched)
    return names


def test_complete_runs_are_not_repeated(swept, tmp_path, counted):
    out = copied(swept[0], tmp_path / "sweep")
    before = contents(out / "runs")
    seen = []
    again = sweep(a_sweep(seeds=2), out, Running(jobs=2, on_run=lambda _, left: seen.append(left)))
    assert again == swept[1]
    assert contents(out / "runs") == before
    assert counted == []
    assert seen == [5, 4, 3, 2, 1, 0]


def test_what_is_not_complete_is_repeated(swept, tmp_path, counted):
    out = copied(swept[0], tmp_path / "sweep")
    killed, gone = "hash-dim40-lr0.3-seed1", "full-lr0.01-seed0"
    record = record_of(out / "runs" / killed)
    (out / "runs" / killed / "record.json").write_text(json.dumps(record | {"status": "running"}))
    (out / "runs" / killed / "model.safetensors").unlink()
    (out / "runs" / gone / "record.json").unlink()
    (out / "runs" / gone / "model.safetensors").unlink()
    (out / ".sweep.json.x1.tmp").write_text("{")
    before = contents(out / "runs")
    again = sweep(a_sweep(seeds=2), out, Running(jobs=1))
    assert counted == [gone, killed]
    after = contents(out / "runs")
    assert {name.split("/")[0] for name in after if before.get(name) != after[name]} == {
        killed,
        gone,
    }
    assert again.rows[1].test_score == swept[1].rows[1].test_score
    assert again.d_int == swept[1].d_int
    assert set(os.listdir(out)) == {"sweep.json", "runs"}


def test_runs_on_other_samples_are_not_mixed(swept, tmp_path, counted):
    out = copied(swept[0], tmp_path / "sweep")
    records = {path.parent.name: path for path in out.glob("runs/*/record.json")}
    samples = {name: json.loads(path.read_text())["digest"] for name, path in records.items()}
    for seed in (0, 1):  # each of which has a validation part of its own
        assert len({value for name, value in samples.items() if name.endswith(str(seed))}) == 1
    assert len(set(samples.values())) == 2
    shutil.rmtree(records.pop("hash-dim10-lr0.3-seed1").parent)
    for name, path in records.items():
        edited(path, digest=samples[name] + name.endswith("1"))
    with pytest.raises(SubspanError, match="was trained on other samples than runs before, as if"):
        sweep(a_sweep(seeds=2), out, Running(jobs=1))
    assert counted == ["hash-dim10-lr0.3-seed1"]


def test_seeds_on_other_samples_than_the_first_are_not_begun(swept, tmp_path, counted):
    out = copied(swept[0], tmp_path / "sweep")
    for path in out.glob("runs/*/record.json"):
        if path.parent.name.endswith("seed1"):
            shutil.rmtree(path.parent)
        else:
            edited(path, digest=json.loads(path.read_text())["digest"] + 1)
    with pytest.raises(SubspanError, match="samples are others now than those of runs before"):
        sweep(a_sweep(seeds=2), out, Running(jobs=1))
    assert counted == []


def test_the_versions_are_those_of_the_runs(swept, tmp_path):
    """Not of the process that wrote the record last; runs of two machines are told."""
    out = copied(swept[0], tmp_path / "sweep")
    first, *_ = runs = sorted((out / "runs").iterdir())
    edited(first / "record.json", versions={"torch": "2.0"}, device="abacus")
    found = sweep(a_sweep(seeds=2), out)
    now = swept[1]
    assert found.versions == now.versions | {"torch": f"2.0; {now.versions['torch']}"}
    assert found.device == f"{now.device}; abacus"
    for run in runs:
        edited(run / "record.json", versions={"torch": "2.0"}, device="abacus")
    found = sweep(a_sweep(seeds=2), out)
    assert (found.versions, found.device) == ({"torch": "2.0"}, "abacus")


def test_a_sweep_is_widened_with_overwrite(swept, tmp_path, counted):
    """A sweep replaces another configuration's files; runs that are the same are kept."""
    out = copied(swept[0], tmp_path / "sweep")
    before = contents(out)
    wider = a_sweep(seeds=2, dims=("10", "20", "40"))
    with pytest.raises(SubspanError, match=r"another configuration \(dims \['10', '40'\] → "):
        sweep(wider, out, Running(jobs=1))
    assert contents(out) == before
    result = sweep(wider, out, Running(jobs=1, overwrite=True))
    assert counted == ["hash-dim20-lr0.3-seed0", "hash-dim20-lr0.3-seed1"]
    assert [row.dim for row in result.rows] == [10, 20, 40]


TWO = """
from subspan.sweeps.running import Running
from subspan.sweeps.sweep import sweep
from tests.processes import fork_workers
from tests.runs import a_sweep

fork_workers()
sweep(a_sweep(seeds=2), "sweep", Running(jobs=2))
"""


def test_two_processes_give_the_same(swept, tmp_path):
    python_code(TWO, tmp_path, OMP_NUM_THREADS="1")
    parallel = SweepRecord.read(tmp_path / "sweep")
    for ours, theirs in zip(parallel.rows, swept[1].rows, strict=True):
        assert ours.test_score == theirs.test_score
        assert ours.val_score == theirs.val_score
    assert parallel.d_int == swept[1].d_int
    assert set(os.listdir(tmp_path / "sweep" / "runs")) == RUNS


def test_runs_and_sweeps_agree_on_a_run(swept):
    """A run of a sweep is what ``train`` would have made of it."""
    record = record_of(swept[0] / "runs" / "hash-dim40-lr0.3-seed1")
    assert record["config"] == a_run(dim="40", seed=1).as_dict()


@pytest.mark.slow
def test_runs_of_several_processes(tmp_path):
    """Started by torchrun; what one of them cannot do is said."""
    config = a_sweep(methods=("rbd",), dims=("20",), lrs=(1.0,), baseline=None, processes=2)
    result = sweep(config, tmp_path / "out", Running(jobs=1))
    assert result.failed == []
    [row] = result.rows
    [run] = (tmp_path / "out" / "runs").iterdir()
    record = record_of(run)
    assert (record["processes"], record["config"]["options"]) == (2, {"dim": 20})
    assert row.bytes_sent_per_step == [record["bytes_sent_per_step"]]
    before = contents(run)
    assert sweep(config, tmp_path / "out", Running(jobs=1)).rows == [row]
    assert contents(run) == before
    odd = a_sweep(
        methods=("rbd",), dims=("20",), lrs=(1.0,), baseline=None, processes=2, batch_size=127
    )
    with pytest.raises(SubspanError, match="batch_size must be a multiple of the 2 processes"):
        sweep(odd, tmp_path / "odd", Running(jobs=1))
    assert not (tmp_path / "odd").exists()


# ---- records that were edited, damaged, or are newer ---------------------------------------------


def edited(path, **values):
    record = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not ...}))


DAMAGE = {
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:99]), "is damaged or no record"),
    "empty": (lambda path: path.write_text(""), "is damaged or no record of subspan"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe"), "is damaged or no record of subspan"),
    "newer": (lambda path: edited(path, format=99), "has format 99; .* reads up to 2: upgrade"),
    "no format": (lambda path: edited(path, format="1"), r"\(its format is '1'\): restore it"),
    "no config": (lambda path: edited(path, config=...), "it lacks config"),
    "other config": (
        lambda path: edited(path, config=json.loads(path.read_text())["config"] | {"epochs": 9}),
        r"belongs to another configuration \(epochs 9 → 1\): give another --out, or --overwrite",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_sweep(damage, swept, tmp_path, counted):
    """It is refused, and changed only when that is asked for; no run is repeated."""
    out = copied(swept[0], tmp_path / "sweep")
    do, message = DAMAGE[damage]
    do(out / "sweep.json")
    before = contents(out)
    with pytest.raises(SubspanError, match=message) as refused:
        sweep(a_sweep(seeds=2), out, Running(jobs=1))
    assert "--overwrite" in str(refused.value)
    assert contents(out) == before
    assert sweep(a_sweep(seeds=2), out, Running(jobs=1, overwrite=True)) == swept[1]
    assert counted == []


MEASURED = {
    f"{name} {value!r}": (
        lambda path, name=name, value=value: edited(path, **{name: value}),
        f"is damaged in line 1: {name} {message}",
    )
    for name, value, message in (
        ("val_score", ..., "is missing"),
        ("val_score", "0.5", "must be a number, got '0.5'"),
        ("test_score", None, "must be a number, got None"),
        ("weights", True, "must be an integer, got True"),
    )
}


@pytest.mark.parametrize("damage", DAMAGE | MEASURED)
def test_a_damaged_run(damage, swept, tmp_path, counted):
    """It fails alone, with its files as they are; and is repeated when that is asked for."""
    out = copied(swept[0], tmp_path / "sweep")
    name = "hash-dim40-lr0.3-seed1"
    do, message = (DAMAGE | MEASURED)[damage]
    do(out / "runs" / name / "record.json")
    before = contents(out / "runs")
    result = sweep(a_sweep(seeds=2), out, Running(jobs=1))
    [failure] = result.failed
    assert failure.run == name
    assert re.search(message, failure.error)
    assert "--overwrite" in failure.error
    assert result.rows[1].seeds == [0]
    assert contents(out / "runs") == before
    assert counted == []
    again = sweep(a_sweep(seeds=2), out, Running(jobs=1, overwrite=True))
    assert counted == [name]
    assert again.rows[1].test_score == swept[1].rows[1].test_score
