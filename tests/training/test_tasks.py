"""Tasks that are not image classification: the protocol, by a line that is fitted to points."""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from subspan.errors import SubspanError
from subspan.sweeps.running import Running
from subspan.sweeps.sweep import sweep
from subspan.training import data, tasks
from subspan.training.config import Run, Training
from subspan.training.evaluate import evaluate, evaluate_checkpoint, rebuild
from subspan.training.schema import from_json, to_json
from subspan.training.score import ACCURACY, Score
from subspan.training.train import prepare, train
from tests.runs import a_sweep, record_of

OWN = '''
import torch
from torch import nn
from subspan.training.score import Score
from subspan.training.tasks import Task

class Line(Task):
    """y = x A, of which a linear layer finds A."""

    score = Score("error", higher_is_better=False, zero=1.0, percent=False)
    notes = ("drawn by itself",)

    def __init__(self, seed, samples):
        g = torch.Generator().manual_seed(seed)
        self.x = torch.randn(samples, 6, generator=g)
        self.y = self.x @ torch.randn(6, 2, generator=g)

    def network(self):
        return nn.Linear(6, 2, bias=False)

    def size(self):
        return len(self.x) // 2

    def batch(self, index):
        return self.x[index], self.y[index]

    def loss(self, net, batch):
        return (net(batch[0]) - batch[1]).square().mean()

    def evaluate(self, net, part):
        half, quarter = len(self.x) // 2, len(self.x) // 4
        begin = half if part == "validation" else half + quarter
        x, y = self.x[begin : begin + quarter], self.y[begin : begin + quarter]
        with torch.no_grad():
            miss = (net(x) - y).norm() / y.norm()
        return float(miss**2), float(miss)

def line(seed, data="400"):
    return Line(seed, int(data))

def nothing():
    return 3

def takes_nothing():
    return Line(0, 40)

class NoGradient(Line):
    def loss(self, net, batch):
        return super().loss(net, batch).detach()

def detached(seed):
    return NoGradient(seed, 40)

class Broken(Line):
    def loss(self, net, batch):
        raise KeyError("x")

def broken(seed):
    return Broken(seed, 40)

class Unbounded(Line):
    def evaluate(self, net, part):
        return 0.5, float("nan")

def unbounded(seed):
    return Unbounded(seed, 40)

class Faulty(Line):
    """One thing of it is wrong."""

    def __init__(self, seed, data):
        super().__init__(seed, 40)
        self.wrong = data
        if data == "score":
            self.score = None

    def size(self):
        return {"size": 2.5, "empty": 0}.get(self.wrong, super().size())

    def network(self):
        if self.wrong == "train":
            return nn.Sequential(nn.BatchNorm1d(6), super().network())
        return None if self.wrong == "network" else super().network()

    def loss(self, net, batch):
        if self.wrong == "loss":
            return (net(batch[0]) - batch[1]).square().mean(dim=1)
        if self.wrong == "complex":
            return super().loss(net, batch) * 1j
        return super().loss(net, batch)

    def evaluate(self, net, part):
        if self.wrong == "train":
            net.train()
        return {"alone": 0.5, "texts": ("a", "b")}.get(self.wrong, super().evaluate(net, part))

    def describe(self):
        return {"tensor": {"mean": self.x}, "taken": {"seed": 3}}.get(self.wrong, {})

def faulty(seed, data):
    return Faulty(seed, data)
'''
SHUFFLED = "subspan.training.tasks.shuffled_labels:task"
EXAMPLES = Path(__file__).parents[2] / "examples"
_fresh = itertools.count()


@pytest.fixture
def own(in_tmp_path):
    """The name of a module with these tasks, new for every test."""
    name = f"own_tasks_{next(_fresh)}"
    Path(f"{name}.py").write_text(OWN)
    yield name
    sys.modules.pop(name, None)


def a_run(name: str, lr: float = 0.1, **settings) -> Run:
    options = {"dim": settings.pop("dim")} if "dim" in settings else {}
    training = Training(**{"task": name, "epochs": 3, "batch_size": 20, **settings})
    return Run(training, "hash" if options else "full", options, lr)


def test_images_are_the_usual_task():
    assert (Training().net, Training().data, Training().task) == ("mlp", "digits", None)
    assert Training(task="images") == Training()
    task = tasks.load(Training(), seed=0)
    assert task.score == ACCURACY
    assert task.size() == 1318


def test_a_run(own):
    record = train(a_run(f"{own}:line", dim=12), Path("run"))
    assert record.score == Score("error", higher_is_better=False, zero=1.0, percent=False)
    assert record.config["task"] == f"{own}:line"
    assert (record.config["net"], record.config["data"]) == (None, None)
    assert record.notes == ["drawn by itself"]
    scores = [row.val_score for row in record.history]
    assert record.val_score == min(scores) == scores[record.best_epoch - 1] < 0.3
    # The file finds the task again, and its network with its first weights.
    found = evaluate_checkpoint("run/model.safetensors")
    assert found["test_error"] == record.test_score
    assert "images" not in found
    model, _ = rebuild("run/model.safetensors")
    assert evaluate(model, tasks.load(Training(task=f"{own}:line"), 0), "validation")[1] == min(
        scores
    )
    other = evaluate_checkpoint("run/model.safetensors", "40")
    assert other["data"] == "40"
    assert other["test_error"] != found["test_error"]


def test_the_lowest_is_best(own, monkeypatch):
    """The epoch, and the learning rate of a sweep."""
    values = iter([0.5, 0.2, 0.4, 0.2, 0.1])  # three epochs, then the test

    def told(self, net, part):
        return 1.0, next(values)

    with monkeypatch.context() as patch:
        patch.setattr(__import__(own).Line, "evaluate", told)
        record = train(a_run(f"{own}:line"), Path("run"))
    assert (record.best_epoch, record.val_score) == (2, 0.2)
    config = a_sweep(
        net=None,
        data=None,
        task=f"{own}:line",
        batch_size=20,
        lrs=(1e-4, 0.1),
        dims=("12", "3"),
        baseline_lrs=(0.1, 1e-4),
        epochs=3,
        seeds=2,
    )
    result = sweep(config, Path("sweep"), Running(jobs=1))
    assert result.score.name == "error"
    assert result.baseline.lr == result.rows[0].lr == 0.1
    mean = sum(result.baseline.test_score) / 2
    assert result.d_int["hash"].target == pytest.approx(1 + 0.9 * (mean - 1))


def test_by_command(own, cli):
    words = ("--task", f"{own}:line", "--epochs", 3, "--batch-size", 20)
    said = cli("train", *words, "--dim", 12, "--lr", 0.1, "--out", "run")
    assert (said.code, said.err) == (0, "")
    assert f"{own}:line, hash, lr 0.1: 30 steps" in said.out
    error = record_of(Path("run"))["test_score"]
    assert f"test error {error:.4g}, 12 numbers stored" in said.out
    assert f"test_error: {error}" in cli("eval", "run/model.safetensors").out
    assert cli("export", "run/model.safetensors", "weights.safetensors").code == 0
    weights = safetensors.torch.load_file("weights.safetensors")["weight"]
    net = tasks.load(Training(task=f"{own}:line"), 0).network()
    with torch.no_grad():
        net.weight.copy_(weights)
    assert tasks.load(Training(task=f"{own}:line"), 0).evaluate(net, "test")[1] == error
    said = cli(
        "sweep",
        *words,
        "--dims",
        "3,12",
        "--lrs",
        0.1,
        "--baseline-lrs",
        0.1,
        "--jobs",
        1,
        "--out",
        "s",
    )
    assert (said.code, said.err) == (0, "")
    assert "test error" in said.out
    assert "%" not in said.out.partition("intrinsic")[0]
    assert Path("s/curve.png").is_file()


def test_a_run_goes_on(own):
    """Bit for bit, as that of images."""
    whole = train(a_run(f"{own}:line", dim=12), Path("whole"))

    def die(row):
        if row.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(a_run(f"{own}:line", dim=12), Path("parts"), report=die)
    parts = train(a_run(f"{own}:line", dim=12), Path("parts"))
    files = [Path(name, "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    assert parts.test_score == whole.test_score


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nothing", r"must return a subspan.training.tasks.Task, got int"),
        ("detached", "a tensor of one number with a gradient, got a tensor of shape .* without"),
        ("broken", "loss of two samples cannot be had: 'x'"),
        ("takes_nothing", "has no parameter data, its signature is .*: leave --data mnist out"),
        ("lime", "unknown function of own_tasks_[0-9]+ 'lime': did you mean line"),
    ],
)
def test_what_is_no_task(own, function, message):
    with pytest.raises(SubspanError, match=message):
        prepare(a_run(f"{own}:{function}", data="mnist" if function == "takes_nothing" else None))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("size", "task's size must be a positive integer, got 2.5"),
        ("empty", "task's size must be a positive integer, got 0"),
        ("score", "task's score must be a Score, got None"),
        ("network", "task's network must be an nn.Module, got NoneType"),
        ("loss", r"tensor of one number with a gradient, got a tensor of shape \(2,\)"),
        ("complex", r"a gradient, got a tensor of shape \(\), torch.complex64"),
        ("tensor", "what the task's describe returns, for a file: mean must be a number, got tens"),
        ("taken", "the task's describe returns seed, under which a file has what the run says"),
        ("alone", "evaluate must return its loss and its score, two numbers, got 0.5"),
        ("texts", r"evaluate must return its loss and its score, two numbers, got \('a', 'b'\)"),
        ("train", r"evaluate changed 0\.running_mean of the network, as if the validation part"),
    ],
)
def test_a_faulty_task(own, wrong, message):
    with pytest.raises(SubspanError, match=message):
        train(a_run(f"{own}:faulty", data=wrong), Path("run"))
    assert Path("run").exists() == (wrong in ("alone", "texts", "train"))


def test_an_evaluation_leaves_no_trace(own, monkeypatch):
    """Whether it ends in training mode, switches gradients off, or seeds a generator."""
    task = tasks.load(Training(task=f"{own}:line"), 0)
    net = task.network()

    def leaves(net, part):
        torch.manual_seed(3)
        torch.set_grad_enabled(False)
        return 0.0, float(net.train().training)

    monkeypatch.setattr(task, "evaluate", leaves)
    before = torch.get_rng_state()
    try:
        assert evaluate(net, task, "test") == (0.0, 1.0)
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
    assert not net.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_score_must_be_a_number(own):
    with pytest.raises(
        SubspanError, match=r"must be a finite number, got nan: .* lower the learning rate"
    ):
        train(a_run(f"{own}:unbounded"), Path("run"))
    assert record_of(Path("run"))["status"] == "failed"


@pytest.mark.parametrize(
    ("score", "value", "good"),
    [
        (ACCURACY, 98.5, False),
        (ACCURACY, -0.1, False),
        (ACCURACY, 1.0, True),
        (Score("error", False, 1.0, percent=True), 2.5, True),  # 250 per cent
        (Score("R²", percent=False), -3.0, True),
        (Score(percent=False), math.inf, False),
    ],
)
def test_what_a_score_can_be(score, value, good):
    if good:
        assert score.checked(value) == value
        return
    with pytest.raises(SubspanError, match=r"score.* must be a f\w+"):
        score.checked(value)


def test_a_task_reads_its_data_itself():
    training = Training(task=SHUFFLED, task_options={"resize": 32})
    with pytest.raises(SubspanError, match="has no options, got --resize"):
        tasks.load(training, 0)
    with pytest.raises(SubspanError, match="resize must be a number of pixels up to 9999, or"):
        tasks.load(Training(task_options={"resize": "8by8"}), 0)


def test_the_task_moves_with_its_tensors(own):
    task = tasks.load(Training(task=f"{own}:line"), 0)
    moved = task.to(torch.device("meta"))
    assert (moved.x.device.type, moved.y.device.type) == ("meta", "meta")
    assert task.x.device.type == "cpu"


def test_scores_for_people():
    assert ACCURACY.show(0.98765) == "98.77 %"
    assert Score("error", False, 1.0, False).show(0.0123456) == "0.01235"
    assert ACCURACY.share(0.8, 0.9) == pytest.approx(0.72)
    assert Score("bits", False, 6.0, False).share(2.0, 0.9) == pytest.approx(2.4)
    assert from_json(Score, json.loads(json.dumps(to_json(ACCURACY)))) == ACCURACY
    assert from_json(Score, {}) == ACCURACY


def test_the_language_model(in_tmp_path, monkeypatch):
    """The text is one whose every character follows from the one before."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    Path("text.txt").write_text("abcdefgh" * 200)
    record = train(a_run("language_model:task", lr=0.01, data="text.txt", epochs=5), Path("run"))
    assert record.score.zero == 3.0  # bits: eight characters
    assert 0 < record.test_score < 0.1
    text = Path("text.txt")
    text.write_text("".join(chr(97 + (i * i * 7919) % 23) for i in range(3000)))
    hard = train(a_run("language_model:task", lr=1e-6, data="text.txt", epochs=1), Path("hard"))
    assert hard.test_score == pytest.approx(math.log2(12), abs=0.5)  # knows nothing yet


def test_the_physics(in_tmp_path, monkeypatch):
    """The exact solution solves it, and training comes near."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import physics

    task = physics.task(seed=1)

    class Exact(torch.nn.Module):
        def forward(self, points):
            return physics.solution(points)

    loss, error = task.evaluate(Exact(), "test")
    assert loss < 1e-6
    assert error == 0
    corners = torch.tensor([[0.0, 0.3], [1.0, 0.5], [0.7, 0.0], [0.2, 1.0]])
    assert not task.network()(corners).any()
    record = train(a_run("physics:task", lr=0.3, dim=100, epochs=10, batch_size=100), Path("run"))
    assert record.test_score < 0.1
    assert record.stored_parameters == 100


def test_shuffled_labels():
    """The same images and as many of each label, but one says nothing of the other."""
    images = tasks.load(Training(task=SHUFFLED, net="mlp-8", data="digits"), 0).images
    # Of ten classes a tenth is right by chance: 3 standard deviations around it.
    raw = data.load("digits", validation=0).train
    assert torch.equal(raw.labels.bincount(), images.train.labels.bincount())
    same = (raw.labels == images.train.labels).float().mean()
    assert torch.equal(raw.images, images.train.images)
    assert abs(same - 0.1) < 3 * (0.09 / len(raw)) ** 0.5
    again = tasks.load(Training(task=SHUFFLED, net="mlp-8", data="digits"), 0)
    assert torch.equal(again.images.train.labels, images.train.labels)
    seeds = tasks.load(Training(task=SHUFFLED, net="mlp-8", data="digits"), 1)
    assert not torch.equal(seeds.images.train.labels, images.train.labels)
    # What is trained on is what is judged.
    assert images.test is images.validation is images.train
    some = tasks.load(Training(task=SHUFFLED, net="mlp-8", data="digits[:50]"), 0)
    assert some.size() == 50
    assert some.score.name == "training accuracy"
    for bad in ("digits[:0]", "digits[:9999]", "digits[:x]"):
        with pytest.raises(SubspanError, match=r"1,438 training images: expected digits\[:N\]"):
            tasks.load(Training(task=SHUFFLED, data=bad), 0)


def test_a_task_of_the_users_has_a_name_and_options(own, cli, monkeypatch):
    class Lines(tasks.TaskKind):
        options = (tasks.Option("samples", int, "how many points"),)

        def load(self, training, seed):
            return __import__(own).Line(seed, training.task_options.get("samples", 400))

        def network(self, extra):
            return lambda: tasks.draw(tasks.again(extra), extra["seed"])

    monkeypatch.setattr(tasks, "_registry", copy.copy(tasks._registry))
    tasks.register(Lines("lines", "points on a line"))
    assert "how many points" in cli("train", "--task", "lines", "--help").out
    words = ("--task", "lines", "--epochs", 1, "--samples", 80)
    said = cli("train", *words, "--dim", 12, "--out", "run")
    assert (said.code, said.err) == (0, "")
    found = evaluate_checkpoint("run/model.safetensors")
    assert found["test_error"] == record_of(Path("run"))["test_score"]
    said = cli("train", "--task", "lines", "--resize", 8, "--dim", 12, "--out", "other")
    assert (said.code, "it is one of images" in said.err) == (2, True)
    said = cli("train", "--resume", "--samples", 90, "--out", "run")
    assert (said.code, "samples 80 → 90" in said.err) == (2, True)
