"""The settings of a run: precision, schedule, optimizer, a network of the user's, processes."""

from __future__ import annotations

import math
import os
import sys

import pytest
import torch
from torch import nn

import subspan.training.loop as loop
import subspan.training.prepare as preparing
from subspan import checkpoint
from subspan.errors import SubspanError
from subspan.training import devices
from subspan.training.evaluate import evaluate, evaluate_checkpoint, rebuild
from subspan.training.schedule import schedule
from subspan.training.train import prepare, train
from tests.runs import STEPS, a_run, record_of, train_up_to
from tests.training.data.makers import image_folder


def test_precisions_take_turns_in_one_process(tmp_path, monkeypatch):
    """And the test accuracy is of the full precision that everyone gets who loads the file."""
    exact = []

    def watched(model, task, part):
        loss, accuracy = evaluate(model, task, part)
        if part == "test":
            some = task.images.normalize(task.images.test.images[:50])
            saved, _ = rebuild(out / "best.safetensors")
            exact.append(torch.equal(model(some), saved.eval()(some)))
        return loss, accuracy

    monkeypatch.setattr(loop, "evaluate", watched)
    for name, precision in (("a", "bf16"), ("b", "no"), ("c", "bf16")):
        out = tmp_path / name
        record = train(a_run(dim=30, epochs=2, mixed_precision=precision), out)
        found = evaluate_checkpoint(out / "model.safetensors")
        assert found["test_accuracy"] == record.test_score
    assert exact == [True] * 3
    losses = [record_of(tmp_path / name)["history"][0]["train_loss"] for name in "abc"]
    assert losses[0] == losses[2] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_what_fp16_cannot_do(monkeypatch):
    with pytest.raises(SubspanError, match="fp16 needs a GPU: use bf16, or no"):
        prepare(a_run(dim=5, mixed_precision="fp16"))
    monkeypatch.setattr(preparing, "on_cpu", lambda training: False)
    assert prepare(a_run(dim=5, mixed_precision="fp16"))
    for method, options in (("dlrt", {"tolerance": 0.1}), ("nes", {"dim": 5})):
        with pytest.raises(SubspanError, match=f"a step of {method} evaluates the loss itself"):
            prepare(a_run(method, **options, mixed_precision="fp16"))


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("constant", [0.5] * 8),
        ("cosine", [0.5 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]),
        ("onecycle", None),
    ],
)
def test_schedules(name, rates):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.5)
    scheduler, seen = schedule(optimizer, name, 8), []
    for _ in range(8):
        seen.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    if rates:
        assert seen == pytest.approx(rates)
    else:
        top = seen.index(max(seen))
        assert max(seen) == pytest.approx(0.5, rel=0.05)
        assert seen[:top] == sorted(seen[:top])
        assert seen[top:] == sorted(seen[top:], reverse=True)
        assert seen[-1] < 0.05 * 0.5


def test_one_step_in_all(tmp_path):
    record = train(a_run(dim=5, batch_size=2000), tmp_path)
    assert len(record.history) == 1


def test_steps_in_place_of_epochs(tmp_path):
    """The last epoch is a part of one, and the schedule ends with it."""
    run = a_run(dim=5, steps=STEPS + 4, epochs=7, lr=0.5)
    counted = []
    record = train(run, tmp_path / "whole", on_step=lambda: counted.append(1))
    assert len(counted) == STEPS + 4
    assert [row.epoch for row in record.history] == [1, 2]
    first, second = record.history
    per_step = sorted([first.seconds / STEPS, second.seconds / 4])
    assert record.seconds_per_step == pytest.approx(sum(per_step) / 2)
    assert record.config["steps"] == STEPS + 4
    train_up_to(STEPS + 2, run, tmp_path / "parts")
    again = train(run, tmp_path / "parts")
    assert [row.train_loss for row in again.history] == [first.train_loss, second.train_loss]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.5)
    planned = schedule(optimizer, "onecycle", STEPS + 4)
    for _ in range(STEPS):
        optimizer.step()
        planned.step()
    assert second.learning_rate == pytest.approx(planned.get_last_lr()[0])
    short = train(a_run(dim=5, steps=3), tmp_path / "short")
    assert len(short.history) == 1


def test_optimizer_and_weight_decay_reach_the_weights(tmp_path):
    def size(**settings):
        out = tmp_path / str(len(os.listdir(tmp_path)))
        train(a_run(dim=30, schedule="constant", **settings), out)
        return float(checkpoint.read(out / "model.safetensors")[1]["coordinates"].norm())

    adam, sgd = size(lr=0.1), size(lr=0.1, optimizer="sgd")
    decayed = size(lr=0.1, optimizer="sgd", weight_decay=5.0)
    assert adam != sgd
    assert decayed < 0.5 * sgd


OWN_NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(64, classes)

    def forward(self, x):
        return self.fc(self.drop(x.flatten(1)))

def wrong_scores(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
def wrong_input(): return nn.Sequential(nn.Flatten(), nn.Linear(65, 10))
def wrong_kind(): return nn.BatchNorm1d(3)
def no_net(): return 3
class Two(Net):
    def forward(self, x, y): return self.fc(x)
class Pair(Net):
    def forward(self, x): return super().forward(x), x
"""


@pytest.fixture
def own_net(in_tmp_path):
    (in_tmp_path / "own_net_of_a_test.py").write_text(OWN_NET)
    yield "own_net_of_a_test"
    sys.modules.pop("own_net_of_a_test", None)


def test_a_net_of_the_users_own(own_net, in_tmp_path, monkeypatch):
    """It keeps the weights that it draws itself, the same ones each time, dropout included."""
    records = [
        train(a_run(dim=60, net=f"{own_net}:Net", seed=seed), in_tmp_path / out)
        for out, seed in (("a", 5), ("b", 5), ("c", 2**40 + 5))
    ]
    assert records[0].weights == 650
    assert records[0].history[0].train_loss == records[1].history[0].train_loss
    for out, record in zip("abc", records, strict=True):
        file = in_tmp_path / out / "model.safetensors"
        assert checkpoint.inspect(file)["init_seed"] is None
        assert evaluate_checkpoint(file)["test_accuracy"] == record.test_score
    seeded = train(a_run(dim=60, net=f"{own_net}:Net", init="seed"), in_tmp_path / "seed")
    file = in_tmp_path / "seed" / "model.safetensors"
    assert checkpoint.inspect(file)["init_seed"] == 0
    assert evaluate_checkpoint(file)["test_accuracy"] == seeded.test_score
    # Another base: the file says that it does not fit.
    module = sys.modules[own_net]
    monkeypatch.setattr(
        module, "Net", type("Net", (module.Net,), {"__init__": drawn_otherwise(module)})
    )
    with pytest.raises(SubspanError, match="was trained from other initial weights"):
        evaluate_checkpoint(in_tmp_path / "a" / "model.safetensors")


def drawn_otherwise(module):
    plain = module.Net.__init__

    def init(self):
        torch.rand(1)
        plain(self)

    return init


@pytest.mark.parametrize(
    ("net", "message"),
    [
        ("wrong_scores", r"one score per class, shape \(batch, 10\), got \(1, 3\)"),
        ("wrong_input", r"does not take float32 images of shape \(1, 8, 8\): mat1 and mat2"),
        ("wrong_kind", r"take float32 images of shape \(1, 8, 8\): expected 2D or 3D input"),
        ("no_net", "must return a torch.nn.Module, got int"),
        ("Two", r"does not take float32 images .* missing 1 required positional argument: 'y'"),
        ("Pair", r"shape \(batch, 10\), got tuple"),
        ("nope", "unknown function of own_net_of_a_test 'nope'"),
    ],
)
def test_a_net_that_cannot_be_trained(net, message, own_net, in_tmp_path):
    with pytest.raises(SubspanError, match=message):
        train(a_run(dim=5, net=f"{own_net}:{net}"), in_tmp_path / "run")
    assert not (in_tmp_path / "run").exists()


def test_running_statistics_are_counted(in_tmp_path):
    """BatchNorm's buffers are needed for inference and no seed gives them."""
    image_folder(in_tmp_path / "pets", mode="RGB", size=(8, 8))
    settings = {"net": "resnet8", "data": "./pets", "batch_size": 8, "validation": 0.25, "lr": 0.01}
    for method, options in (("hash", {"dim": 20}), ("full", {})):
        record = train(a_run(method, **settings, **options), in_tmp_path / method)
        trained = 20 if method == "hash" else record.weights
        assert record.trainable_parameters == trained
        # Means, variances, and the count of batches of each of seven normalisations.
        assert record.stored_parameters == trained + 240 + 240 + 7
        found = evaluate_checkpoint(in_tmp_path / method / "model.safetensors")
        assert found["test_accuracy"] == record.test_score


def test_many_processes_need_batches_that_divide(tmp_path, monkeypatch):
    accelerator = devices.accelerator(a_run(dim=5).training)
    monkeypatch.setattr(type(accelerator), "num_processes", 3)
    with pytest.raises(
        SubspanError, match="batch_size must be a multiple of the 3 processes, got 128"
    ):
        train(a_run(dim=5), tmp_path / "run")
    assert not (tmp_path / "run").exists()
