"""The command line: how it explains itself, and what it does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from subspan import __version__
from subspan.cli import COMMANDS
from tests.forks import python_code
from tests.runs import SWEEP, TRAIN, contents, record_of

# ---- help ----------------------------------------------------------------------------------------

LIGHT = """
import sys
from subspan.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "numpy", "numba", "rich", "jsonargparse", "accelerate", "datasets", "joblib"}
print(sorted(heavy & set(sys.modules)))
sys.exit(code)
"""


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"], ["--version"]])
def test_help_imports_nothing_heavy(argv):
    said = subprocess.run(
        [sys.executable, "-c", LIGHT, *argv], capture_output=True, text=True, check=True
    )
    assert said.stdout.endswith("\n[]\n")
    assert said.stderr == ""
    if argv == ["--version"]:
        assert said.stdout.startswith(f"subspan {__version__}\n")
    else:
        assert said.stdout.startswith("usage: subspan COMMAND [OPTIONS]\n")
        assert all(f"\n  {name} " in said.stdout for name in COMMANDS)
        assert max(map(len, said.stdout.splitlines())) <= 90


def test_the_package_is_the_command():
    words = [sys.executable, "-m", "subspan", "trian"]
    said = subprocess.run(words, capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr.startswith("subspan trian: error: unknown command 'trian': did you mean")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_help_ends_well_where_nobody_reads(unbuffered):
    """The pipe is closed as after ``| head -1``; help in a buffer is written at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    said = subprocess.run(
        [sys.executable, "-m", "subspan.cli", "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writer)
    assert (said.returncode, said.stderr) == (0, b"")


NOBODY_READS = """
import io, os, sys
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 1)
buffer = open(1, "wb", buffering={size})
sys.stdout = io.TextIOWrapper(buffer, write_through={size} == 0)
from subspan.cli import main
assert main({words}) == 0
sys.stdout.flush()
"""


@pytest.mark.parametrize(("words", "size"), [(["train", "--help"], 0), (TRAIN, 8192), (TRAIN, 0)])
def test_the_work_goes_on_where_nobody_reads(words, size, tmp_path):
    said = python_code(NOBODY_READS.format(words=words, size=size), tmp_path)
    assert said.stderr == ""
    if words is TRAIN:
        assert record_of(tmp_path / "run")["status"] == "complete"


CLOSED = """
import sys
from subspan.cli import main
assert main(["--version"]) == 0
assert main(["unknown"]) == 2
sys.stdout.flush()  # as joblib does before it starts workers
assert open("file", "w").fileno() > 2
"""


def test_an_output_that_is_closed(tmp_path):
    """``>&-``: two jobs of a sweep ended in an AttributeError."""
    words = ["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, CLOSED]
    assert subprocess.run(words, cwd=tmp_path).returncode == 0


def test_training_on_images_imports_no_library_of_language_models(tmp_path):
    code = """
import sys
from subspan.cli import main
assert main({words}) == 0
assert not {{"bitsandbytes", "peft", "torchao", "transformers"}} & set(sys.modules)
"""
    python_code(code.format(words=TRAIN), tmp_path)


OPTIONS = {
    "train": [
        "--net",
        "--batch-size",
        "--mixed-precision",
        "--method METHOD",
        "--overwrite",
    ],
    "sweep": ["--dims", "--baseline-lrs", "--weight-decay", "--seeds", "--jobs", "--threshold"],
    "intrinsic": ["--dims", "--stage-epochs", "--seeds", "--compartments", "how far to trust it"],
    "reproduce": ["--list", "--budget", "--jobs", "--out", "li-mnist-lenet"],
    "eval": ["checkpoint", "--data"],
    "inspect": ["checkpoint"],
    "bound": ["checkpoint", "--data", "--delta", "--choices", "--base-is-prior", "--out"],
    "export": ["checkpoint", "out", "--format", "--rank"],
    "report": ["folder"],
    "gallery": ["folder", "file"],
    "pareto": ["folders", "--data", "--out"],
    "replay": ["journal", "--step", "--out", "--base"],
    "bench": ["--parts", "--sizes", "--nets", "--seconds", "--json", "--out", "stored-csr"],
    "doctor": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, cli):
    said = cli(command, "--help")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith(f"usage: subspan {command} ")
    for option in [*OPTIONS[command], "--config"]:
        assert option in said.out
    assert "hash" in said.out or command not in ("train", "sweep")


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_the_configuration_is_printed(command, cli):
    said = cli(command, "--epochs", "7", "--print_config")
    assert (said.code, said.err) == (0, "")
    assert "epochs: 7\n" in said.out
    assert "--print_config" in cli(command, "--help").out
    assert "--print-config" not in cli(command, "--help").out


def test_an_option_says_what_it_means_to_whom(cli):
    said = " ".join(cli("sweep", "--methods", "hash,dlrt", "--help").out.split())
    assert "parameters to train, as fc1 or [fc1,fc2]; the others keep θ₀ (hash); layers to" in said
    assert "layers that stay dense (dlrt)" in said


def test_methods_are_told_in_plain_words(cli):
    """The help shows the first line of a docstring, which must have nothing for Sphinx in it."""
    told = cli("train", "--help").out.partition("\nmethods")[2]
    assert "  rademacher " in told
    assert not re.findall(r"`|:\w+:|Source", told)


def test_help_shows_the_options_of_the_methods_that_are_named(cli, in_tmp_path):
    """And none where no method is named: those of all are 35."""
    general = cli("train", "--help").out
    assert "--batch-size" in general
    assert "--method hash --help" in general
    assert not [name for name in ("--dim DIM", "--targets", "--tolerance") if name in general]
    of_hash = cli("train", "--help", "--method=hash").out
    assert "--dim DIM" in of_hash
    assert "--tolerance" not in of_hash
    (in_tmp_path / "run.yaml").write_text("method: dlrt\n")
    for words in (("--method", "dlrt"), ("--config", "run.yaml")):
        of_dlrt = cli("train", *words, "--help").out
        assert "--tolerance TOLERANCE" in of_dlrt
        assert "--dim DIM" not in of_dlrt
    for both in ("dlrt,sparse", "[dlrt, sparse]"):
        of_both = cli("sweep", "--methods", both, "--help").out
        assert "--tolerance TOLERANCE" in of_both
        assert "--s S" in of_both
        assert "--redraw-every" not in of_both


def test_what_is_printed_has_the_options_that_are_given(cli):
    said = cli("train", "--dim", "5", "--print_config")
    assert "dim: 5\n" in said.out
    assert "tolerance" not in said.out
    said = cli("train", "--method", "dlrt", "--tolerance", "0.1", "--print_config")
    assert "tolerance: 0.1\n" in said.out


def test_a_file_of_an_earlier_version_names_all_options(cli, in_tmp_path):
    """Without a value, those of other methods are no more than that."""
    (in_tmp_path / "run.yaml").write_text("method: hash\ndim: 5\ntolerance: null\ns: null\n")
    said = cli("train", "--config", "run.yaml", "--print_config")
    assert (said.code, said.err) == (0, "")
    (in_tmp_path / "run.yaml").write_text("method: hash\ndim: 5\ntolerance: 0.1\n")
    said = cli("train", "--config", "run.yaml", "--print_config")
    assert said.code == 2
    assert "unknown option of hash 'tolerance'" in said.err
    assert said.err.endswith("(it is one of dlrt, dlrt-ratio)\n")


def test_whole_numbers_may_be_written_as_floats(cli):
    said = cli("train", "--epochs", "1e3", "--seed", "7", "--print_config")
    assert (said.code, said.err) == (0, "")
    assert "epochs: 1000.0\n" in said.out


# ---- what is done --------------------------------------------------------------------------------


def test_train(in_tmp_path, cli):
    words = [*TRAIN, "--dim", "20", "--epochs", "2", "--lr", "0.3", "--batch-size", "256"]
    said = cli(*words)
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[0] == "mlp-8 on digits, hash, lr 0.3: 12 steps"
    assert [line[:11] for line in lines[1:3]] == ["epoch   1/2", "epoch   2/2"]
    assert lines[3].startswith("test accuracy ")
    assert "20 numbers stored for 610 weights (30 times fewer)" in lines[3]
    assert lines[4:] == ["model:  run/model.safetensors", "record: run/record.json"]
    assert all(line.isprintable() for line in lines)
    before = contents(in_tmp_path)
    assert cli(*words).out.splitlines() == ["complete already, not repeated", *lines[3:]]
    assert contents(in_tmp_path) == before
    assert record_of(in_tmp_path / "run")["config"]["batch_size"] == 256
    said = cli("report", "run")
    assert said.out.splitlines() == ["run/curve.png", "run/curve.svg", "run/report.html"]


def test_the_default_rate_is_the_methods_own(in_tmp_path, cli):
    assert cli(*TRAIN, "--dim", "100").code == 0
    assert record_of(in_tmp_path / "run")["config"]["lr"] == 0.3


CONFIG = """
net: mlp-8
method: sparse
dim: 6+20
compartments: layer
s: 4
train_fully: [fc2.bias]
epochs: 1
batch-size: 256
lr: 0.2
weight_decay: 1e-4
patience: 3
seed: 3
"""
FLAGS = [
    *("--net", "mlp-8", "--method", "sparse", "--dim", "6+20", "--compartments", "layer"),
    *("--s", "4", "--train-fully", "[fc2.bias]", "--epochs", "1", "--batch-size", "256"),
    *("--lr", "0.2", "--weight-decay", "1e-4", "--patience", "3", "--seed", "3"),
]


def test_flags_and_files_are_alike(in_tmp_path, cli):
    (in_tmp_path / "run.yaml").write_text(CONFIG)
    assert cli("train", "--config", "run.yaml", "--out", "a").code == 0
    assert cli("train", *FLAGS, "--out", "b").code == 0
    records = [record_of(in_tmp_path / name) for name in "ab"]
    assert records[0]["config"] == records[1]["config"]
    assert records[0]["test_score"] == records[1]["test_score"]
    assert records[0]["trainable_parameters"] == 6 + 20 + 10
    # A flag after the file counts; underscores are taken, too.
    cli("train", "--config", "run.yaml", "--batch_size", 128, "--out", "c")
    assert record_of(in_tmp_path / "c")["config"]["batch_size"] == 128
    cli("train", "--train_fully", "fc2.bias", "--dim", 5, *TRAIN[1:-1], "d")
    assert record_of(in_tmp_path / "d")["trainable_parameters"] == 15


@pytest.mark.parametrize("words", [["--out=~/runs"], ["--config", "{out: ~/runs}"]])
def test_the_home_folder(words, in_tmp_path, cli, monkeypatch):
    """Which shells put in place of ~ at the beginning of a word alone."""
    monkeypatch.setenv("HOME", str(in_tmp_path / "home"))
    assert cli("train", *TRAIN[1:-2], *words).code == 0
    assert [path.name for path in in_tmp_path.iterdir()] == ["home"]
    assert record_of(in_tmp_path / "home" / "runs")["status"] == "complete"


def test_what_is_printed_can_be_given_as_a_file(in_tmp_path, cli):
    """With a mark at its beginning, too, as some editors write; and one value may stand twice."""
    printed = cli("train", "--epochs", "7", "--print_config").out
    (in_tmp_path / "run.yaml").write_text("\ufeff" + printed)
    assert cli("train", "--config", "run.yaml", "--print_config").out == printed
    (in_tmp_path / "alias.yaml").write_text("exclude: &x [fc1]\ntargets: *x\nepochs: 7\n")
    said = cli("train", "--config", "alias.yaml", "--epochs", "8", "--print_config")
    assert said.code == 0
    assert "epochs: 8\n" in said.out


def test_what_has_no_flag_is_read_from_a_file_too(in_tmp_path, cli):
    """The experiments were listed, and none was run."""
    (in_tmp_path / "run.yaml").write_text(cli("reproduce", "gone", "--print_config").out)
    said = cli("reproduce", "--config", "run.yaml")
    assert said.code == 2
    assert "unknown experiment 'gone'" in said.err
    printed = cli("reproduce", "--config", "run.yaml", "golf-mnist", "--print_config").out
    assert printed.startswith("name: golf-mnist\n")


def test_sweep(in_tmp_path, cli):
    (in_tmp_path / "sweep.yaml").write_text(
        "dims: [5, 6+20]\nmethods: [hash]\nlrs: 0.3\nbaseline_lrs: [0.01, 1e-3]\noverwrite: false\n"
        "compartments: layer\n"
    )
    words = [*SWEEP, "--config", "sweep.yaml"]
    said = cli(*words)
    assert (said.code, said.err) == (0, "")
    found = json.loads((in_tmp_path / "run" / "sweep.json").read_text())
    assert [(row["dim"], row["label"]) for row in found["rows"]] == [(5, "5"), (26, "6+20")]
    assert set(found["baseline"]["tried_lrs"]) == {"0.01", "0.001"}
    lines = said.out.splitlines()
    assert [line.partition(":")[0].removesuffix("-seed0") for line in lines[:4]] == [
        "hash-dim6+20-lr0.3",
        "hash-dim5-lr0.3",
        "full-lr0.001",
        "full-lr0.01",
    ]
    assert lines[-3].startswith("intrinsic dimension of hash, 90 % of the baseline: ")
    assert lines[-2:] == ["picture: run/curve.png", "report: run/report.html"]
    assert all(line.strip() and line.isprintable() for line in lines)
    before = contents(in_tmp_path / "run" / "runs")
    flags = [
        "--dims",
        "5,6+20",
        "--methods",
        "hash",
        "--lrs",
        "0.3",
        "--baseline-lrs",
        "0.01,0.001",
    ]
    again = cli(*SWEEP, *flags, "--compartments", "layer")
    assert again.out == said.out
    assert contents(in_tmp_path / "run" / "runs") == before


def test_sweep_with_a_failing_run(in_tmp_path, cli):
    """The others count: code 0, and it is said."""
    said = cli(
        *SWEEP, "--dims", "5", "--lrs", "0.3,1e30", "--optimizer", "sgd", "--baseline", "null"
    )
    assert (said.code, said.err) == (0, "")
    assert "hash-dim5-lr1e+30-seed0 failed: the loss" in said.out
    assert "\nfailed: hash-dim5-lr1e+30-seed0: the loss stopped being finite" in said.out


def test_eval_and_inspect(trained, cli):
    file = trained / "model.safetensors"
    said = cli("eval", file)
    accuracy = record_of(trained)["test_score"]
    assert said.out.splitlines()[:2] == ["data: digits", f"test_accuracy: {accuracy}"]
    said = cli("inspect", file)
    assert "kind: subspace\n" in said.out
    assert "init_seed: 0\n" in said.out
    assert "  dim: 40\n" in said.out
    assert "weights: 610\n" in said.out
    assert "  coordinates: [40]\n" in said.out
    assert f"bytes: {file.stat().st_size:,}\n" in said.out
