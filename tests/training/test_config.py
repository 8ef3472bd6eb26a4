"""The settings of runs and sweeps: which are refused, and how records have them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from subspan.errors import SubspanError
from subspan.training.config import Run, Sweep, Training, floats, split

BAD_TRAINING = [
    ({"epochs": 0}, "epochs must be at least 1, got 0"),
    ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ({"patience": 0}, "patience must be at least 1 epoch, or null"),
    ({"validation": 0.0}, r"validation must be a share in \(0, 1\)"),
    ({"validation": 1.0}, r"validation must be a share in \(0, 1\)"),
    ({"validation": math.nan}, r"validation must be a share in \(0, 1\), got nan"),
    ({"weight_decay": -0.1}, "weight_decay must be a number that is not negative"),
    ({"weight_decay": math.inf}, "weight_decay must be .* got inf"),
    ({"weight_decay": math.nan}, "weight_decay must be .* got nan"),
    ({"optimizer": "adamw"}, "unknown optimizer 'adamw': did you mean adam"),
    ({"schedule": "linear"}, "unknown schedule 'linear': .* known are constant, cosine, onecycle"),
    ({"init": "he"}, "unknown init 'he': known are auto, own, seed"),
    ({"mixed_precision": "fp8"}, "unknown mixed_precision 'fp8': did you mean"),
    ({"device": "gpu"}, "unknown device 'gpu'"),
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"epochs": 1.5}, "^epochs must be an integer, got 1.5"),
    ({"batch_size": True}, "^batch_size must be an integer, got True"),
    ({"patience": "2"}, "^patience must be an integer or null, got '2'"),
    ({"validation": None}, "^validation must be a number, got None"),
    ({"task_options": None}, "^task_options must be a mapping, got None"),
    ({"task_options": {"resize": object()}}, "^task_options of resize must be a number, got <obj"),
    ({"net": ["mlp"]}, r"^net must be a text or null, got \['mlp'\]"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_TRAINING)
def test_training_refuses(settings, message):
    with pytest.raises(SubspanError, match=message):
        Training(**settings)


@pytest.mark.parametrize("lr", [0.0, -1.0, math.nan, math.inf])
def test_a_learning_rate_is_positive(lr):
    with pytest.raises(SubspanError, match=f"^lr must be a positive number, got {lr}"):
        Run(Training(), "hash", {}, lr)
    for name in ("lrs", "baseline_lrs"):
        with pytest.raises(SubspanError, match=f"^{name} must be a positive number, got {lr}"):
            Sweep(Training(), **{name: (0.1, lr)})


def test_a_seed_is_not_negative():
    with pytest.raises(SubspanError, match="seed must not be negative, got -1"):
        Run(Training(), "hash", {}, 0.1, seed=-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ()}, "methods is empty: name at least one"),
        ({"dims": ()}, "dims is empty: give at least one"),
        ({"methods": ("hash", "full", "hash")}, "methods names one value twice: hash, full, hash"),
        ({"dims": ("10", "10")}, "dims names one value twice"),
        ({"dims": "25"}, r"^dims must be a tuple of texts or a mapping, got '25': give \('25',\)$"),
        ({"dims": {"hash": "25"}}, "^dims of hash must be a tuple of texts, got '25'"),
        ({"methods": "hash"}, "^methods must be a tuple of texts, got 'hash'"),
        ({"lrs": (0.1, 0.10000000001)}, "lrs names one value twice: 0.1, 0.1"),
        ({"lrs": {"hash": (0.1, 0.1)}}, "lrs of hash names one value twice: 0.1, 0.1"),
        ({"lrs": 0.1}, r"^lrs must be a tuple of numbers or a mapping, got 0.1: give \(0.1,\)$"),
        ({"lrs": ("0.1",)}, "^lrs must be a number, got '0.1'"),
        ({"dims": {"hash": 25}}, r"^dims of hash must be a tuple of texts, got 25: give \(25,\)$"),
        ({"lrs": {"hash": (-0.1,)}}, "lrs of hash must be a positive number, got -0.1"),
        ({"lrs": {"hsah": (0.1,)}}, "unknown method of lrs 'hsah'.*hash"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"threshold": 2.0}, r"threshold must be in \(0, 1\], got 2.0"),
        ({"threshold": 0.0}, r"threshold must be in \(0, 1\]"),
        ({"threshold": math.nan}, r"threshold must be in \(0, 1\], got nan"),
    ],
)
def test_a_sweep_refuses(settings, message):
    with pytest.raises(SubspanError, match=message):
        Sweep(Training(), **settings)


def test_what_is_right_in_another_form():
    training = Training(epochs=np.int64(3), batch_size=64.0, data=Path("digits"))
    assert training == Training(epochs=3, batch_size=64)
    run = Run(
        training, "hash", {"dim": np.int64(5), "x": [{"y": np.True_}]}, torch.tensor(0.5), seed=1e3
    )
    assert json.loads(json.dumps(run.as_dict())) == run.as_dict()
    assert (run.options, run.lr, run.seed) == ({"dim": 5, "x": [{"y": True}]}, 0.5, 1000)
    config = Sweep(training, methods=["hash"], dims=np.array([5, 10]), lrs={"hash": [0.1]})
    assert (config.methods, config.dims, config.lrs) == (("hash",), ("5", "10"), {"hash": (0.1,)})


def test_configurations_are_flat_json():
    run = Run(Training(epochs=3), "hash", {"dim": 5}, 0.1, seed=2)
    flat = json.loads(json.dumps(run.as_dict()))
    assert flat == run.as_dict()
    assert flat["epochs"] == 3
    assert (flat["method"], flat["options"], flat["lr"], flat["seed"]) == (
        "hash",
        {"dim": 5},
        0.1,
        2,
    )
    flat = Sweep(Training(epochs=3), dims=("5", "6+7"), lrs=(0.1,)).as_dict()
    assert json.loads(json.dumps(flat)) == flat
    assert "training" not in flat
    assert (flat["epochs"], flat["dims"], flat["lrs"], flat["baseline"]) == (
        3,
        ["5", "6+7"],
        [0.1],
        "full",
    )


def test_learning_rates_of_each_method():
    config = Sweep(Training(), ("rbd", "fpd", "hash"), lrs={"rbd": (1.0,), "fpd": (2.0, 4.0)})
    assert [config.lrs_of(m) for m in ("rbd", "fpd", "hash", "full")] == [
        (1.0,),
        (2.0, 4.0),
        (),
        (),
    ]
    assert Sweep(Training(), lrs=(0.1,), baseline_lrs=(0.2,)).lrs_of("full") == (0.2,)
    assert json.loads(json.dumps(config.as_dict()))["lrs"] == {"rbd": [1.0], "fpd": [2.0, 4.0]}


def test_dims_of_each_method():
    config = Sweep(Training(), ("hash", "lora"), dims={"hash": ("300", "1000"), "lora": ("1",)})
    assert [config.dims_of(m) for m in ("hash", "lora")] == [("300", "1000"), ("1",)]
    assert Sweep(Training(), dims=("7",)).dims_of("hash") == ("7",)
    with pytest.raises(SubspanError, match="dims has none of rbd: give values of each method"):
        config.dims_of("rbd")
    with pytest.raises(SubspanError, match="unknown method of dims 'lroa': did you mean lora"):
        Sweep(Training(), ("lora",), dims={"lroa": ("1",)})
    with pytest.raises(SubspanError, match="dims of lora names one value twice: 1, 1"):
        Sweep(Training(), ("lora",), dims={"lora": ("1", "1")})


@pytest.mark.parametrize("values", ["10, 600+250,30", ["10", "600+250", "30"], [10, "600+250", 30]])
def test_split(values):
    assert split(values, "dims") == ("10", "600+250", "30")


def test_split_one_value():
    assert split("10", "dims") == split(10, "dims") == ("10",)
    assert split([], "dims") == ()


@pytest.mark.parametrize("values", ["", ",", "10,,30", "10,", ["10", ""]])
def test_split_refuses_empty_entries(values):
    with pytest.raises(SubspanError, match="dims has an empty entry"):
        split(values, "dims")


def test_floats():
    assert floats("0.1,1e-3", "lrs") == floats([0.1, "1e-3"], "lrs") == (0.1, 0.001)
    assert floats(0.1, "lrs") == (0.1,)
    for bad in ("0.1;0.2", "0.1,x", ["x"]):
        with pytest.raises(SubspanError, match="lrs must be numbers separated by commas"):
            floats(bad, "lrs")
