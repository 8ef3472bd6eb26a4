"""Methods: the registry, the laws that each of them keeps, and the example of the documentation."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from subspan import checkpoint
from subspan.errors import SubspanError
from subspan.families import projections
from subspan.families.hash import Hash
from subspan.families.registry import FAMILIES
from subspan.training import methods as registry
from subspan.training.evaluate import evaluate_checkpoint
from subspan.training.methods import Method, Option, method, methods, subspace
from subspan.training.methods.subspace import STORED
from subspan.training.train import train
from tests.runs import WEIGHTS, a_run, record_of

GUIDE = Path(__file__).parents[2] / "docs" / "add-a-method.md"


def options_of(how: Method) -> dict[str, object]:
    """A small point of the method's axis."""
    value = "0.3" if how.adapts else "2" if how.axis == "rank" else "20"
    return how.at(value) if how.axis else {}


@pytest.mark.parametrize("name", sorted(methods()))
def test_laws(name, tmp_path):
    """A method trains the numbers that are counted, stored and found again in the file."""
    how = method(name)
    options = options_of(how)
    rates = how.rates(options)
    assert rates
    assert all(0 < rate < 100 for rate in rates)
    record = train(a_run(name, lr=rates[len(rates) // 2], batch_size=256, **options), tmp_path)
    assert record.status == "complete"
    assert record.weights == WEIGHTS
    # Factors of a layer as small as here are more numbers than the layer.
    assert 0 < record.trainable_parameters <= WEIGHTS * (1.1 if how.adapts else 1)
    if how.axis == "dim":
        assert record.trainable_parameters - record.head_parameters == 20
    file = tmp_path / "model.safetensors"
    numbers = sum(t.numel() for t in checkpoint.read(file)[1].values())
    assert numbers <= record.stored_parameters
    assert record.checkpoint_bytes == file.stat().st_size <= 4 * numbers + 2048
    found = evaluate_checkpoint(file)
    assert found["test_accuracy"] == record.test_score
    assert found["checkpoint_bytes"] == record.checkpoint_bytes


def test_there_is_one_for_every_family():
    assert set(methods()) == {
        "full",
        *projections(),
        *STORED,
        "rbd",
        "fpd",
        "nes",
        "dlrt",
        "dlrt-ratio",
        "prodsum",
        "head",
        "lora",
        "lora-subspace",
        "unilora",
        "vera",
    }
    assert all(how.name == name and how.help for name, how in methods().items())
    assert not any("`" in how.help or ":meth:" in how.help for how in methods().values())


def test_a_family_that_comes_later_is_a_method():
    methods()

    class Late(Hash, family="late"):
        """Hash of another name."""

    try:
        assert method("late").help == "θ₀ + P w: Hash of another name."
        assert "late" in methods()
    finally:
        for known in (FAMILIES, registry._registry, subspace._of_families):
            del known[Late.family]


def test_unknown_method():
    with pytest.raises(SubspanError, match="unknown method 'hsh': did you mean hash"):
        method("hsh")


def test_options_are_the_methods_own(monkeypatch):
    method("hash").check(["dim", "compartments"])
    with pytest.raises(SubspanError, match="unknown option of hash 'dmi': did you mean dim"):
        method("hash").check(["dmi"])
    with pytest.raises(SubspanError, match="unknown option of full 'dim': known are head_lr"):
        method("full").check(["dim"])
    monkeypatch.setattr(method("full"), "options", ())
    with pytest.raises(SubspanError, match="method 'full' has no options, got --dim"):
        method("full").check(["dim"])
    own = {name: {option.name for option in how.options} for name, how in methods().items()}
    assert "s" in own["sparse"] - own["hash"]
    assert {"of", "layout", "qr"} <= own["stored"] - own["hash"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rbd", {"journal": "no"}, "journal must be true or false, got 'no'"),
        ("hash", {"bits": "3"}, "bits must be a number, got '3'"),
        ("hash", {"dim": 5, "train_fully": 2}, "train_fully must be a text or a list .* got 2"),
        ("dlrt", {"tolerance": "0.1"}, "tolerance must be a number, got '0.1'"),
        ("prodsum", {"p": "2", "plateau": 1.5}, "plateau must be an integer, got 1.5"),
        ("hash", {"dim": None}, "dim must be an integer or a text, got None"),
    ],
)
def test_options_have_the_types_that_the_method_declares(name, options, message):
    with pytest.raises(SubspanError, match=f"^{message}"):
        method(name).check(options)


def test_options_of_a_choice(monkeypatch):
    monkeypatch.setattr(method("full"), "options", (Option("how", Literal["a", "b"], ""),))
    method("full").check({"how": "b"})
    with pytest.raises(SubspanError, match=r"^how must be one of a, b, got 'c'"):
        method("full").check({"how": "c"})


def a_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10))


@pytest.mark.parametrize(
    ("options", "dims"),
    [
        ({"dim": 7}, [7]),
        ({"dim": "7"}, [7]),
        ({"dim": "7+5", "compartments": "layer"}, [7, 5]),
        ({"dim": "8", "compartments": "layer", "allocation": "equal"}, [4, 4]),
        ({"compartments": {"0": 7, "2": 5}}, [7, 5]),
    ],
)
def test_dimensions(options, dims):
    model = method("hash").wrap(a_net(), 3, options)
    assert [part.dim for part in model.compartments] == dims
    assert model.recipe["seed"] == 3
    counts = method("hash").counts(model)
    assert counts == {
        "trainable_parameters": sum(dims),
        "stored_parameters": sum(dims),
        "weights": 830,
    }


@pytest.mark.parametrize(
    "dim", [0, -3, "abc", "1.5", 1.5, "", "5+", "5+0", "5+-1", True, None, [5]]
)
def test_what_is_no_dimension(dim):
    with pytest.raises(
        SubspanError, match=r"dim must be a positive integer, or a sum such as 600\+250"
    ):
        method("hash").wrap(a_net(), 0, {"dim": dim})
    with pytest.raises(SubspanError, match="dim must be a positive integer"):
        method("hash").rates({"dim": dim})


def test_a_dimension_is_needed():
    for options in ({}, {"compartments": "layer"}):
        with pytest.raises(
            SubspanError, match="method 'hash' needs --dim, the number of coordinates"
        ):
            method("hash").wrap(a_net(), 0, options)


def test_rates_keep_the_length_of_a_step():
    """The rate is that of √d coordinates moved by lr each."""
    for dim in (1, 100, 10_000):
        lengths = [rate * dim**0.5 for rate in method("hash").rates({"dim": dim})]
        assert lengths == pytest.approx([1, 3, 9], rel=0.05)
        finer = method("hash").rates({"dim": dim, "train_fully": "head"})
        assert [rate * dim**0.5 for rate in finer] == pytest.approx([1, 2, 4], rel=0.05)
    sums = method("hash").rates({"dim": "60+40"})
    assert sums == method("hash").rates({"dim": "100"})
    assert sums == method("hash").rates({"compartments": {"0": 60, "2": 40}})


def test_optimizers(tmp_path):
    net = a_net()
    net[0].requires_grad_(False)
    runs = (a_run("full", lr=0.1, optimizer=name, weight_decay=0.2) for name in ("adam", "sgd"))
    adam, sgd = (
        method("full").optimizer(net, run, tmp_path, {}, steps=1, resume=False) for run in runs
    )
    assert isinstance(adam, torch.optim.Adam)
    assert isinstance(sgd, torch.optim.SGD)
    for optimizer in (adam, sgd):
        (group,) = optimizer.param_groups
        assert (group["lr"], group["weight_decay"]) == (0.1, 0.2)
        assert [p.shape for p in group["params"]] == [(10, 20), (10,)]
    assert sgd.param_groups[0]["momentum"] == 0.9


def test_nothing_to_train(tmp_path):
    net = a_net().requires_grad_(False)
    with pytest.raises(SubspanError, match="method 'full' leaves nothing to train"):
        method("full").optimizer(net, a_run("full"), tmp_path, {}, steps=1, resume=False)


def test_counts_of_all_weights():
    """Frozen and tied ones are stored, too, each once; and buffers."""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    net[0].bias.requires_grad_(False)
    counts = method("full").counts(net)
    weights = 16 + 4 + 4 + 4 + 4
    buffers = 4 + 4 + 1
    assert counts == {
        "trainable_parameters": weights - 4,
        "stored_parameters": weights + buffers,
        "weights": weights,
    }


@pytest.fixture
def last_layers(monkeypatch):
    """The method of the guide, registered as its file in the folder would be."""
    methods()
    monkeypatch.setattr(registry, "_registry", copy.copy(registry._registry))
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, str(GUIDE), "exec"), {"__name__": "subspan.training.methods.last_layer"})
    return "last-layers"


def test_the_guide_to_adding_a_method(last_layers, tmp_path, cli, in_tmp_path):
    """It is there at once: in training, in a sweep, in the help, and its errors are ours."""
    test_laws(last_layers, tmp_path / "laws")
    assert record_of(tmp_path / "laws")["trainable_parameters"] == 8 * 10 + 10
    words = ["train", "--net", "mlp-8", "--method", last_layers, "--epochs", "1", "--out", "run"]
    assert cli(*words, "--layers", 2).code == 0
    assert record_of(Path("run"))["trainable_parameters"] == WEIGHTS
    bad = cli(*words, "--layers", 3, "--overwrite")
    assert bad.code == 2
    assert "layers must be in [1, 2] for this net, got 3" in bad.err
    helped = cli("train", "--method", last_layers, "--help").out
    assert "--layers" in helped
    assert "the last layers only, the others as they were drawn" in helped


@pytest.fixture
def odd(monkeypatch):
    """A method to whose members a test gives what should not be."""
    methods()
    monkeypatch.setattr(registry, "_registry", copy.copy(registry._registry))

    class Odd(Method):
        def wrap(self, net, seed, options):
            return net

        def rates(self, options):
            return (0.01,)

    return Odd("odd", "")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"mine": math.nan}, "what the method odd says of the run: mine must be a finite"),
        ({"mine": torch.ones(())}, "mine must be a number, got tensor"),
        ({"mine": [{"a": [1.0, -math.inf]}]}, r"mine\[0\]\.a\[1\] must be a finite number"),
        ({"epoch": 99}, r"diagnose of the method odd .* got {'epoch': 99}"),
        ({"test_score": 0.5}, "diagnose of the method odd must return values by name, other than"),
        (None, "diagnose of the method odd must return values by name"),
    ],
)
def test_what_a_method_says_of_an_epoch_is_json_and_its_own(said, message, odd, tmp_path):
    odd.diagnose = lambda model, optimizer: said
    with pytest.raises(SubspanError, match=message):
        train(a_run("odd", epochs=1), tmp_path)
    assert record_of(tmp_path)["status"] == "failed"


def test_what_a_method_says_of_an_epoch_stands_in_its_row(odd, tmp_path):
    odd.diagnose = lambda model, optimizer: {"mine": [{"a": (1, 2.5, None, True, "x")}]}
    (row,) = train(a_run("odd", epochs=1), tmp_path).history
    assert row.more == {"mine": [{"a": [1, 2.5, None, True, "x"]}]}
    assert record_of(tmp_path)["history"][0]["mine"] == row.more["mine"]


@pytest.mark.parametrize("command", ["train --method", "sweep --baseline null --methods"])
@pytest.mark.parametrize(
    ("member", "given", "message"),
    [
        ("rates", (), "rates of the method odd are none"),
        ("rates", (0.1, math.nan), "rates of the method odd must be a positive number, got nan"),
        ("rates", None, "rates of the method odd must return a tuple of numbers, got None"),
        ("wrap", None, "wrap of the method odd must return a Module, got None"),
        ("optimizer", None, "optimizer of the method odd must return an Optimizer, got None"),
    ],
)
def test_what_a_method_gives_is_checked_first(
    member, given, message, command, odd, cli, in_tmp_path
):
    setattr(odd, member, lambda *_, **__: given)
    said = cli(*command.split(), "odd", "--net", "mlp-8", "--out", "out")
    assert said.code == 2
    assert message in said.err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("member", "given", "message"),
    [
        ("stages", (), r"stages .* must return a tuple of epochs .* the last is 2, got \(\)"),
        ("stages", (1,), r"the last is 2, got \(1,\)"),
        ("stages", (0, 2), r"epochs that grow, .* got \(0, 2\)"),
        ("stages", 2, "the last is 2, got 2"),
        ("step", None, "step of the method odd must return the loss, .* got None"),
        ("step", torch.ones(3), r"step of the method odd must return .* got tensor\(\[1"),
        ("ready", False, "ready of the method odd must return true for the last epoch, got False"),
        ("after_epoch", 3, "after_epoch of the method odd must return a Module, or None, got 3"),
        ("counts", None, "counts of the method odd must return numbers by name, got None"),
    ],
)
def test_what_a_method_returns_is_checked(member, given, message, odd, tmp_path):
    setattr(odd, member, lambda *_, **__: given)
    with pytest.raises(SubspanError, match=message):
        train(a_run("odd", epochs=2), tmp_path)
