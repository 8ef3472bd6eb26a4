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
    assert record["test_accuracy"] > 0.4
    header = checkpoint.inspect("run/model.safetensors")
    assert [layer["factors"][0]["kind"] for layer in header["sums"].values()] == ["gaussian"] * 2
    said = cli("eval", "run/model.safetensors")
    assert (said.code, said.err) == (0, "")


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


def test_a_sweep_over_p(cli, in_tmp_path):
    said = cli(
        "sweep", "--net", "mlp-16", "--epochs", 10, "--methods", "prodsum", "--dims", "5,50",
        "--lrs", "0.1",
        "--jobs", 1, "--out", "out",
    )  # fmt: skip
    assert (said.code, said.err) == (0, "")
    rows = json.loads(Path("out/sweep.json").read_text())["rows"]
    assert [row["dim"] for row in rows] == [2 * 5 + 26, 2 * 50 + 26]
    assert rows[1]["mean_test_accuracy"] > rows[0]["mean_test_accuracy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "method 'prodsum' needs --p, the number of atoms of each layer, or --factors"),
        (["--p", "0"], "layer 'fc1': factor 1 of 1, 16 × 64, .*hash needs p >= 1 atoms, got 0"),
        (["--p", "5", "--atoms", "hsh"], "unknown kind of atoms 'hsh': did you mean hash"),
        (["--p", "5", "--bias", "100"], "d=100 does not fit in D=16"),
        (["--p", "5", "--scale", "kaiming"], "unknown init 'kaiming'"),
        (["--factors", "{fc1: [circulant]}"], "layer 'fc1': factor 1 of 1.*must be square, got 16"),
        (["--factors", "{fc1: [{kind: hash, p: p}]}"], "a factor says p, but no --p is given"),
        (["--factors", "{fc9: [free]}"], "unknown pattern in targets .*'fc9'"),
        (["--factors", "{fc1: [free]}", "--atoms", "hash"], "give --atoms, .* or --factors, not"),
    ],
)
def test_bad_input(options, message, cli, in_tmp_path):
    said = cli(*TRAIN, *options)
    assert said.code == 2
    assert re.search(message, said.err.replace("\n", " ")), said.err
    assert not Path("run").exists()
