"""Fine-tuning: the head apart and at a rate of its own, PEFT's adapters, and what files hold."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections import OrderedDict
from typing import get_type_hints

import pytest
import safetensors.torch
import torch
from torch import nn

from subspan import checkpoint
from subspan.commands.parsing import read
from subspan.counts import count
from subspan.errors import SubspanError
from subspan.sweeps.running import Running
from subspan.sweeps.sweep import sweep
from subspan.training.config import Run, Sweep, Training
from subspan.training.evaluate import evaluate_checkpoint, rebuild
from subspan.training.export import export
from subspan.training.methods import HEAD_LR, method
from subspan.training.prepare import complete_options
from subspan.training.schedule import schedule
from subspan.training.train import train
from tests.runs import a_run, train_up_to
from tests.training.words import HEAD, bert

pytest.importorskip("transformers", reason="a tiny BERT needs Hugging Face's transformers")
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="PEFT's methods need peft"
)
TASK = "tests.training.words:words"


def a_fine_tuning(name: str, *, lr: float = 0.01, seed: int = 0, steps: int = 5, **options):
    training = Training(task=TASK, batch_size=32, steps=steps)
    return Run(training, name, options, lr, seed)


def wrapped(name: str, seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(1)
    return method(name).wrap(bert(), seed, options)


NUMBERS = {  # by hand: queries and values of 2 layers, 16 x 16
    "lora": ({"rank": 3}, 2 * 2 * 3 * (16 + 16)),
    "unilora": ({"dim": 50}, 50),
    "vera": ({"rank": 5}, 2 * 2 * (5 + 16)),
    "head": ({}, 0),
}


@needs_peft
@pytest.mark.parametrize("name", NUMBERS)
def test_counts(name):
    """A file stores what is trained; weights are those of the network without adapters."""
    options, own = NUMBERS[name]
    model = wrapped(name, **options)
    found = method(name).counts(model)
    assert found == {
        "trainable_parameters": own + HEAD,
        "stored_parameters": own + HEAD,
        "weights": count(bert()).dense,
    }
    assert sum(p.numel() for p in method(name).head(model, options)) == HEAD
    _, tensors = checkpoint.contents(model)
    assert sum(t.numel() for t in tensors.values()) == own + HEAD


@needs_peft
def test_layers_by_name():
    """They are those that are named, and never the head."""
    model = wrapped("lora", rank=1, layers="all-linear")
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "_A" in name}
    assert len(adapted) == 2 * 6 + 1  # with the pooler
    assert not any("classifier" in name for name in adapted)
    only = wrapped("lora", rank=1, layers=["intermediate.dense"])
    assert method("lora").counts(only)["trainable_parameters"] == 2 * (16 + 32) + HEAD
    with pytest.raises(SubspanError, match="no linear layer beside the head can get factors"):
        wrapped("lora", rank=1, layers="classifier")


@needs_peft
@pytest.mark.parametrize("name", ["lora", "unilora", "vera"])
def test_a_name_at_the_end_of_another(name):
    """PEFT would put factors into the head, too, whose name ends as that of the other layer."""
    head = nn.Sequential(OrderedDict(fc=nn.Linear(8, 8)))
    net = nn.Sequential(OrderedDict(fc=nn.Linear(8, 8), head=head))
    model = method(name).wrap(net, 0, NUMBERS[name][0] | {"train_fully": "head.fc"})
    assert type(model.head.fc) is nn.Linear
    assert type(model.fc) is not nn.Linear


@needs_peft
@pytest.mark.parametrize("name", ["lora", "unilora", "vera"])
def test_adapters_come_from_the_seed(name):
    """Nothing else draws them, and they leave PyTorch's generator as it was."""
    options, _ = NUMBERS[name]
    before = torch.get_rng_state()
    torch.manual_seed(5)
    one = method(name).wrap(bert(), 3, options)
    assert torch.equal(torch.get_rng_state(), _state_after_a_bert(5))
    torch.manual_seed(5)
    bert()  # PyTorch's generator stands elsewhere now
    other = wrapped(name, 3, **options)
    another = wrapped(name, 4, **options)
    drawn, again, others = (dict(m.state_dict()) for m in (one, other, another))
    own = [k for k in drawn if "lora_A" in k or "theta_d" in k or "vera_A" in k]
    assert own
    assert all(torch.equal(drawn[k], again[k]) for k in own)
    assert not any(torch.equal(drawn[k], others[k]) for k in own)
    torch.set_rng_state(before)


def _state_after_a_bert(seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    bert()
    return torch.get_rng_state()


@needs_peft
@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("lora", {"rank": 0}, "rank must be a positive integer, got 0"),
        ("lora", {}, "method 'lora' needs --rank"),
        ("unilora", {"dim": "5+3"}, "dim must be a positive integer, got '5[+]3'"),
        ("lora", {"rank": 1, "train_fully": "clasifier"}, "did you mean"),
    ],
)
def test_bad_options(name, options, sentence):
    with pytest.raises(SubspanError, match=sentence):
        wrapped(name, **options)


def test_peft_is_not_there(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "peft" else find(n))
    with pytest.raises(SubspanError, match=r"method 'lora' is PEFT's: pip install 'subspan\[peft"):
        wrapped("lora", rank=1)


RATES = [
    ("hash", {"dim": 20, "train_fully": "classifier"}, [0.5, HEAD_LR]),
    ("hash", {"dim": 20, "train_fully": "classifier", "head_lr": 0.2}, [0.5, 0.2]),
    ("hash", {"dim": 20}, [0.5]),
    ("full", {}, [0.5]),
    ("full", {"head_lr": 0.2}, [0.5, 0.2]),
    ("head", {}, [0.5]),
]


@pytest.mark.parametrize(("name", "options", "rates"), RATES)
def test_the_head_has_a_rate_of_its_own(name, options, rates, tmp_path):
    run, how = a_run(name, lr=0.5, **options), method(name)
    model = wrapped(name, **options)
    optimizer = how.optimizer(model, run, tmp_path, {}, steps=8, resume=None)
    assert [group["lr"] for group in optimizer.param_groups] == rates
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained
    if len(rates) == 2:
        assert sum(p.numel() for p in optimizer.param_groups[1]["params"]) == HEAD
    scheduler, seen = schedule(optimizer, "onecycle", 8), []
    for _ in range(8):
        seen.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    assert [max(lrs) for lrs in zip(*seen, strict=True)] == pytest.approx(rates, rel=0.05)


def test_a_rate_of_the_head_that_is_none(tmp_path):
    run = a_run("full", head_lr=0.0)
    with pytest.raises(SubspanError, match=r"head_lr must be a positive number, got 0\.0"):
        method("full").optimizer(wrapped("full"), run, tmp_path, {}, steps=1, resume=None)


def test_the_head_of_texts_is_trained_fully_by_default():
    """Unless the options say otherwise; networks for images have none that is new."""
    texts = Training(task="text", net="minilm", data="mpqa")
    assert complete_options({"dim": 5}, method("hash"), texts) == {"train_fully": "head", "dim": 5}
    assert complete_options({"train_fully": []}, method("hash"), texts) == {"train_fully": []}
    assert complete_options({}, method("rbd"), texts) == {}
    assert complete_options({}, method("hash"), Training()) == {}


@needs_peft
def test_a_run_is_found_again(tmp_path):
    """The file holds what is trained; the score comes back, and another base is refused."""
    record = train(a_fine_tuning("lora", rank=1), tmp_path)
    assert record.head_parameters == HEAD
    assert record.trainable_parameters == 2 * 2 * (16 + 16) + HEAD
    file = tmp_path / "model.safetensors"
    header = checkpoint.inspect(file)
    assert header["kind"] == "part"
    assert header["extra"]["options"] == {"rank": 1}
    assert evaluate_checkpoint(file)["test_accuracy"] == record.test_score
    model, _ = rebuild(file)
    with pytest.raises(SubspanError, match="holds only what was trained of a network"):
        checkpoint.load(file, bert())
    other = method("lora").wrap(bert(), 0, {"rank": 1})  # of other initial weights
    with pytest.raises(SubspanError, match="a network with other weights or adapters"):
        checkpoint.load(file, other)
    twin = copy.deepcopy(model)
    checkpoint.restore(twin, checkpoint.read(file)[1])
    assert all(
        torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True)
    )


@needs_peft
@pytest.mark.parametrize("name", NUMBERS)
def test_an_export_is_the_ordinary_network(name, tmp_path):
    train(a_fine_tuning(name, lr=0.1, **NUMBERS[name][0]), tmp_path)
    model, _ = rebuild(tmp_path / "model.safetensors")
    export(tmp_path / "model.safetensors", tmp_path / "plain.safetensors")
    plain, sentences = bert().eval(), torch.randint(1, 20, (3, 8))
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / "plain.safetensors"))
    with torch.no_grad():
        logits, found = (net.eval()(input_ids=sentences).logits for net in (model, plain))
    torch.testing.assert_close(found, logits)


@needs_peft
def test_a_run_goes_on(tmp_path):
    """It ends with the same bits, with both rates where they were."""
    run = a_fine_tuning("unilora", dim=50, steps=9)
    whole = train(run, tmp_path / "whole")
    train_up_to(8, run, tmp_path / "again")
    again = train(run, tmp_path / "again")
    assert again.test_score == whole.test_score
    assert [row.val_loss for row in again.history] == [row.val_loss for row in whole.history]
    assert len(whole.history) == 2  # of 6 and of 3 steps
    one, other = (
        checkpoint.read(tmp_path / f / "model.safetensors")[1] for f in ("whole", "again")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_dims_of_each_method_on_the_command_line():
    """They are lists in any of their forms, as lrs are."""
    hint = get_type_hints(Sweep)["dims"]
    assert read("dims", hint, {"hash": "300,1000", "lora": 1}) == {
        "hash": ("300", "1000"),
        "lora": ("1",),
    }
    assert read("dims", hint, "300,600+250") == ("300", "600+250")
    lrs = get_type_hints(Sweep)["lrs"]
    assert read("lrs", lrs, {"rbd": [1, 2], "fpd": 4}) == {"rbd": (1.0, 2.0), "fpd": (4.0,)}
    with pytest.raises(SubspanError, match="lrs of rbd must be numbers"):
        read("lrs", lrs, {"rbd": "x"})


@needs_peft
def test_a_sweep_compares_at_equal_counts(tmp_path):
    """Methods have numbers of their own; the head alone has none, and all is counted apart."""
    config = Sweep(
        Training(task=TASK, batch_size=64, steps=2),
        ("head", "hash", "lora"),
        dims={"hash": ("20", "40"), "lora": ("1",)},
        lrs={"head": (0.01, 0.001), "lora": (0.01,)},
        options={"train_fully": "classifier", "head_lr": 0.01},
    )
    found = sweep(config, tmp_path, Running(jobs=1))
    assert not found.failed
    assert {(row.method, row.label): row.dim for row in found.rows} == {
        ("head", "head"): 0,
        ("hash", "20"): 20,
        ("hash", "40"): 40,
        ("lora", "1"): 128,
    }
    assert {row.head_parameters for row in found.points} == {HEAD}
    assert found.rows[0].tried_lrs.keys() == {"0.01", "0.001"}
    assert found.d_int.keys() == {"hash", "lora"}
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert content["config"]["dims"] == {"hash": ["20", "40"], "lora": ["1"]}

    from subspan import report

    report.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "every method trains as they are" in page
    assert (tmp_path / "curve.png").is_file()
