"""The records of runs and sweeps: every committed one is read, and what does not fit is refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from subspan.errors import SubspanError
from subspan.sweeps.result import SweepRecord
from subspan.training.methods import method
from subspan.training.records import CompleteRun, Epoch, RunRecord, read_json
from subspan.training.schema import to_json
from subspan.training.train import train
from tests.runs import a_run, contents, copied, record_of

ROOT = Path(__file__).parents[2]
FILES = [
    path
    for folder in ("results", "benchmarks")
    for name in ("record.json", "sweep.json")
    for path in sorted((ROOT / folder).rglob(name))
]


def test_every_committed_record_is_read_and_would_be_written_as_it_is() -> None:
    """Fields that an older version did not know are added; nothing else changes, nor the order."""
    assert len(FILES) > 800
    for path in FILES:
        kind = RunRecord if path.name == "record.json" else SweepRecord
        record = kind.read(path.parent)
        raw = read_json(path)
        assert record is not None
        assert raw is not None
        assert isinstance(record, CompleteRun) == (
            kind is RunRecord and raw["status"] == "complete"
        )
        written = to_json(record)
        check_same(raw | {"format": 2}, written, str(path))


def check_same(raw: Any, written: Any, where: str) -> None:
    """A record is written as it was read, in the same order; fields that are added are empty."""
    if isinstance(raw, dict):
        assert [key for key in written if key in raw] == list(raw), where
        for key, value in written.items():
            if key in raw:
                check_same(raw[key], value, f"{where}: {key}")
            else:
                usual = {"processes": 1, "score": to_json(RunRecord.score)}
                assert value in (None, [], {}, "", usual.get(key)), (where, key)
    elif isinstance(raw, list):
        assert len(raw) == len(written), where
        for i, value in enumerate(raw):
            check_same(value, written[i], f"{where}: {i}")
    else:
        assert (type(raw), raw) == (type(written), written), where


def spoil(folder: Path, edit: Any) -> str:
    """Edit the record of a run and write it as we do; its text."""
    record = record_of(folder)
    edit(record)
    text = json.dumps(record, indent=1)
    (folder / "record.json").write_text(text)
    return text


SPOILT = {
    "a later format": (lambda r: r.update(format=3), "has format 3; .* reads up to 2: upgrade"),
    "a status": (lambda r: r.update(status="compleat"), r"record\.json .*its status is 'compleat'"),
    "no score": (lambda r: r.pop("test_score"), "line 1: test_score is missing"),
    "a text": (lambda r: r.update(weights="610"), r"weights must be an integer, got '610'"),
    "half a number": (lambda r: r.update(weights=610.5), "weights must be an integer"),
    "a truth value": (lambda r: r.update(val_score=True), "val_score must be a number, got True"),
    "nothing": (lambda r: r.update(checkpoint_bytes=None), "checkpoint_bytes must be an intege"),
    "per cent": (lambda r: r.update(test_score=93.1), "must be a fraction in"),
    "an epoch": (
        lambda r: r["history"][1].pop("val_loss"),
        r"history\[1\] lacks val_loss",
    ),
    "deep": (
        lambda r: r["history"][1].update(seconds="1"),
        r"history\[1\]\.seconds must be a number, got '1'",
    ),
    "a rate": (lambda r: r["config"].update(lr="fast"), r"config\.lr must be a number"),
    "no number": (lambda r: r.update(val_score=float("nan")), "NaN is no number of JSON"),
    "infinite": (lambda r: r.update(seconds_total=float("inf")), "Infinity is no number"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_does_not_fit_is_refused_and_left(how, trained, tmp_path, cli) -> None:
    """In one sentence, with exit code 2: by who trains, goes on, and reports."""
    edit, message = SPOILT[how]
    spoil(copied(trained, tmp_path / "run"), edit)
    before = contents(tmp_path)
    for argv in (
        ["report", tmp_path / "run"],
        ["train", "--resume", "--out", tmp_path / "run"],
    ):
        said = cli(*argv)
        assert said.code == 2, said
        assert len(said.err.strip().splitlines()) == 1
        assert "record.json" in said.err
        with pytest.raises(SubspanError, match=message):
            RunRecord.read(tmp_path / "run")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("edit", "key"),
    [
        (lambda r: r["history"][1].update(seconds="1"), '"seconds": "1"'),
        (lambda r: r.update(weights="many"), '"weights": "many"'),
        (lambda r: r["versions"].update(torch=2), '"torch": 2'),
        (lambda r: r.update(log=[3]), "3"),
    ],
)
def test_the_line_is_named(edit, key, trained, tmp_path) -> None:
    text = spoil(copied(trained, tmp_path / "run"), edit)
    lines = [i for i, line in enumerate(text.splitlines(), start=1) if line.strip(" ,") == key]
    with pytest.raises(SubspanError, match=rf"record\.json is damaged in line {lines[-1]}: "):
        RunRecord.read(tmp_path / "run")


def test_the_line_of_the_first_format_is_named(tmp_path) -> None:
    """The first format has other names of fields."""
    path = next(p for p in FILES if p.name == "record.json" and "val_accuracy" in p.read_text())
    text = path.read_text().replace('"val_accuracy": ', '"val_accuracy": "high", "was": ', 1)
    (tmp_path / "record.json").write_text(text)
    [line] = [i for i, row in enumerate(text.splitlines(), start=1) if '"high"' in row]
    with pytest.raises(SubspanError, match=f"in line {line}: val_score must be a number"):
        RunRecord.read(tmp_path)


def test_what_a_later_version_adds_is_no_error(trained, tmp_path) -> None:
    """A name that this version does not know; that of an epoch is a method's, and kept."""
    copied(trained, tmp_path / "run")

    def edit(record: dict[str, Any]) -> None:
        record["colour"] = "red"
        record["history"][0]["colour"] = {"red": 1}

    spoil(tmp_path / "run", edit)
    found = RunRecord.read(tmp_path / "run")
    assert found is not None
    assert found.history[0].more == {"colour": {"red": 1}}
    assert to_json(found.history[0])["colour"] == {"red": 1}


def test_committed_files_are_those_of_git() -> None:
    """The test above reads what is committed, and all of it."""
    names = ("*record.json", "*sweep.json")
    listed = subprocess.run(
        ["git", "ls-files", *(f"{top}/{n}" for top in ("results", "benchmarks") for n in names)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0 and listed.stdout:
        assert set(listed.stdout.split()) <= {str(path.relative_to(ROOT)) for path in FILES}


@pytest.mark.parametrize(
    ("says", "value", "message"),
    [
        ("counts", {"trainable_parameters": "many"}, "trainable_parameters must be an integer"),
        ("diagnose", {"ranks": {"fc1": 0.5}}, r"ranks\.fc1 must be an integer, got 0\.5"),
    ],
)
def test_what_a_method_says_is_checked(says, value, message, tmp_path, monkeypatch) -> None:
    """Before it gets into the record."""
    how = type(method("hash"))
    known = getattr(how, says)
    monkeypatch.setattr(how, says, lambda self, *about: known(self, *about) | value)
    with pytest.raises(SubspanError, match=f"the method hash says of the run: {message}"):
        train(a_run(dim=5), tmp_path / "run")
    assert (tmp_path / "run").exists() == (says == "diagnose")


def test_what_is_empty_is_left_out() -> None:
    """A method may leave such fields out of a row; elsewhere an empty value means nothing."""
    measured = {"epoch": 1, "train_loss": 0.5, "val_loss": 0.5, "val_score": 0.5}
    row: dict[str, Any] = measured | {"learning_rate": 0.1, "seconds": 1.0}
    assert to_json(Epoch(**row)) == row
    assert to_json(Epoch(**row, ranks={"fc": 3})) == row | {"ranks": {"fc": 3}}


def test_names_of_the_first_format_are_free_in_later_ones(trained, tmp_path) -> None:
    copied(trained, tmp_path / "run")
    spoil(tmp_path / "run", lambda r: r["history"][0].update(val_accuracy=0.25))
    found = RunRecord.read(tmp_path / "run")
    assert found is not None
    assert found.history[0].more == {"val_accuracy": 0.25}
    assert found.history[0].val_score != 0.25
