"""Products of sums by the laboratory: one command, factors from YAML, sweeps over p, bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from subspan import checkpoint

TRAIN = ["train", "--net", "mlp-16", "--epochs", "2", "--method", "prodsum", "--out", "run"]
DENSE = 64 * 16 + 16 + 16 * 10 + 10


def test_by_command(cli, in_tmp_path):
    said = cli(*TRAIN, "--p", 30, "--atoms", "gaussian", "--epochs", 10, "--lr", 0.1)
    assert (said.code, said.err) == (0, "")
    record = json.loads(Path("run/record.json").read_text())
    assert record["trainable_parameters"] == record["stored_parameters"] == 2 * 30 + 26
    assert record["weights"] == DENSE
    assert record["test_score"] > 0.4
    header = checkpoint.inspect("run/model.safetensors")
    assert [layer["factors"][0]["kind"] for layer in header["sums"].values()] == ["gaussian"] * 2
    said = cli("eval", "run/model.safetensors")
    assert (said.code, said.err) == (0, "")


def test_a_seed_says_everything(cli, in_tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        words = ["--p", 30, "--epochs", 1, "--seed", seed]
        assert cli(*TRAIN[:-1], name, *words).code == 0
    a, b, c = (Path(name, "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_factors_from_a_file(cli, in_tmp_path):
    Path("run.yaml").write_text(
        "factors:\n"
        "  fc1: [{kind: free, inner: p}, {kind: dct}]\n"
        "  fc2: [{kind: rank1, p: p}]\n"
        "bias: 4\n"
    )
    said = cli(*TRAIN, "--config", "run.yaml", "--p", 7)
    assert (said.code, said.err) == (0, "")
    record = json.loads(Path("run/record.json").read_text())
    assert record["trainable_parameters"] == 16 * 7 + 7 + 2 * 4


def test_recipes_by_name(cli, in_tmp_path):
    said = cli(
        *TRAIN,
        "--p",
        3,
        "--factors",
        "{fc1: {recipe: kronecker_fc, rows: 4, columns: 8, terms: p}, "
        "fc2: {recipe: adaptive_fastfood}}",
    )
    assert (said.code, said.err) == (0, "")
    record = json.loads(Path("run/record.json").read_text())
    assert record["trainable_parameters"] == 3 * (4 * 8 + 4 * 8) + 3 * 16 + 26


def test_a_sweep_over_p(cli, in_tmp_path):
    said = cli(
        "sweep",
        "--net",
        "mlp-16",
        "--epochs",
        10,
        "--methods",
        "prodsum",
        "--dims",
        "5,50",
        "--lrs",
        "0.1",
        "--jobs",
        1,
        "--out",
        "out",
    )
    assert (said.code, said.err) == (0, "")
    rows = json.loads(Path("out/sweep.json").read_text())["rows"]
    assert [row["dim"] for row in rows] == [2 * 5 + 26, 2 * 50 + 26]
    assert rows[1]["mean_test_score"] > rows[0]["mean_test_score"]


def test_stages(cli, in_tmp_path):
    """Grows by the shares of the epochs; the file and the record are the last stage's."""
    said = cli(*TRAIN, "--stages", "6,24,96", "--epochs", 9, "--lr", 0.1, "--plateau", 9)
    assert (said.code, said.err) == (0, "")
    record = json.loads(Path("run/record.json").read_text())
    rows = record["history"]
    assert [row["trainable_parameters"] for row in rows] == [
        2 * p + 26 for p in (6, 6, 6, 24, 24, 24, 96, 96, 96)
    ]
    # Nothing is lost by growing: of `hash` the smaller net is one of the larger ones.
    accuracy = [row["val_score"] for row in rows]
    assert accuracy[2] < accuracy[5] < accuracy[8]
    assert rows[6]["train_loss"] < rows[4]["train_loss"]
    # The schedule begins again with every stage.
    rates = [row["learning_rate"] for row in rows]
    assert rates[0] == pytest.approx(rates[3]) == pytest.approx(rates[6])
    assert record["trainable_parameters"] == 2 * 96 + 26
    assert record["best_epoch"] >= 7
    sums = checkpoint.inspect("run/model.safetensors")["sums"]
    assert [layer["factors"][0]["p"] for layer in sums.values()] == [96, 96]
    said = cli("eval", "run/model.safetensors")
    assert said.code == 0
    assert f"test_accuracy: {record['test_score']}" in said.out


def test_a_stage_ends_on_a_plateau(cli, in_tmp_path):
    said = cli(*TRAIN, "--stages", "3,6,48", "--epochs", 12, "--lr", 1e-9, "--plateau", 1)
    assert said.code == 0
    rows = json.loads(Path("run/record.json").read_text())["history"]
    # Nothing is learnt, so that each but the last one ends after two epochs.
    assert [row["trainable_parameters"] for row in rows] == [32, 32, 38, 38] + [2 * 48 + 26] * 8


def test_stages_of_factors(cli, in_tmp_path):
    factors = "{fc1: [{kind: free, inner: p}, {kind: dct}], fc2: [free]}"
    said = cli(
        *TRAIN,
        "--factors",
        factors,
        "--stages",
        "[2, 9]",
        "--epochs",
        4,
        "--mixed-precision",
        "bf16",
        "--optimizer",
        "sgd",
    )
    assert (said.code, said.err) == (0, "")
    record = json.loads(Path("run/record.json").read_text())
    assert record["trainable_parameters"] == 16 * 9 + 160 + 26


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "method 'prodsum' needs --p, the number of atoms of each layer, --stages or"),
        (["--p", "5", "--stages", "5,6"], "give --p, or --stages, which begin with it, not both"),
        (["--stages", "5,6,7"], "3 stages need 3 epochs at least, got 2"),
        (["--stages", "50,20"], "stages must grow, got 20 atoms after 50"),
        (["--stages", "5,x"], "p must be a number of atoms, got 'x'"),
        (["--stages", "5,99999"], "layer 'fc1': .* d=99999 does not fit in D=1024 weights"),
        (["--stages", "5,9", "--plateau", "0"], "plateau must be at least 1 epoch, got 0"),
        (["--p", "5", "--plateau", "2"], "--plateau ends a stage: give --stages, too"),
        (["--stages", "5,9", "--factors", "{fc1: [free]}"], "no factor says p, as in p: p"),
        (["--p", "0"], "layer 'fc1': factor 1 of 1, 16 × 64, .*hash needs p >= 1 atoms, got 0"),
        (["--p", "5", "--atoms", "hsh"], "unknown kind of atoms 'hsh': did you mean hash"),
        (["--p", "5", "--bias", "100"], "d=100 does not fit in D=16"),
        (["--p", "5", "--scale", "kaiming"], "unknown init 'kaiming'"),
        (["--factors", "{fc1: [circulant]}"], "layer 'fc1': factor 1 of 1.*must be square, got 16"),
        (
            ["--factors", "{fc1: [{kind: hash, p: p}]}"],
            "a factor says p, but no --p or --stages is given",
        ),
        (["--factors", "{fc1: {recipe: lowrank}}"], "unknown recipe 'lowrank': did you mean low_r"),
        (["--factors", "{fc1: {recipe: low_rank}}"], "recipe low_rank needs rank"),
        (["--factors", "{fc1: {recipe: low_rank, p: 3}}"], "unknown option of recipe low_rank 'p'"),
        (["--factors", "{fc1: {recipe: low_rank, rank: p}}"], "says p, but no --p or --stages is"),
        (["--factors", "{fc1: {kind: hash}}"], "are a list, or a recipe as {recipe: low_rank, ra"),
        (["--factors", "{fc9: [free]}"], "unknown pattern in targets .*'fc9'"),
        (["--factors", "{fc1: [free]}", "--atoms", "hash"], "give --atoms, .* or --factors, not"),
    ],
)
def test_bad_input(options, message, cli, in_tmp_path):
    said = cli(*TRAIN, *options)
    assert said.code == 2
    assert re.search(message, said.err.replace("\n", " ")), said.err
    assert not Path("run").exists()
