"""Training in random bases by the command line: journals, resume, many processes, what is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from subspan import SubspanError
from subspan.optim.journal import Journal
from subspan.report import pictures, read
from subspan.training.train import prepare, train
from tests import ranks
from tests.runs import NET, STEPS, a_run, record_of, train_up_to

RBD = ["train", "--net", NET, "--method", "rbd", "--dim", "20", "--out", "run"]
JOURNAL = "journal.subspan"


def weights_of(path):
    return safetensors.torch.load_file(path)


def test_a_run_says_what_its_bases_catch(tmp_path):
    record = train(a_run("rbd", lr=1.0, epochs=3, dim=20, compartments="layer"), tmp_path)
    for row in record.history:
        assert set(row.alignment) == {"fc1", "fc2", "all"}
        for found in row.alignment.values():
            assert 0 < found.cosine < 1
            assert 0 < found.share < 1
    run = read(tmp_path)
    axes = pictures.run_figure(run).axes
    assert [a.get_ylabel() for a in axes][2] == "gradient in the basis"
    labels = [line.get_label() for line in axes[2].lines]
    assert labels == ["all: cosine", "all: share of its norm", "fc1: cosine", "fc2: cosine"]
    assert record.trainable_parameters == 20
    assert record.stored_parameters == 610


def test_redrawn_bases_learn_more_than_one_that_stays(tmp_path):
    losses = {}
    for name in ("rbd", "fpd"):
        run = a_run(name, lr=1.0, epochs=10, batch_size=64, dim=20, schedule="cosine")
        losses[name] = train(run, tmp_path / name).history[-1].train_loss
    assert losses["rbd"] < losses["fpd"] - 0.1


def test_evaluations_alone_train_too(tmp_path):
    run = a_run("nes", lr=1.0, epochs=2, batch_size=256, dim=10)
    history = train(run, tmp_path).history
    assert history[-1].train_loss < history[0].train_loss
    assert not history[0].alignment


def test_replay_by_command(in_tmp_path, cli):
    assert cli(*RBD, "--epochs", 2, "--journal", "true").code == 0
    journal = f"run/{JOURNAL}"
    said = cli("replay", journal, "--out", "all.safetensors")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith(f"all.safetensors: the weights after {2 * STEPS} steps, ")
    assert cli("replay", journal, "--step", STEPS, "--out", "half.safetensors").code == 0
    assert cli("replay", journal, "--step", 0, "--out", "none.safetensors").code == 0
    best = record_of(in_tmp_path / "run")["best_epoch"]
    model = weights_of("run/model.safetensors")
    same = weights_of({1: "half.safetensors", 2: "all.safetensors"}[best])
    assert all(torch.equal(same[name], tensor) for name, tensor in model.items())
    # From a file of the initial weights the same comes out.
    words = ["replay", journal, "--base", "none.safetensors", "--out", "again.safetensors"]
    assert cli(*words).code == 0
    again, whole = weights_of("again.safetensors"), weights_of("all.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "100"], "has 11 steps, not 100"),
        (["--base", "run/model.safetensors"], "began with other weights"),
        (["--base", "run/record.json"], "is no safetensors file of weights"),
        (["--out", f"run/{JOURNAL}"], "would be overwritten"),
        (["--out", "no/where"], "give a file name in a folder that exists"),
    ],
)
def test_replay_refuses(in_tmp_path, cli, words, message):
    assert cli(*RBD, "--epochs", 1, "--journal", "true").code == 0
    said = cli("replay", f"run/{JOURNAL}", *words)
    assert said.code == 2
    assert message in said.err
    assert not Path("weights.safetensors").exists()


def test_a_journal_is_cut_by_its_own_steps(tmp_path):
    """There are fewer of them than of the training's steps where fp16 leaves some out."""
    run = a_run("rbd", lr=1.0, dim=20, journal=True)
    train(run, tmp_path)
    ready = prepare(run)
    state = {"param_groups": [{"steps": 3}]}
    ready.method.optimizer(ready.model, run, tmp_path, {}, steps=STEPS, resume=state)
    assert [move.step for move in Journal(tmp_path / JOURNAL).moves()] == [0, 1, 2]


@pytest.mark.parametrize("stop", [3, STEPS, STEPS + 4])
def test_a_run_goes_on_from_its_journal(tmp_path, stop, monkeypatch):
    run = a_run("rbd", lr=1.0, epochs=3, dim=20, schedule="cosine", journal=True)
    whole = train(run, tmp_path / "whole")
    train_up_to(stop, run, tmp_path / "parts")
    assert record_of(tmp_path / "parts")["status"] == "failed"
    resumed = []
    record = train(run, tmp_path / "parts", on_step=lambda: resumed.append(1))
    # From the state after an epoch; the journal's later steps are made again, to the same bits.
    assert len(resumed) == 3 * STEPS - (stop - 1) // STEPS * STEPS
    assert record.test_score == whole.test_score
    for key in ("train_loss", "val_loss", "val_score", "alignment"):
        assert [getattr(row, key) for row in record.history] == [
            getattr(row, key) for row in whole.history
        ]
    files = [tmp_path / name / JOURNAL for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    models = [weights_of(tmp_path / name / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(models[1][name], tensor) for name, tensor in models[0].items())


def test_a_run_does_not_go_on_from_a_journal_that_lost_steps(tmp_path):
    """A machine that loses its power may lose them so."""
    run = a_run("rbd", lr=1.0, epochs=2, dim=20, journal=True)
    train_up_to(STEPS + 1, run, tmp_path)
    Journal(tmp_path / JOURNAL).cut(before=STEPS - 1)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SubspanError, match=f"saved after {STEPS} steps, and .*has {STEPS - 1}"):
        train(run, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_another_configuration_begins_a_journal_of_its_own(tmp_path):
    train(a_run("rbd", lr=1.0, dim=20, journal=True), tmp_path)
    first = (tmp_path / JOURNAL).read_bytes()
    record = train(a_run("rbd", lr=0.5, dim=10, journal=True), tmp_path, overwrite=True)
    assert record.status == "complete"
    assert (tmp_path / JOURNAL).read_bytes() != first


def test_bad_options(tmp_path):
    for options, message in (
        ({"workers": "all"}, "workers must be shared or independent, got 'all'"),
        ({"distribution": "hush"}, "unknown distribution 'hush'"),
        ({"momentum": 0.9}, "momentum needs a basis that stays"),
        ({}, "needs --dim"),
    ):
        dim = {"dim": 20} if options else {}
        with pytest.raises(SubspanError, match=message):
            train(a_run("rbd", **dim | options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- many processes ------------------------------------------------------------------------------

DYING = """
import os
import torch
from torch import nn

class Net(nn.Sequential):
    def forward(self, x):
        if self.training and os.environ["RANK"] == "1" and "DIE" in os.environ:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os._exit(3)
        return super().forward(x)

def build(input_shape, classes):
    torch.manual_seed(0)
    return Net(nn.Flatten(), nn.Linear(64, classes))
"""


def torchrun(folder, *words, restarts=0, **env):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        f"--max-restarts={restarts}",
        "-m",
        "subspan.cli",
    ]
    return subprocess.run(
        [*command, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )


@pytest.mark.parametrize("workers", ["shared", pytest.param("independent", marks=pytest.mark.slow)])
def test_two_processes(tmp_path, workers):
    words = [*RBD, "--workers", workers, "--epochs", "2", "--journal", "true"]
    for program in ranks.start(["-m", "subspan.cli", *words], 2, tmp_path):
        assert program.communicate()[1] == ""
        assert program.poll() == 0
    record = record_of(tmp_path / "run")
    assert (record["status"], record["processes"]) == ("complete", 2)
    steps = json.loads((tmp_path / "run" / "record.json").read_text())["history"]
    assert len(steps) == 2
    # 20 numbers with what frames them, and a journal's record; 610 weights' would be 2,440 bytes.
    assert 80 < record["bytes_sent_per_step"] < 1500
    if workers == "shared":
        alone = train(a_run("rbd", lr=1.0, epochs=2, dim=20, batch_size=128), tmp_path / "alone")
        # One process takes the smaller last batch, too: close, not equal.
        assert record["history"][0]["train_loss"] == pytest.approx(
            alone.history[0].train_loss, rel=0.05
        )


@pytest.mark.slow
def test_a_worker_dies_and_the_job_goes_on(tmp_path):
    (tmp_path / "mine.py").write_text(DYING)
    words = [
        "train",
        "--net",
        "mine:build",
        "--method",
        "rbd",
        "--dim",
        "20",
        "--epochs",
        "2",
        "--journal",
        "true",
    ]
    said = torchrun(tmp_path, *words, "--out", "run", restarts=1, DIE="1")
    assert said.returncode == 0, said.stderr
    # Whoever is first says it: torchrun, which then ends the others, or they themselves.
    assert "local_rank: 1 " in said.stderr or "rank 1 is lost" in said.stderr
    assert torchrun(tmp_path, *words, "--out", "whole").returncode == 0
    ours, whole = record_of(tmp_path / "run"), record_of(tmp_path / "whole")
    assert ours["status"] == "complete"
    assert ours["test_score"] == whole["test_score"]
    journals = [(tmp_path / name / JOURNAL).read_bytes() for name in ("run", "whole")]
    assert journals[0] == journals[1]
    again = torchrun(tmp_path, *words, "--out", "other", DIE="1")
    assert again.returncode != 0
    assert record_of(tmp_path / "other")["status"] != "complete"
