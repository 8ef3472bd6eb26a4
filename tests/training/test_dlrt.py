"""Low-rank training by the command line: ranks in records and pictures, counts, sweeps over τ."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from subspan import SubspanError, checkpoint, report
from subspan.layers import LowRank
from subspan.report import pictures, read
from subspan.sweeps.running import Running
from subspan.sweeps.sweep import sweep
from subspan.training import nets
from subspan.training.evaluate import rebuild
from subspan.training.train import train
from tests.runs import NET, a_run, a_sweep, record_of

DLRT = ["train", "--net", NET, "--method", "dlrt", "--out", "run"]


def dlrt(**settings):
    return a_run("dlrt", lr=0.01, **settings)


def test_a_run_records_ranks_and_singular_values(tmp_path):
    record = train(dlrt(epochs=3, tolerance=0.4, batch_size=64), tmp_path)
    rows = record.history
    assert [set(row.ranks) for row in rows] == [{"fc1"}] * 3
    assert rows[-1].ranks["fc1"] < 7
    for row in rows:
        values = row.singular_values["fc1"]
        assert len(values) == row.ranks["fc1"]
        assert values == sorted(values, reverse=True)
    best = rows[record.best_epoch - 1].ranks
    assert record.ranks == best
    r = best["fc1"]
    assert record.weights == 610
    assert record.counts["to run it"] == r * (64 + 8) + 8 + 90
    assert record.stored_parameters == record.counts["to run it"] + r * r
    _, tensors = checkpoint.read(tmp_path / "model.safetensors")
    assert tensors["fc1.S"].shape == (r, r)


def test_the_picture_of_a_run(tmp_path):
    train(dlrt(epochs=2, tolerance=0.3, targets=["fc1", "fc2"]), tmp_path)
    axes = pictures.run_figure(read(tmp_path)).axes
    assert [a.get_ylabel() for a in axes] == ["loss", "accuracy (%)", "rank", "singular value"]
    for panel in axes[2:]:
        assert [line.get_label() for line in panel.lines] == ["fc1", "fc2"]
    report.write(tmp_path)
    assert "Ranks and counts" in (tmp_path / "report.html").read_text()


def test_a_sweep_over_tolerances(tmp_path):
    config = a_sweep(
        methods=("dlrt",),
        dims=("0.01", "0.3", "0.7"),
        lrs=(0.01,),
        epochs=2,
        batch_size=64,
        seeds=2,
    )
    result = sweep(config, tmp_path, Running(jobs=1))
    assert not result.failed
    assert [row.label for row in result.rows] == ["0.01", "0.3", "0.7"]
    numbers = [row.dim for row in result.rows]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[-1] < numbers[0]
    assert [len(row.ranks) for row in result.rows] == [2, 2, 2]
    assert result.d_int == {}
    report.write(tmp_path)
    figure = pictures.sweep_figure(read(tmp_path))
    assert figure.axes[0].get_xlabel() == "numbers trained, on average over seeds"


def test_a_given_size_is_reached(tmp_path):
    record = train(a_run("dlrt-ratio", lr=0.01, epochs=2, target_ratio=0.6), tmp_path)
    r = record.ranks["fc1"]
    assert r * (64 + 8) <= 0.4 * 512 < (r + 1) * (64 + 8)


@pytest.mark.parametrize("adapt_at", [0.5, 1.0])
def test_dense_training_and_then_truncation(adapt_at, tmp_path):
    options = {"target_ratio": 0.6, "rank": "full", "adapt_at": adapt_at, "freeze_at": adapt_at}
    record = train(a_run("dlrt-ratio", lr=0.01, epochs=4, **options), tmp_path)
    ranks = [row.ranks["fc1"] for row in record.history]
    r = 0.4 * 512 // (64 + 8)
    assert ranks == ([8, 8, r, r] if adapt_at == 0.5 else [8, 8, 8, r])
    # However much better it was before.
    assert record.ranks == {"fc1": r}
    assert record.best_epoch in ((3, 4) if adapt_at == 0.5 else (4,))
    assert record.val_score == record.history[record.best_epoch - 1].val_score


@pytest.mark.parametrize("integrator", ["parallel", "kls", "kls-adaptive", "vanilla"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_every_integrator_learns(integrator, optimizer, tmp_path):
    fixed = integrator in ("kls", "vanilla")
    settings = {"rank": 4} if fixed else {"tolerance": 0.1}
    settings |= {"integrator": integrator, "optimizer": optimizer, "batch_size": 64, "epochs": 3}
    record = train(a_run("dlrt", lr=0.1 if optimizer == "sgd" else 0.01, **settings), tmp_path)
    losses = [row.train_loss for row in record.history]
    assert losses[-1] < losses[0] - 0.2
    if fixed:
        assert record.ranks == {"fc1": 4}


def test_a_sweep_over_what_is_no_number(tmp_path):
    with pytest.raises(
        SubspanError, match=r"of dlrt dims lists values of tolerance, .* got '5[+]6'"
    ):
        sweep(a_sweep(methods=("dlrt",), dims=("5+6",)), tmp_path)


def test_by_command(in_tmp_path, cli):
    said = cli(*DLRT, "--tolerance", 0.3, "--epochs", 1)
    assert (said.code, said.err) == (0, "")
    found = json.loads((in_tmp_path / "run" / "record.json").read_text())
    assert found["config"]["options"] == {"tolerance": 0.3}
    accuracy = found["test_score"]
    said = cli("eval", "run/model.safetensors")
    assert f"test_accuracy: {accuracy}" in said.out
    assert "kind: lowrank" in cli("inspect", "run/model.safetensors").out
    assert cli("export", "run/model.safetensors", "weights.safetensors").code == 0
    plain = nets.build(NET, (1, 8, 8))
    plain.load_state_dict(safetensors.torch.load_file("weights.safetensors"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tolerance", "1"], "tolerance must be in [0, 1), got 1.0"),
        (["--tolerance", "abc"], "tolerance must be a number or null, got abc"),
        (
            ["--tolerance", "0.1", "--freeze-at", "2"],
            "freeze_at must be a share in [0, 1], got 2.0",
        ),
        (["--tolerance", "0.1", "--tolerance-warmup", "-1"], "tolerance_warmup must be a share in"),
        (["--tolerance", "0.1", "--integrator", "kls"], "integrator 'kls' keeps ranks as they are"),
        (["--integrator", "kls-adaptive"], "'kls-adaptive' needs a tolerance or a target_ratio"),
        (["--rank", "0"], "rank must be at least 1, or full, got 0"),
        (["--rank", "ful"], "rank must be at least 1, or full, got 'ful'"),
        (["--target-ratio", "0.5", "--tolerance", "0.1"], "give a tolerance or a target_ratio"),
        (["--targets", "fc3"], "in targets (it matches no layer) 'fc3'"),
        (["--exclude", ".*"], "there is no layer to factorise"),
        (["--dim", "5"], "unknown option of dlrt 'dim'"),
    ],
)
def test_bad_commands(options, said, in_tmp_path, cli):
    found = cli(*DLRT, *options)
    assert found.code == 2
    assert said in found.err
    assert not (in_tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """By torchrun: gradients of the factors are averaged, ranks stay together."""
    results = {}
    for processes in (1, 2):
        config = a_sweep(
            methods=("dlrt",),
            dims=("0.3",),
            lrs=(0.01,),
            baseline=None,
            processes=processes,
            batch_size=128,
        )
        result = sweep(config, tmp_path / str(processes), Running(jobs=1))
        assert not result.failed, result.failed
        [folder] = (tmp_path / str(processes) / "runs").iterdir()
        results[processes] = record_of(folder)
        assert results[processes]["processes"] == processes
    # One process trains on the last, smaller batch, too: equal only until then.
    assert results[2]["ranks"].keys() == results[1]["ranks"].keys()
    assert results[2]["bytes_sent_per_step"] > 0


def test_checkpoints_belong_to_a_factored_network(tmp_path):
    train(dlrt(tolerance=0.3), tmp_path)
    model, header = rebuild(tmp_path / "model.safetensors")
    assert isinstance(model.fc1, LowRank)
    assert header["kind"] == "lowrank"
    assert torch.isfinite(model.fc1.weight).all()
