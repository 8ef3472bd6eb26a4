"""The runs, choices and refusals of a sweep, with runs that are made up."""

from __future__ import annotations

import errno
import os

import joblib
import pytest

import subspan.sweeps.worker as module
from subspan import files
from subspan.errors import SubspanError
from subspan.sweeps.growth import GrowthPlan
from subspan.sweeps.result import Failure, Published, SweepRecord
from subspan.sweeps.running import Running
from subspan.sweeps.sweep import sweep, total_runs
from subspan.training.records import CompleteRun
from subspan.training.schema import to_json
from subspan.training.train import prepare
from tests.runs import a_sweep, contents, copied, sweep_of


class MadeUp:
    """In place of training: accuracies by method, learning rate and seed, or an error."""

    def __init__(self, validation, test=lambda run: 0.5):
        self.validation, self.test, self.runs = validation, test, []

    def __call__(self, run, out, *, overwrite, stop, log):
        self.runs.append(out.name)
        ready = prepare(run)
        found = self.validation(run)
        if isinstance(found, BaseException):
            raise found
        counts = ready.method.counts(ready.model)
        return CompleteRun(
            status="complete",
            config=run.as_dict(),
            val_score=found,
            test_score=self.test(run),
            seconds_total=1.0,
            seconds_per_step=0.1,
            peak_memory_bytes=10,
            checkpoint_bytes=900,
            device="made up",
            **counts,
        )


def made_up(monkeypatch, validation, **other):
    runs = MadeUp(validation, **other)
    monkeypatch.setattr(module, "train", runs)
    return runs


def test_the_rate_is_chosen_on_validation_by_the_first_seed(tmp_path, monkeypatch):
    """Whatever the test set says; at every d anew, and for the baseline among its own."""
    best = {"full": 0.02, "10": 0.1, "40": 0.3}

    def validation(run):
        d = run.options.get("dim", "full")
        return (0.9 if run.lr == best[d] else 0.6) if run.seed == 0 else 0.1

    runs = made_up(monkeypatch, validation, test=lambda run: 0.2 if validation(run) == 0.9 else 0.8)
    config = a_sweep(seeds=3, lrs=(0.1, 0.3), baseline_lrs=(0.01, 0.02, 0.03))
    result = sweep(config, tmp_path, Running(jobs=1))
    assert [row.lr for row in [result.baseline, *result.rows]] == [0.02, 0.1, 0.3]
    assert result.rows[0].tried_lrs == {"0.1": 0.9, "0.3": 0.6}
    assert result.rows[0].test_score == [0.2, 0.8, 0.8]
    assert len(runs.runs) == total_runs(config) == 3 + 2 + 2 + 3 * 2
    # The first seed at all rates, those with most coordinates first; then the others at the best.
    assert runs.runs[:3] == [f"hash-dim{d}-seed0" for d in ("40-lr0.3", "40-lr0.1", "10-lr0.3")]
    assert sorted(runs.runs[7:]) == [
        f"{name}-seed{seed}"
        for name in ("full-lr0.02", "hash-dim10-lr0.1", "hash-dim40-lr0.3")
        for seed in (1, 2)
    ]


def test_a_run_that_fails_is_reported_and_the_others_go_on(tmp_path, monkeypatch):
    def validation(run):
        if run.options.get("dim") == "40":
            return SubspanError("the loss stopped being finite") if run.lr == 0.3 else 0.7
        if run.options.get("dim") == "20":
            return ZeroDivisionError("a bug")
        return 0.8

    made_up(monkeypatch, validation)
    seen, states = [], []

    def on_run(outcome, left):
        seen.append((outcome.job.name, outcome.status == "done"))
        states.append(sweep_of(tmp_path))

    config = a_sweep(seeds=2, lrs=(0.1, 0.3), dims=("10", "20", "40"))
    result = sweep(config, tmp_path, Running(jobs=1, on_run=on_run))
    assert result.status == "complete"
    assert result.failed == [
        Failure("hash-dim20-lr0.1-seed0", "ZeroDivisionError: a bug"),
        Failure("hash-dim20-lr0.3-seed0", "ZeroDivisionError: a bug"),
        Failure("hash-dim40-lr0.3-seed0", "the loss stopped being finite"),
    ]
    # Of equal rates the first, whichever was done first.
    assert [(row.dim, row.lr) for row in result.rows] == [(10, 0.1), (40, 0.1)]
    assert len(result.rows[1].seeds) == 2
    assert ("hash-dim40-lr0.3-seed0", False) in seen
    assert ("hash-dim10-lr0.1-seed1", True) in seen
    # The file is brought up to date with each.
    assert [state["status"] for state in states] == ["running"] * len(states)
    assert len(states[0]["rows"]) + len(states[0]["failed"]) == 1
    assert states[-1]["rows"] == to_json(result.rows)


def test_all_runs_fail(tmp_path, monkeypatch):
    made_up(monkeypatch, lambda run: SubspanError("no"))
    result = sweep(a_sweep(seeds=2), tmp_path, Running(jobs=1))
    assert (result.rows, result.baseline, result.d_int) == ([], None, {})
    assert len(result.failed) == 3


def test_an_interrupt_leaves_what_is_done(tmp_path, monkeypatch):
    made_up(monkeypatch, lambda run: KeyboardInterrupt() if run.method == "full" else 0.5)
    with pytest.raises(KeyboardInterrupt):
        sweep(a_sweep(), tmp_path, Running(jobs=1))
    found = sweep_of(tmp_path)
    assert found["status"] == "interrupted"
    assert [row["dim"] for row in found["rows"]] == [10, 40]


def test_a_full_disk(tmp_path, monkeypatch):
    made_up(monkeypatch, lambda run: 0.5)
    done = []

    def no_space(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def on_run(*_):
        done.append(sweep_of(tmp_path))
        monkeypatch.setattr(files.os, "fsync", no_space)

    with pytest.raises(OSError, match="No space left"):
        sweep(a_sweep(), tmp_path, Running(jobs=1, on_run=on_run))
    assert sweep_of(tmp_path) == done[0]
    assert set(os.listdir(tmp_path)) == {"sweep.json", "runs"}


def test_the_threshold(tmp_path, monkeypatch):
    """Is that of the intrinsic dimension, interpolated on log d."""
    accuracy = {"full": 1.0, "10": 0.4, "40": 0.8}
    made_up(monkeypatch, lambda run: 0.5, test=lambda run: accuracy[run.options.get("dim", "full")])
    found = sweep(a_sweep(threshold=0.6), tmp_path, Running(jobs=1)).d_int["hash"]
    assert (found.threshold, found.target) == (0.6, 0.6)
    assert found.value == pytest.approx(20)


def test_no_baseline(tmp_path, monkeypatch):
    made_up(monkeypatch, lambda run: 0.5)
    result = sweep(a_sweep(baseline=None), tmp_path, Running(jobs=1))
    assert result.baseline is None
    assert result.d_int == {}
    assert [row.dim for row in result.rows] == [10, 40]


def test_a_baseline_that_gets_nothing_right(tmp_path, monkeypatch):
    made_up(monkeypatch, lambda run: 0.5, test=lambda run: 0.0)
    assert sweep(a_sweep(), tmp_path, Running(jobs=1)).d_int == {}


def test_the_baseline_among_the_methods(tmp_path, monkeypatch):
    """It is run once; and what has no axis has one point, and no intrinsic dimension."""
    runs = made_up(monkeypatch, lambda run: 0.5)
    result = sweep(a_sweep(methods=("full", "hash")), tmp_path / "a", Running(jobs=1))
    assert sorted(runs.runs) == [
        "full-lr0.01-seed0",
        "hash-dim10-lr0.3-seed0",
        "hash-dim40-lr0.3-seed0",
    ]
    assert (result.baseline.method, list(result.d_int)) == ("full", ["hash"])
    result = sweep(
        a_sweep(methods=("full", "hash"), baseline=None), tmp_path / "b", Running(jobs=1)
    )
    assert [(row.method, row.label) for row in result.rows] == [
        ("full", "full"),
        ("hash", "10"),
        ("hash", "40"),
    ]


def test_sums(tmp_path, monkeypatch):
    """Points have the compartments' dimensions; d of the curve counts all that is trained."""
    runs = made_up(monkeypatch, lambda run: 0.5)
    config = a_sweep(dims=("6+2", "20+10"), options={"compartments": "layer"})
    result = sweep(config, tmp_path, Running(jobs=1))
    assert [(row.dim, row.label) for row in result.rows] == [(8, "6+2"), (30, "20+10")]
    assert set(runs.runs) >= {"hash-dim6+2-lr0.3-seed0", "hash-dim20+10-lr0.3-seed0"}


def test_the_methods_own_rates(tmp_path, monkeypatch):
    runs = made_up(monkeypatch, lambda run: 0.5)
    sweep(a_sweep(lrs=(), baseline_lrs=(), dims=("100",)), tmp_path, Running(jobs=1))
    assert sorted(runs.runs) == [
        *(f"full-lr{lr}-seed0" for lr in ("0.0003", "0.001", "0.003")),
        *(f"hash-dim100-lr{lr}-seed0" for lr in ("0.1", "0.3", "0.9")),
    ]


def test_options_go_to_the_methods_that_have_them(tmp_path, monkeypatch):
    seen = {}

    def validation(run):
        seen[run.method] = run.options
        return 0.5

    made_up(monkeypatch, validation)
    config = a_sweep(
        methods=("hash", "sparse"), dims=("10",), options={"s": 4.0, "exclude": "fc1.bias"}
    )
    sweep(config, tmp_path, Running(jobs=1))
    assert seen == {
        "full": {},
        "hash": {"dim": "10", "exclude": "fc1.bias"},
        "sparse": {"dim": "10", "exclude": "fc1.bias", "s": 4.0},
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dims": ("10", "abc")}, "dim must be a positive integer"),
        ({"dims": ("10", "611")}, "dim=611 must be .* at most the number of weights, 610"),
        ({"dims": ("10", "0")}, "dim must be a positive integer"),
        (
            {"dims": ("10", "010")},
            "dim10 and dim010 are one point of the curve of hash, 10 numbers",
        ),
        (
            {"dims": ("6+2", "2+6"), "options": {"compartments": "layer"}},
            "are one point of the curve",
        ),
        ({"methods": ("hash", "hsh")}, "unknown method 'hsh': did you mean hash"),
        ({"baseline": "none"}, "unknown method 'none'"),
        (
            {"baseline": "rademacher"},
            "baseline 'rademacher' is varied by dim and has no one accuracy",
        ),
        ({"options": {"s": 3}}, "unknown option of hash 's'"),
        (
            {"methods": ("full",), "baseline": None, "options": {"s": 3}},
            "unknown option of full",
        ),
        ({"options": {"exclude": "nope"}}, "unknown pattern in exclude .* 'nope'"),
        ({"net": "lenet"}, "images of at least 12x12 pixels"),
        ({"net": "nope"}, "unknown net 'nope'"),
        ({"options": {"bits": -1.0}}, "bits must be a positive number of bits"),
        ({"options": {"bits": 3.0}, "patience": 2}, "leave --patience out"),
        ({"options": {"head_lr": -1.0, "train_fully": "fc2.bias"}}, "head_lr must be a positive"),
        ({"processes": 3}, "batch_size must be a multiple of the 3 processes"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(SubspanError, match=message):
        sweep(a_sweep(**settings), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("jobs", [0, -2])
def test_jobs(jobs, tmp_path):
    with pytest.raises(SubspanError, match=f"jobs must be at least 1, or -1 .* got {jobs}"):
        sweep(a_sweep(), tmp_path / "sweep", Running(jobs=jobs))
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jobs": "2"}, "jobs must be an integer, got '2'"),
        ({"jobs": 2.5}, "jobs must be an integer, got 2.5"),
        ({"jobs": None}, "jobs must be an integer, got None"),
        ({"overwrite": "no"}, "overwrite must be true or false, got 'no'"),
        ({"log": "tensorboard"}, r"log must be a tuple of texts, got .*: give \('tensorboard',\)"),
        ({"on_run": None}, "on_run must be a function, got None"),
        ({"backend": 1}, "unknown backend '1'"),
    ],
)
def test_how_runs_are_carried_out_is_checked_by_its_types(settings, message):
    with pytest.raises(SubspanError, match=message):
        Running(**settings)
    assert Running(jobs=2.0, log=[], say=print).jobs == 2


def test_a_sweep_is_given_as_its_dataclasses(tmp_path):
    with pytest.raises(SubspanError, match=r"^running must be a Running, got {'jobs': 1}"):
        sweep(a_sweep(), tmp_path / "sweep", {"jobs": 1})
    with pytest.raises(SubspanError, match=r"^config must be a Sweep, got {"):
        sweep(a_sweep().as_dict(), tmp_path / "sweep")
    with pytest.raises(SubspanError, match=r"^config must be a Growth, got Sweep"):
        GrowthPlan(a_sweep())
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("device", "jobs", "workers"), [("cpu", -1, 3), ("auto", -1, 1), ("auto", 2, 2), ("cpu", 9, 3)]
)
def test_a_job_for_every_core_but_one_for_a_gpu(device, jobs, workers, tmp_path, monkeypatch):
    """And no more than there are runs."""
    made_up(monkeypatch, lambda run: 0.5)
    seen = []

    def in_this_process(n_jobs, return_as, **other):
        seen.append(n_jobs)
        return parallel(1, return_as=return_as)

    parallel = joblib.Parallel
    monkeypatch.setattr(joblib, "Parallel", in_this_process)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 7)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    sweep(a_sweep(device=device), tmp_path, Running(jobs=jobs))
    assert seen == [workers] * (workers > 1)  # a single one at a time runs in this process


def test_folders_of_other_things(tmp_path, trained, monkeypatch):
    made_up(monkeypatch, lambda run: 0.5)
    out = copied(trained, tmp_path / "run")
    before = contents(out)
    with pytest.raises(SubspanError, match=r"has a record\.json of something else"):
        sweep(a_sweep(), out, Running(jobs=1))
    assert contents(out) == before
    # A run's folder that belongs to something else fails alone.
    runs = tmp_path / "sweep" / "runs"
    runs.mkdir(parents=True)
    copied(trained, runs / "hash-dim10-lr0.3-seed0")
    result = sweep(a_sweep(), tmp_path / "sweep", Running(jobs=1))
    (failure,) = result.failed
    assert failure.run == "hash-dim10-lr0.3-seed0"
    assert "belongs to another configuration" in failure.error
    assert [row.dim for row in result.rows] == [40]


def test_what_is_published_is_in_the_file_from_the_beginning_on(tmp_path, monkeypatch):
    made_up(monkeypatch, lambda run: 0.5)
    seen, curve = [], Published(label="Nobody 2026", dims=(5,), accuracy=(0.25,))
    result = sweep(
        a_sweep(),
        tmp_path,
        Running(jobs=1, on_run=lambda *_: seen.append(sweep_of(tmp_path)["published"][0]["dims"])),
        published=[curve],
    )
    assert result.published == [curve]
    assert seen == [[5]] * 3
    assert SweepRecord.read(tmp_path) == result
