"""Refusals of the command line: a sentence, exit code 2, and no trace on disk."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from subspan import checkpoint, files
from tests.runs import NET, SWEEP, TRAIN, contents, copied, record_of

# What is typed after "subspan", with TRAIN or SWEEP in place of the first word, and what is said.
BAD = {
    "trian": "unknown command 'trian': did you mean train or intrinsic?",
    "train --batchsize 3": "'--batchsize': did you mean --batch-size",
    "train --epoch 3": "unknown argument of subspan train '--epoch': did you mean --epochs",
    "train more": "unknown argument of subspan train 'more'",
    "train --lr": "--lr: expected one argument",
    "train --net lenett": "unknown net 'lenett': did you mean lenet",
    "train --net nowhere:f": "there is no module 'nowhere'",
    "train --net subspan.training.nets:bild": "of subspan.training.nets 'bild': did you mean build",
    "train --net subspan.training.nets:names": "must return a torch.nn.Module, got list",
    "train --net lenet": "net 'lenet' takes images of at least 12x12 pixels, got 8x8",
    "train --task empty:f": "unknown function of empty 'f': there is none",
    "train --data digts": "unknown data set 'digts': did you mean digits?",
    "train --data ''": "data is empty: give a value, or leave it out",
    "train --data ./no": "there is no data folder ./no",
    "train --data ./empty": "cannot read",
    "train --data ./texts": "has no column that is plainly the image",
    "train --method hsh": "unknown method 'hsh': did you mean hash?",
    "train --method full": "unknown option of full 'dim': known are head_lr",
    "train --s 3": "unknown option of hash 's'",
    "train --tolerance 0.1": "(it is one of dlrt, dlrt-ratio)",
    "sweep --tolerance 0.1": "unknown option of hash 'tolerance'",
    "train --lr --seed 3": "--lr: expected one argument",
    "train --config '{lr: abc}'": "lr must be a number or null, got abc",
    "train --config '{epochs: 1.5}'": "epochs must be an integer, got 1.5",
    "train --config '{epochs: 1:30}'": "epochs must be written as a plain number, got 1:30",
    "train --config '{dim: +010}'": "dim must be written as a plain number, got +010",
    "sweep --config '{baseline: no}'": "unknown method 'no'",
    "train --dim 1:30": "dim must be written as a plain number, got 1:30",
    "train --epochs=1:30": "epochs must be written as a plain number, got 1:30",
    "bench --ranks 2.5": "ranks must be an integer, got 2.5",
    "bench --parts steps,steps": "parts names one value twice: steps, steps",
    "train --dim null": "method 'hash' needs --dim",
    "train --dim 0": "dim must be a positive integer",
    "train --dim -3": "compartments, got -3",
    "train --dim abc": "compartments, got 'abc'",
    "train --dim 1.5": "compartments, got '1.5'",
    "train --dim nan": "compartments, got 'nan'",
    "train --dim ''": "dim is empty: give a value, or leave it out",
    "train --dim 5+": "compartments, got '5+'",
    "train --dim 611": "at most the number of weights, 610",
    "train --dim 5+6": "2 dimensions for 1 compartments",
    "train --targets fc3": "pattern in targets (it matches no parameter) 'fc3': known are fc1.bias",
    "train --targets [fc1,fc3]": "unknown pattern in targets (it matches no parameter) 'fc3'",
    "train --targets fc1,fc2": "it matches no parameter; several are a list, [fc1, fc2]",
    "train --targets fc(": "'fc(' is no regular expression",
    "train --exclude fc3": "unknown pattern in exclude (it matches no parameter) 'fc3'",
    "train --exclude .*": "no parameter is left to train",
    "train --train-fully fc3": "unknown pattern in train_fully (it matches no parameter) 'fc3'",
    "train --compartments lyer": "compartments must be 'global', 'layer', 'tensor', 'uniform:k'",
    "train --compartments 3": "or a mapping of patterns to dimensions, got '3'",
    """train --dim null --compartments '{"fc3": 5, ".*": 5}'""": "unknown pattern in compartments",
    """train --dim null --compartments '{"fc1": 5}'""": "no compartment for fc2.weight, fc2.bias",
    """train --compartments '{"fc1": a}'""": "compartments must be",
    "train --lr nan": "lr must be a number or null, got nan; see subspan train --help",
    "train --lr inf": "lr must be a number or null, got inf",
    "train --lr abc": "lr must be a number or null, got abc",
    "train --lr -1": "lr must be a positive number, got -1.0",
    "train --lr 0": "lr must be a positive number, got 0.0",
    "train --seed -1": "seed must not be negative, got -1",
    f"train --seed {2**64}": "seed must be an integer in [0, 2^64)",
    "train --epochs 0": "epochs must be at least 1, got 0",
    "train --epochs 1.5": "epochs must be an integer, got 1.5",
    "train --batch-size 0": "batch_size must be at least 1, got 0",
    "train --validation 1": "validation must be a share in (0, 1), got 1.0",
    "train --validation 1e-9": "validation must be a share in [0, 1) that leaves a sample on both",
    "train --validation 0.9999": "both sides, got 0.9999 of 1438 samples: give another share",
    "intrinsic --compartments '{fc1: 5, fc2: 5}'": "dimensions of their own cannot grow: give them",
    "train --net mlp-99999999999": "net 'mlp-99999999999' is larger than the memory",
    f"train --net mlp-{10**21}": "is larger than the memory of this machine: make it smaller",
    "train --optimizer adamw": "optimizer must be one of ['adam', 'sgd'], got adamw",
    "train --device gpu": "device must be one of ['auto', 'cpu', 'cuda'], got gpu",
    "train --config=": "--config is empty: give a YAML file",
    "train --config ''": "--config is empty: give a YAML file",
    "train --config no.yaml": "--config: File does not exist",
    "train --config lrr.yaml": "--config for subspan train 'lrr': did you mean lr",
    "train --config broken.yaml": "--config broken.yaml is no YAML (line 2, column 1: expected",
    "train --config twice.yaml": "has the key 'batch_size' twice, in lines 1 and 3: leave one out",
    "train --config=deep.yaml": "deep.yaml has the key 'fc1' twice, in line 2: leave one out",
    "train --config nothing.yaml": "nothing.yaml is empty: write options into it, one a line, as",
    "train --config list.yaml": "must have names and values, got a list: write options into it",
    "train --config words.yaml": "must have names and values, got a text: write options into it",
    "train --config nulls.yaml": "has no value for any of its keys: write options into it",
    "train --config tabs.yaml": "that cannot start any token): use spaces for tabs",
    "train --config two.yaml": "expected a single document in the stream but found another",
    "train --config latin.yaml": "--config latin.yaml is not UTF-8 in line 2: save it as UTF-8",
    "train --config nul.yaml": "nul.yaml is no YAML (unacceptable character #x0000",
    "train --config itself.yaml": "itself.yaml has in line 1 what contains itself: write it out",
    "train --config empty": "--config empty is a folder: give a YAML file",
    "train --config dots.yaml": "unknown key in the file of --config for subspan train 'lr.x'",
    "train --config keys.yaml": "unknown key in the file of --config for subspan train 'in line 1'",
    "train --config other.yaml": "unknown key in the file of --config for subspan train 'config'",
    "train --config '{lr: 1, lr: 2}'": "has the key 'lr' twice, in line 1: leave one out",
    """train --compartments '{"fc1": 5, "fc1": 6}'""": "--compartments has the key 'fc1' twice",
    """train --compartments='{"fc1": 5, "fc1": 6}'""": "--compartments has the key 'fc1' twice",
    "train --out lrr.yaml": "--out lrr.yaml: lrr.yaml is a file: give a folder",
    "train --out ''": "out is empty: give a value, or leave it out",
    "eval m.safetensors --data=": "data is empty: give a value, or leave it out",
    "train --config '{net: \"\", lr: 0.1}'": "net is empty: give a value, or leave it out",
    "train --config '{out: null, lr: 1}'": "out must be a text, got null",
    "train --config '{epochs: null, lr: 1}'": "epochs must be an integer, got null",
    "train --config '{overwrite: no}'": "overwrite must be true or false, got no",
    "sweep --config '{overwrite: no}'": "overwrite must be true or false, got no",
    "train --config '{resume: no}'": "resume must be true or false, got no",
    "bench --config '{json: no}'": "json must be true or false, got no",
    "sweep --out=": "out is empty: give a value, or leave it out",
    "train --out lrr.yaml/a": "--out lrr.yaml/a: lrr.yaml is a file: give a folder",
    "sweep --dims ''": "dims is empty: give a value, or leave it out",
    "sweep --dims []": "dims is empty: give at least one number of coordinates",
    "sweep --dims 5,abc,7": "compartments, got 'abc'",
    "sweep --dims 5,611": "at most the number of weights, 610",
    "sweep --dims 5,5": "dims names one value twice",
    "sweep --dim 5": "unknown argument of subspan sweep '--dim': did you mean --dims",
    "sweep --methods hash,hsh": "unknown method 'hsh': did you mean hash?",
    "sweep --methods [hash,hsh]": "unknown method 'hsh': did you mean hash?",
    "sweep --methods [hash": "unknown method '[hash'",
    "sweep --methods ''": "methods has an empty entry",
    "sweep --baseline ful": "unknown method 'ful': did you mean full?",
    "sweep --seeds 0": "seeds must be at least 1, got 0",
    "sweep --threshold 2": "threshold must be in (0, 1], got 2.0",
    "sweep --lrs 0.1,nan": "lrs must be a positive number, got nan",
    "sweep --lrs ''": "lrs is empty: give a value, or leave it out",
    "sweep --exclude fc3": "unknown pattern in exclude (it matches no parameter) 'fc3'",
    "sweep --jobs 0": "jobs must be at least 1, or -1 for one per core, got 0",
    "reproduce minut": "unknown experiment 'minut': did you mean minut-mnist-mlp or minut-cif",
    "reproduce minut-mnist-mlp --budget x": "budget must be one of ['quick', 'full'], got x",
    "eval": "the following arguments are required: checkpoint; see subspan eval --help",
    "report empty": "expected sweep.json or record.json in 'empty', found neither",
    "report no": "expected sweep.json or record.json in 'no', found neither",
}
if not torch.cuda.is_available():
    BAD["train --device cuda"] = "PyTorch sees no CUDA device here; use cpu or auto"


@pytest.fixture
def no_hub(monkeypatch):
    """Data sets are not looked for on the network."""
    import huggingface_hub

    def dataset_info(self, *args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.delenv("SUBSPAN_DATA", raising=False)


FILES = {
    "twice": b"batch-size: 8\nlr: 0.1\nbatch_size: 9\n",
    "deep": b"lr: 0.1\ncompartments: {fc1: 5, fc1: 6}\n",
    "nothing": b"# lr: 0.1\n",
    "list": b"- lr: 0.1\n",
    "words": b"lr 0.1\n",
    "nulls": b"lr:\nseed:\n",
    "tabs": b"lr: 0.1\n\tseed: 3\n",
    "two": b"lr: 0.1\n---\nlr: 0.2\n",
    "latin": b"# Net\nnet: ml\xfcp\n",
    "nul": b"lr: 0.1\0\n",
    "itself": b"exclude: &all [fc1, *all]\n",
    "dots": b"lr.x: 3\n",
    "keys": b"? [a, b]\n: 3\n",
    "other": b"config: twice.yaml\n",
}


@pytest.fixture
def things(in_tmp_path):
    """Files that a bad command may name, in the current folder."""
    (in_tmp_path / "empty").mkdir()
    (in_tmp_path / "texts").mkdir()
    (in_tmp_path / "texts" / "a.txt").write_text("no image\n")
    (in_tmp_path / "lrr.yaml").write_text("lrr: 0.1\n")
    (in_tmp_path / "broken.yaml").write_text("lr: [\n")
    for name, content in FILES.items():
        (in_tmp_path / f"{name}.yaml").write_bytes(content)
    return in_tmp_path


def refused(said, message):
    """Exit code 2, one line on stderr, no traceback, nothing else."""
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("subspan ")
    assert ": error: " in said.err
    assert message in said.err
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, things, no_hub, cli):
    command, *words = shlex.split(case)
    before = contents(things)
    refused(cli(*{"train": TRAIN, "sweep": SWEEP}.get(command, [command]), *words), BAD[case])
    assert contents(things) == before


@pytest.mark.parametrize("words", [["--config", "{dim: 010}"], ["--dim", "010"]])
def test_numbers_of_a_file_are_those_of_the_command_line(words, in_tmp_path, cli):
    assert cli(*TRAIN, "--steps", 1, *words).code == 0
    assert record_of(in_tmp_path / "run")["config"]["options"] == {"dim": 10}


def spoiled(kind, path):
    """A file in the place of a checkpoint."""
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(data[:-7])
    elif kind == "edited":
        path.write_bytes(data[:-7] + bytes([data[-7] ^ 1]) + data[-6:])
    elif kind == "text":
        path.write_text("no checkpoint\n" * 100)
    else:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["subspan"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {"subspan": json.dumps(header | {"format": 2})} if kind == "newer" else None
        safetensors.torch.save_file(tensors, path, metadata=metadata)


SPOILED = {
    "missing": "is not a file: expected a checkpoint",
    "empty": "is damaged or no safetensors file",
    "truncated": "is damaged or no safetensors file",
    "edited": "was damaged or edited after it was saved",
    "text": "is damaged or no safetensors file",
    "newer": "has format 2, this version of subspan reads up to 1: upgrade",
    "foreign": "is no subspan checkpoint",
}


@pytest.mark.parametrize("command", ["eval", "inspect", "export"])
@pytest.mark.parametrize("kind", SPOILED)
def test_bad_checkpoints(kind, command, trained, in_tmp_path, cli):
    copied(trained, in_tmp_path / "run")
    spoiled(kind, in_tmp_path / "run" / "model.safetensors")
    before = contents(in_tmp_path)
    words = [
        command,
        "run/model.safetensors",
        *(["weights.safetensors"] if command == "export" else []),
    ]
    refused(cli(*words), f"run/model.safetensors {SPOILED[kind]}")
    assert contents(in_tmp_path) == before


def test_a_checkpoint_of_another_base(trained, in_tmp_path, cli):
    """Not even one that says that it is of this one."""
    file = in_tmp_path / "model.safetensors"
    header, tensors = checkpoint.read(trained / "model.safetensors")
    header["init_seed"] = 1
    header["digest"] = checkpoint.file.digest(header, tensors)
    safetensors.torch.save_file(tensors, file, metadata={"subspan": json.dumps(header)})
    for words in (["eval", file], ["export", file, in_tmp_path / "weights"]):
        refused(cli(*words), "was trained from other initial weights")
    assert os.listdir(in_tmp_path) == ["model.safetensors"]


def test_a_folder_of_another_configuration(trained, in_tmp_path, cli):
    copied(trained, in_tmp_path / "run")
    before = contents(in_tmp_path)
    words = ["train", "--net", NET, "--dim", 40, "--lr", 0.3, "--epochs", 1, "--out", "run"]
    refused(
        cli(*words),
        "run belongs to another configuration (epochs 2 → 1): give another --out, or --overwrite",
    )
    refused(cli(*SWEEP), "run has a record.json of something else: give another --out")
    assert contents(in_tmp_path) == before
    said = cli(*words, "--overwrite")
    assert (said.code, said.err) == (0, "")
    assert record_of(in_tmp_path / "run")["config"]["epochs"] == 1


def test_a_loss_that_stops_being_finite(in_tmp_path, cli):
    words = [*TRAIN, "--dim", "50", "--optimizer", "sgd", "--lr", "1e30"]
    said = cli(*words)
    assert said.code == 2
    message = "the loss stopped being finite in epoch 1: lower --lr 1e+30"
    assert said.err == f"subspan train: error: {message}\n"
    record = record_of(in_tmp_path / "run")
    assert record["status"] == "failed"
    assert record["error"] == message
    assert os.listdir(in_tmp_path / "run") == ["record.json"]
    assert cli("report", "run").code == 0
    words = ["sweep", "--net", NET, "--dims", "5,10", "--optimizer", "sgd", "--lrs", "1e30"]
    said = cli(*words, "--baseline", "null", "--epochs", 1, "--jobs", 1, "--out", "sweep")
    assert said.code == 2
    assert "all runs failed, 2 of them" in said.err
    assert "hash-dim10-lr1e+30-seed0 failed: the loss stopped being finite" in said.out
    assert (in_tmp_path / "sweep" / "report.html").exists()


def test_a_full_disk(in_tmp_path, cli, monkeypatch):
    def no_space(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", no_space)
    said = cli(*TRAIN, "--dim", "5")
    assert (said.code, said.out) == (1, "")
    message = "[Errno 28] No space left on device: 'run/record.json'"
    assert said.err == f"subspan train: error: {message}\n"
    assert os.listdir(in_tmp_path) == []


def test_more_than_the_memory(in_tmp_path, cli):
    words = ["--parts", "products", "--methods", "hash", "--sizes", "99999999999x10"]
    said = cli("bench", *words)
    assert said.code == 1
    assert said.err.endswith(
        "there is no memory for another 399999999996 bytes: make what was asked for smaller\n"
    )


def test_ctrl_c(in_tmp_path, cli, ctrl_c, monkeypatch):
    from subspan.commands.train import TrainingProgress

    monkeypatch.setattr(TrainingProgress, "epoch", lambda *_: ctrl_c())
    said = cli(*TRAIN, "--dim", "5", "--epochs", "3")
    assert said.code == 130
    words = "stopped after 11 of 33 steps; to go on: subspan train --resume --out run"
    assert said.err == f"\nsubspan train: {words}\n"
    assert record_of(in_tmp_path / "run")["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "sweep"])
def test_ctrl_c_in_a_process(command, in_tmp_path):
    words = ["--dim", "9"] if command == "train" else ["--dims", "9,10", "--jobs", "2"]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "subspan.cli",
            command,
            "--net",
            NET,
            "--epochs",
            "9999",
            *words,
            "--out",
            "run",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    record = Path("run/record.json") if command == "train" else None
    while not (record or next(Path("run").glob("runs/*/record.json"), Path("no"))).exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to all processes
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    if command == "train":
        assert re.fullmatch(
            r"\nsubspan train: stopped after [\d,]+ of [\d,]+ steps; to go on: subspan train "
            r"--resume --out run\n",
            err,
        )
    else:
        assert err == f"\nsubspan {command}: interrupted; what was complete is kept\n"
    name = "record.json" if command == "train" else "sweep.json"
    assert json.loads((Path("run") / name).read_text())["status"] == "interrupted"
    # Of processes that joblib killed, too, every file is whole.
    for path in Path("run").rglob("record.json"):
        assert record_of(path.parent)["status"] in ("interrupted", "running")
    for path in Path("run").rglob("*.safetensors"):
        checkpoint.read(path)
