"""Output: plain whole lines where there is no terminal, and names as they are."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from subspan.cli import main
from subspan.commands import console, doctor
from subspan.commands.doctor import Check
from subspan.commands.sweep import show_runs, show_sweep
from subspan.commands.train import show_progress, show_result
from subspan.errors import SubspanError
from subspan.sweeps.intrinsic import IntrinsicDimension
from subspan.sweeps.job import Job, Outcome
from subspan.sweeps.result import Failure, PointRecord, SweepRecord
from subspan.training.records import CompleteRun, Epoch
from subspan.training.schema import to_json
from subspan.training.score import Score
from tests.runs import a_run

RECORD = CompleteRun(
    status="complete",
    config={"method": "hash", "lr": 0.1, "seed": 0},
    test_score=0.98765,
    val_score=0.5,
    trainable_parameters=750,
    stored_parameters=750,
    weights=159_010,
    checkpoint_bytes=3_700,
    seconds_total=12.34,
    seconds_per_step=0.1,
    peak_memory_bytes=10,
    notes=["[b]no[/b] test part :smile:"],
)
ROW = Epoch(epoch=3, train_loss=0.5, val_loss=0.25, val_score=0.875, learning_rate=0.1, seconds=1.5)


LONG = "a-method-with-a-very-long-name-indeed-it-is"


def row(method, dim, accuracies):
    return PointRecord(
        method=method,
        dim=dim,
        label=str(dim),
        lr=0.1,
        test_score=accuracies,
        trainable_parameters=dim,
        stored_parameters=dim,
        weights=159_010,
        checkpoint_bytes=4 * dim,
        seconds_total=[1.0] * len(accuracies),
    )


SWEEP = SweepRecord(
    status="complete",
    config={},
    baseline=row("full", 159_010, [0.9, 0.92]),
    rows=[row(LONG, 1000, [0.8, 0.82])],
    d_int={
        "hash": IntrinsicDimension(300.4, 250.0, 399.6, 0.8, 0.9, "a note"),
        "sparse": IntrinsicDimension(None, None, None, 0.8, 0.995, "not reached: x"),
        "gaussian": IntrinsicDimension(20.0, None, 30.0, 0.8, 0.9, ""),
    },
    failed=[Failure("hash-dim10", "shape [1, 28] [/red] is wrong " + "x" * 200)],
)


ACCURACY = (
    "test accuracy 98.77 %, 750 numbers stored for 159,010 weights (212 times fewer), 3,700 bytes, "
    "12.3 s"
)


def test_lines_are_whole(capsys, monkeypatch):
    """Names with brackets and colons are no markup; nothing is wrapped at 80 columns."""
    out = Path("runs") / ("[red]" + "y" * 100)
    show_result(RECORD, out, complete_before=False)
    show_sweep(SWEEP, [out / "curve.png", out / "curve.svg", out / "report.html"])
    console.print_facts({"net": "a:b:c", "extra": {"shape": [1, 2]}, "empty": {}, "n": 12345})
    checks = [Check("[x]", True, "[y]"), Check("z", False, "w")]
    monkeypatch.setattr(doctor, "run_checks", lambda: checks)
    with pytest.raises(SubspanError, match=r"^failed checks: z$"):
        doctor.main([])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.strip() and line.isprintable() for line in lines)
    expected = [
        ACCURACY,
        "note: [b]no[/b] test part :smile:",
        f"model:  {out}/model.safetensors",
        f"record: {out}/record.json",
        "intrinsic dimension of hash, 90 % of the baseline: 300 [250, 400] (a note)",
        "intrinsic dimension of sparse, 99.5 % of the baseline: not reached: x",
        "intrinsic dimension of gaussian, 90 % of the baseline: 20",
        "failed: hash-dim10: shape [1, 28] [/red] is wrong " + "x" * 200,
        f"picture: {out}/curve.png",
        f"report: {out}/report.html",
        "net: a:b:c",
        "extra:",
        "  shape: [1, 2]",
        "empty: {}",
        "n: 12,345",
        "ok   [x]: [y]",
        "FAIL z: w",
    ]
    assert [line for line in lines if line in expected] == expected
    table = [" ".join(line.split()) for line in lines]
    assert "full 159,010 0.1 91.00 ± 1.41 2 159,010 636,040 1.0" in table
    assert f"{LONG} 1,000 0.1 81.00 ± 1.41 2 1,000 4,000 1.0" in table


@pytest.mark.parametrize("width", [20, 80])
def test_tables_are_whole_on_a_narrow_terminal(width, monkeypatch):
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=width, highlight=False, markup=False)
    monkeypatch.setattr(console, "console", terminal)
    show_sweep(SWEEP, [])
    lines = [" ".join(line.split()) for line in file.getvalue().splitlines()]
    assert f"{LONG} 1,000 0.1 81.00 ± 1.41 2 1,000 4,000 1.0" in lines
    assert "…" not in file.getvalue()


def test_a_run_that_was_complete(capsys):
    record = replace(RECORD, stored_parameters=159_010, notes=[])
    show_result(record, Path("a"), complete_before=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "complete already, not repeated"
    assert lines[1].startswith("test accuracy 98.77 %, 159,010 numbers stored, 3,700 bytes")


def progress_of_everything():
    with show_progress(a_run(dim=5, net="[x]")) as progress:
        progress.start(100, 0, Score())
        for _ in range(100):
            progress.step()
        progress.epoch(ROW)
    with show_runs(2) as done:
        done(Outcome(Job("[a]", a_run(dim=5)), "done", RECORD), 1)
        for name in "bc":
            error = {"error": "it [failed]", "traceback": "here\n"}
            done(Outcome(Job(name, a_run(dim=5)), "failed", **error), 0)


def test_progress_without_a_terminal(capsys, monkeypatch):
    progress_of_everything()
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "[x] on digits, hash, lr 0.3: 100 steps",
        "epoch   3/1  train loss 0.5000  validation loss 0.2500  accuracy 87.50 %  1.5 s",
        "[a]: validation 50.00 %, 12.3 s",
        "here",
        "b failed: it [failed]",
        "c failed: it [failed]",
    ]
    monkeypatch.setenv("RANK", "1")
    with show_progress(a_run(dim=5)) as progress:
        progress.epoch(ROW)
    assert capsys.readouterr().out == ""


@pytest.fixture(autouse=True)
def loud():
    """One test is about silence."""
    yield
    console.console.quiet = False


def test_progress_on_a_terminal(monkeypatch):
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=100, highlight=False, markup=False)
    monkeypatch.setattr(console, "console", terminal)
    progress_of_everything()
    assert "[x] on digits, hash, lr 0.3: 100 steps" in file.getvalue()
    assert "100/100" in file.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_that_the_encoding_lacks(encoding, monkeypatch, in_tmp_path):
    """In a container with LC_ALL=C a sweep ended in an error at the ± of its table."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    folder = Path(os.fsdecode(b"folder-\xff"))
    folder.mkdir()
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--method", "hash", "--help"])
    (folder / "record.json").write_text(json.dumps(to_json(RECORD)))
    assert main(["report", str(folder)]) == 0
    text = written.getvalue().decode(encoding)
    assert r"folder-\udcff" in text
    assert ("wandb, trackio, …" in text) == (encoding == "utf-8")
