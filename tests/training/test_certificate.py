"""Bounds of checkpoints: the samples, the bytes, and what is refused."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import dropout

import subspan
from subspan import checkpoint
from subspan.errors import SubspanError
from subspan.training import certificate, data, nets, tasks
from subspan.training.certificate import certify
from subspan.training.evaluate import rebuild
from subspan.training.occam import log_prior, occam_bound
from subspan.training.tasks.classification import Classification
from subspan.training.train import train
from tests.runs import a_run
from tests.training.data.makers import image_folder


@pytest.fixture
def file(trained):
    return trained / "model.safetensors"


def resaved(file, out, **changes):
    """The same model in a file that says something else; None takes a fact away."""
    model, header = rebuild(file)
    extra = header["extra"] | changes
    checkpoint.save(model, out, extra={k: v for k, v in extra.items() if v is not None})
    return out


class Forbidden:
    """A test part that nobody may ask anything."""

    def __getattr__(self, name):
        raise AssertionError(f"the test part was asked for {name}")

    def __len__(self):
        raise AssertionError("the test part was counted")


def test_a_bound_is_of_the_bytes_and_of_all_samples_but_the_test_part(file):
    found = certify(file)
    digits = data.load("digits")
    model, _ = rebuild(file)
    mistakes = 0
    for split in (digits.train, digits.validation):
        told = model.eval()(digits.normalize(split.images)).argmax(dim=1)
        mistakes += int((told != split.labels).sum())
    assert (found.mistakes, found.samples) == (mistakes, 1438)  # of 1,797; 359 are the test part
    assert found.bytes == file.stat().st_size
    assert found.classes == 10
    log_confidence = log_prior(found.bytes) + math.log(0.05)
    assert found.error_bound == occam_bound(mistakes, 1438, log_confidence)
    assert found.training_error < found.error_bound <= found.pac_bayes_bound
    bits = found.size_bits + found.length_bits + found.choices_bits + found.confidence_bits
    assert bits == pytest.approx(-log_confidence / math.log(2))


def test_the_test_part_is_never_looked_at(file, monkeypatch):
    expected, again = certify(file), tasks.again

    def without_test(*args, **options):
        task = again(*args, **options)
        object.__setattr__(task.images, "test", Forbidden())
        return task

    monkeypatch.setattr(tasks, "again", without_test)
    with pytest.raises(AssertionError, match="the test part"):
        without_test(checkpoint.inspect(file)["extra"]).evaluate(nn.Identity(), "test")
    monkeypatch.setattr(Classification, "evaluate", None)
    assert certify(file) == expected


def test_the_labels_of_the_test_part_do_not_matter_and_those_of_the_samples_do(file, monkeypatch):
    """Whatever is reached in another way would show: the content of the set is exchanged."""
    expected, load = certify(file), data.load

    def spoilt(part):
        def loaded(*args, **options):
            images = load(*args, **options)
            split = getattr(images, part)
            split.images.zero_()
            split.labels.fill_(0)
            return images

        return loaded

    monkeypatch.setattr(data, "load", spoilt("test"))
    assert certify(file) == expected
    monkeypatch.setattr(data, "load", spoilt("validation"))
    assert certify(file).mistakes != expected.mistakes


def test_every_term_is_paid_for(file, tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "count_mistakes", lambda task, net: (9_000, 300_000))
    plain, chosen = certify(file), certify(file, choices=1024)
    assert chosen.choices_bits == 10
    log_confidence = log_prior(plain.bytes) + math.log(0.05 / 1024)
    assert chosen.error_bound == pytest.approx(occam_bound(9_000, 300_000, log_confidence))
    assert chosen.error_bound > plain.error_bound
    assert chosen.pac_bayes_bound > plain.pac_bayes_bound
    assert certify(file, delta=0.5).error_bound < plain.error_bound
    longer = certify(resaved(file, tmp_path / "long.safetensors", remark="x" * 100))
    assert longer.size_bits - plain.size_bits >= 800
    assert longer.error_bound > plain.error_bound


def test_a_network_that_a_template_names_since_it_did_well_is_paid_for(file, tmp_path, monkeypatch):
    """No byte says its name: it counts as one of 2³² that might have been named."""
    model, header = rebuild(file)
    compact = tmp_path / "m.subspan"
    checkpoint.save(model, compact, extra=header["extra"], bits=8)
    assert certify(compact).choices_bits == 0
    monkeypatch.setattr(certificate, "CHOSEN", (checkpoint.inspect(compact)["template"],))
    assert certify(compact, choices=2).choices_bits == 33
    assert certify(file).choices_bits == 0  # a file with all names in its bytes


def test_pixels_are_normalised_by_the_file(file, tmp_path, monkeypatch):
    """By what its bytes say, and not by the statistics of the data that are there now."""
    seen = []
    monkeypatch.setattr(
        Classification, "count_mistakes", lambda task, net: seen.append(task.images.mean) or (1, 9)
    )
    extra = checkpoint.inspect(file)["extra"]
    near = extra["mean"][0] * 1.001
    certify(resaved(file, tmp_path / "near.safetensors", mean=[near]))
    assert seen[0].tolist() == pytest.approx([near], rel=1e-7)


def test_the_command(file, cli, in_tmp_path):
    said = cli("bound", file, "--data", "digits", "--delta", 0.1, "--out", "bound.json")
    assert (said.code, said.err) == (0, "")
    record = json.loads((in_tmp_path / "bound.json").read_text())
    assert record["delta"] == 0.1
    assert record["error_bound"] == certify(file, delta=0.1).error_bound
    assert f"{file.stat().st_size:,} bytes" in said.out
    assert f"mistakes on the training samples: {record['mistakes']} of 1,438" in said.out
    assert "with 90 % confidence" in said.out
    assert "- the samples are independent draws" in said.out
    assert "So much says nothing, for a guess errs in 90 %" in said.out
    said = cli("bound", file, "--out", file)
    assert said.code == 2
    assert "is the checkpoint itself" in said.err
    said = cli("bound", file, "--out", "/proc/bound.json")  # where there can be no file
    assert (said.code, "So much says nothing" in said.out) == (1, True)


@pytest.mark.parametrize("bits", [None, 4])
def test_the_validation_part_is_that_of_the_training(bits, tmp_path):
    """It decides which images give the mean that the file says."""
    options = {} if bits is None else {"bits": bits}
    train(a_run(dim=5, validation=0.9, **options), tmp_path / "run")
    found = certify(tmp_path / "run" / ("model.safetensors" if bits is None else "model.subspan"))
    assert found.samples == 1438


def test_a_bound_that_says_something(cli, in_tmp_path, monkeypatch):
    """With a hundred times as many samples the same file is worth a sentence; it is rounded up."""
    monkeypatch.setattr(Classification, "count_mistakes", lambda task, net: (9_000, 300_000))
    assert cli("train", "--net", "mlp-8", "--epochs", 1, "--dim", 5, "--out", "run").code == 0
    said = cli("bound", "run/model.safetensors", "--out", "bound.json")
    assert said.code == 0
    assert "says nothing" not in said.out
    bound = json.loads((in_tmp_path / "bound.json").read_text())["error_bound"]
    shown = float(said.out.partition("at most ")[2].split()[0]) / 100
    assert 0.03 < bound <= shown < bound + 1e-4


# ---- what is refused -----------------------------------------------------------------------------


def test_a_file_that_does_not_say_its_training(file, tmp_path):
    for fact in ("data", "net", "seed"):
        spoilt = resaved(file, tmp_path / "spoilt.safetensors", **{fact: None})
        with pytest.raises(SubspanError, match=rf"does not say what it was trained on \({fact}\)"):
            certify(spoilt)
    subspan.save(nn.Linear(3, 2), tmp_path / "plain.safetensors")
    with pytest.raises(SubspanError, match=r"\(net, data, seed\).* a file of subspan train"):
        certify(tmp_path / "plain.safetensors")


def test_statistics_that_no_byte_pays_for(file, tmp_path):
    with pytest.raises(SubspanError, match="does not say the mean of its training data"):
        certify(resaved(file, tmp_path / "spoilt.safetensors", mean=None))


def test_other_data(file, tmp_path):
    other = image_folder(tmp_path / "other", size=(8, 8))
    with pytest.raises(SubspanError, match=r"other is not what .* was trained on \(.*as --data"):
        certify(file, str(other))
    mean = checkpoint.inspect(file)["extra"]["mean"]
    spoilt = resaved(file, tmp_path / "spoilt.safetensors", mean=[1.1 * mean[0]])
    with pytest.raises(SubspanError, match=r"digits is not what .* \(mean is"):
        certify(spoilt)


def test_shuffled_labels(file, tmp_path):
    own = "subspan.training.tasks.shuffled_labels:task"
    spoilt = resaved(file, tmp_path / "spoilt.safetensors", task=own)
    with pytest.raises(SubspanError, match="shuffled labels have no test error to bound"):
        certify(spoilt)


OWN = """
import torch
from torch import nn
from subspan.training import data
from subspan.training.tasks import Task
from subspan.training.tasks.classification import Classification
from subspan.training.train import train
from tests.runs import a_run

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

class Regression(Task):
    def network(self):
        return nn.Linear(3, 1)
    def size(self):
        return 8
    def batch(self, index):
        return index[:, None] * torch.ones(3)
    def loss(self, net, batch):
        return net(batch).square().mean()
    def evaluate(self, net, part):
        return 1.0, 0.5

def task():
    return Regression()

def images():
    return Classification(data.load("digits"), "mlp-8")
"""


def test_a_task_without_mistakes(cli, in_tmp_path):
    (in_tmp_path / "bound_own.py").write_text(OWN)
    told = ["--task", "bound_own:task", "--init", "seed", "--epochs", 1, "--dim", 2, "--out", "a"]
    assert cli("train", *told).code == 0
    said = cli("bound", "a/model.safetensors")
    assert said.code == 2
    assert "has no mistakes to count, and only a loss of 0 or 1 has this bound" in said.err


NAN = float("nan")


@pytest.mark.parametrize(
    "found", [(300, 200), (0, 0), (-1, 200), (NAN, 200), (3.5, 200.0), 5, ("a", "b"), (1, 2, 3)]
)
def test_mistakes_that_are_no_part_of_samples(found, file, monkeypatch):
    monkeypatch.setattr(Classification, "count_mistakes", lambda task, net: found)
    with pytest.raises(SubspanError, match="count_mistakes must return the number of mistakes"):
        certify(file)


def test_mistakes_as_tensors(file, monkeypatch):
    counts = torch.tensor(3), np.int64(200)
    monkeypatch.setattr(Classification, "count_mistakes", lambda task, net: counts)
    assert certify(file).training_error == 3 / 200


def test_a_task_of_your_own_is_taken_at_your_word(cli, in_tmp_path):
    (in_tmp_path / "bound_own.py").write_text(OWN)
    told = ["--task", "bound_own:images", "--init", "seed", "--epochs", 1, "--dim", 2, "--out", "a"]
    assert cli("train", *told).code == 0
    said = cli("bound", "a/model.safetensors", "--out", "bound.json")
    assert (said.code, said.err) == (0, "")
    assert "- no training or validation sample of your task is one of its test part" in said.out
    assert "- your task gives the samples that it gave in the training" in said.out
    record = json.loads((in_tmp_path / "bound.json").read_text())
    assert (record["data"], record["samples"]) == ("bound_own:images", 1438)


def test_weights_of_your_own_code_are_prior_only_if_you_say_so(cli, in_tmp_path):
    (in_tmp_path / "bound_own.py").write_text(OWN)
    told = ["--net", "bound_own:net", "--epochs", 1, "--dim", 5]
    assert cli("train", *told, "--out", "own").code == 0
    said = cli("bound", "own/model.safetensors")
    assert said.code == 2
    assert "the initial weights that your code makes, which are not in its bytes" in said.err
    said = cli("bound", "own/model.safetensors", "--base-is-prior")
    assert said.code == 0
    assert "- the initial weights that your code makes never saw these samples" in said.out
    assert cli("train", *told, "--init", "seed", "--out", "seed").code == 0
    assert cli("bound", "seed/model.safetensors").code == 0


MADE = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, values):
        super().__init__(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))
        self.give(torch.tensor(values))
    def give(self, made):
        self.made = nn.Parameter(made)
    def forward(self, x):
        return super().forward(x) + self.made.sum()

class Buffer(Net):
    def give(self, made):
        self.register_buffer("made", made)

class Unsaved(Net):
    def give(self, made):
        self.register_buffer("made", made, persistent=False)

class Plain(Net):
    def give(self, made):
        self.made = made

def parameter(): return Net([0.0, 1.0])
def buffer(): return Buffer([0.25, 0.5])
def unsaved(): return Unsaved([2.0])
def plain(): return Plain([2.0])
def ones(): return Net([1.0, 1.0])
"""


@pytest.mark.parametrize(
    ("net", "how", "asked"),
    [
        ("parameter", ["--dim", 2, "--targets", "1.weight"], True),
        ("parameter", ["--dim", 2, "--targets", "1.weight", "--train-fully", "made"], False),
        ("parameter", ["--method", "full"], False),  # the file holds all
        ("buffer", ["--dim", 2], True),
        ("buffer", ["--method", "full"], False),
        ("unsaved", ["--method", "full"], True),
        ("plain", ["--method", "head", "--train-fully", "1.weight"], True),
        ("ones", ["--dim", 2], False),
    ],
)
def test_what_a_seed_does_not_draw_is_prior_only_if_you_say_so(net, how, asked, cli, in_tmp_path):
    """A vector of your own code may be the samples' means: no byte pays for it."""
    (in_tmp_path / "bound_made.py").write_text(MADE)
    told = ["--net", f"bound_made:{net}", "--init", "seed", "--epochs", 1, *how, "--out", "a"]
    assert cli("train", *told).code == 0
    said = cli("bound", "a/model.safetensors")
    assert said.code == 2 * asked
    assert ("what your code makes beside the drawn weights (made), which are" in said.err) == asked
    said = cli("bound", "a/model.safetensors", "--base-is-prior")
    assert said.code == 0
    assert ("(made) never saw these samples" in said.out) == asked


def test_a_pretrained_base(file):
    header = checkpoint.inspect(file)
    certificate._check_base(file, header, False)
    header["base"] = {"repo": "some/net"}
    with pytest.raises(SubspanError, match="around a pretrained base, which are not in its bytes"):
        certificate._check_base(file, header, False)
    assert certificate._check_base(file, header, True) == [
        "a pretrained base never saw these samples"
    ]
    del header["base"]
    header["extra"]["task"] = "text"
    with pytest.raises(SubspanError, match="--base-is-prior"):
        certificate._check_base(file, header, False)
    header["kind"] = "full"  # holds all weights
    assert certificate._check_base(file, header, False) == []


class Chance(nn.Module):
    """Dropout that eval() does not end."""

    def forward(self, x):
        return dropout(x, training=True)


@pytest.mark.parametrize("layer", [partial(nn.BatchNorm1d, 8, track_running_stats=False), Chance])
def test_a_network_that_is_no_function_of_one_sample(layer, file, tmp_path, monkeypatch):
    def make(*_):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), layer(), nn.Linear(8, 10))

    monkeypatch.setattr(nets, "build", make)
    model = subspan.SubspaceModel.from_seed(make, 5, seed=0)
    checkpoint.save(model, tmp_path / "b.safetensors", extra=checkpoint.inspect(file)["extra"])
    with pytest.raises(SubspanError, match="depend on the other samples of its batch"):
        certify(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": 0.0}, "delta must be a probability"),
        ({"delta": 1.0}, "delta must be a probability"),
        ({"delta": math.nan}, "delta must be a probability"),
        ({"choices": 0}, "choices must be at least 1"),
        ({"choices": 1.5}, "^choices must be an integer, got 1.5"),
        ({"delta": "0.05"}, "^delta must be a number, got '0.05'"),
        ({"base_is_prior": "no"}, "^base_is_prior must be true or false, got 'no'"),
    ],
)
def test_bad_numbers(file, options, message):
    with pytest.raises(SubspanError, match=message):
        certify(file, **options)
