"""Experiments as files: the merging rule, the page about it, what travels, and bad input."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from subspan.bench.parts import sums
from subspan.errors import SubspanError
from subspan.experiments import Benchmark, Experiment, experiment, experiments
from subspan.experiments.load import load
from subspan.training.config import Sweep, Training
from subspan.training.records import differences, plain
from subspan.training.schema import to_json
from tests.runs import contents, sweep_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/add-an-experiment.md"
TINY = """\
title: Digits
source: Nobody 2026
sweep:
  net: mlp-8
  epochs: 1
  dims: 5
  lrs: 0.3
  baseline: null
"""


def written(text: str, name: str = "mine.yaml") -> str:
    """Write an experiment into the current folder."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def read(text: str) -> Experiment:
    found = experiment(written(text))
    assert isinstance(found, Experiment)
    return found


# ---- those of the package ------------------------------------------------------------------------


def records() -> list[Path]:
    """Committed records of the package's experiments."""
    files = [*ROOT.glob("results/*/sweep.json"), *ROOT.glob("results/*/*/sweep.json")]
    return sorted(file for file in files if "experiment" in json.loads(file.read_text()))


@pytest.mark.parametrize("file", records(), ids=lambda file: file.parent.name)
def test_each_is_what_its_committed_record_says(file):
    record = json.loads(file.read_text())
    told = {"part": ""} | record["experiment"]  # which early records do not name
    found = experiments()[told["name"]]
    sweep = found.parts(told["budget"])[told["part"]]
    config = record["config"]
    if told["name"].startswith("gressmann-"):  # then the default
        config["options"] = {"distribution": "rademacher"} | config["options"]
    assert differences(config, sweep.as_dict()) == {}
    usual = {"method": None, "labels": []}  # likewise
    ours = [to_json(curve) for curve in found.published.get(told["part"], ())]
    assert [usual | curve for curve in record["published"]] == ours
    assert found.title == told["title"]


def test_there_are_many_records():
    assert len(records()) > 50


def test_the_benchmark_is_what_its_committed_record_says():
    config = json.loads((ROOT / "results/dlrt-timing/bench.json").read_text())["config"]
    found = experiments()["dlrt-timing"]
    assert isinstance(found, Benchmark)
    ours = plain(asdict(found.bench("full")))
    assert {key: ours[key] for key in config} == config


def test_the_benchmark_of_sums_has_the_factors_of_the_experiment():
    whole = experiments()["prodsumnet-lenet"].parts("full")[""].options
    layers = experiments()["prodsumnet-lenet-conv"].parts("full")[""].options
    assert whole == {"factors": sums.CONVOLUTIONS | sums.DENSE, "bias": sums.BIAS}
    assert layers == {"factors": sums.CONVOLUTIONS, "bias": sums.BIAS}


# ---- the rule ------------------------------------------------------------------------------------


def test_what_is_special_replaces_what_is_general(in_tmp_path):
    found = read(
        TINY
        + """\
  methods: [hash, rbd]
  distribution: rademacher
  compartments: {a: 1}
  validation: 1e-1
  mixed_precision: no
parts:
  one: {}
  two: {epochs: 2, lrs: {hash: 1, rbd: [2, 3]}, compartments: {b: 2}}
  three: {epochs: 3, distribution: null, lrs: null}
budgets:
  quick: {epochs: 4, only: [two, three], parts: {three: {epochs: 5, dims: "7, 8+9"}}}
"""
    )
    training = Training(net="mlp-8", epochs=1, validation=0.1)
    general = Sweep(
        training,
        methods=("hash", "rbd"),
        dims=("5",),
        lrs=(0.3,),
        options={"distribution": "rademacher", "compartments": {"a": 1}},
        baseline=None,
    )
    two = replace(
        general,
        lrs={"hash": (1.0,), "rbd": (2.0, 3.0)},
        options={"distribution": "rademacher", "compartments": {"b": 2}},
    )
    three = replace(general, lrs=(), options={"compartments": {"a": 1}})

    def of(sweep: Sweep, epochs: int) -> Sweep:
        return replace(sweep, training=replace(training, epochs=epochs))

    # A budget that is not named is the sweep as it stands.
    assert found.parts("full") == {"one": general, "two": of(two, 2), "three": of(three, 3)}
    assert found.parts("quick") == {
        "two": of(two, 4),
        "three": replace(of(three, 5), dims=("7", "8+9")),
    }


def test_a_curve_without_a_part_is_of_all_of_them(in_tmp_path):
    curve = "published:\n  - {label: A, dims: 5, accuracy: 0.5}\n"
    found = read(TINY + curve + "parts:\n  one: {}\n  two: {epochs: 2}\n")
    assert found.published["one"] == found.published["two"]
    assert found.published["one"][0].dims == (5,)
    assert found.differences == ""


# ---- the page ------------------------------------------------------------------------------------


def test_the_guide_to_adding_an_experiment(in_tmp_path, cli):
    """Its example runs, and its tables name every key and every mistake that it shows."""
    page = PAGE.read_text("utf-8")
    text, *_ = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    written(text, "papers/digits.yaml")
    quick = experiment("papers/digits.yaml").parts("quick")
    full = experiment("papers/digits.yaml").parts("full")
    assert {part: sweep.training.epochs for part, sweep in quick.items()} == {"small": 1}
    assert {part: sweep.training.epochs for part, sweep in full.items()} == {
        "small": 20,
        "large": 40,
    }
    said = cli("reproduce", "papers/digits.yaml", "--jobs", 1)
    assert (said.code, said.err) == (0, "")
    assert "report: runs/digits-quick/small/report.html" in said.out
    result = sweep_of(Path("runs/digits-quick/small"))
    assert result["experiment"]["file"] == "papers/digits.yaml"
    assert [curve["label"] for curve in result["published"]] == ["Nobody 2026"]
    # The same command repeats nothing; a file that was changed is another configuration.
    before = contents(Path("runs/digits-quick/small/runs"))
    assert cli("reproduce", "papers/digits.yaml", "--jobs", 1).code == 0
    assert contents(Path("runs/digits-quick/small/runs")) == before
    written(text.replace("{epochs: 1,", "{epochs: 2,"), "papers/digits.yaml")
    said = cli("reproduce", "papers/digits.yaml", "--jobs", 1)
    assert (said.code, "another configuration (epochs 1 → 2)" in said.err) == (2, True)


# ---- what travels --------------------------------------------------------------------------------


def test_data_and_modules_lie_beside_the_file(in_tmp_path, cli):
    rng = np.random.default_rng(0)
    for part, label, i in np.ndindex(2, 3, 8):
        folder = Path("papers/images") / ("train", "test")[part] / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    net = "from torch import nn\ndef wide(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n"
    written(net, "papers/netbeside.py")
    text = TINY.replace("mlp-8", "netbeside:wide\n  data: ./images")
    said = cli("reproduce", written(text, "papers/mine.yaml"), "--jobs", 1)
    assert (said.code, said.err) == (0, "")
    assert sweep_of(Path("runs/mine-quick"))["config"]["data"] == "./papers/images"
    said = cli("reproduce", "papers/mine.yaml", "--jobs", 1, "--data", "papers/images")
    assert (said.code, said.err) == (0, "")
    assert sweep_of(Path("runs/mine-images-quick"))["published"] == []


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs: 1", "epoch: 1", "line 5: unknown key of a sweep 'epoch': did you mean epochs"),
        ("epochs: 1", "epochs: many", "line 5: epochs must be an integer, got 'many'"),
        ("epochs: 1", "epochs: 0", "line 5: epochs must be at least 1, got 0"),
        ("epochs: 1", "epochs: true", "line 5: epochs must be an integer, got True"),
        ("epochs: 1", "weight_decay: true", "weight_decay must be a number, got True"),
        ("dims: 5", "dims: {a: 5}", "line 6: unknown method of dims 'a': known are hash"),
        ("dims: 5", "dims: five", "line 3: dim must be a positive integer"),
        ("lrs: 0.3", "lrs: 0.3 0.4", "line 7: lrs[0] must be a number, got '0.3 0.4'"),
        ("lrs: 0.3", "lrs: [0.3, -1]", "line 7: lrs must be a positive number, got -1.0"),
        ("dims: 5", "distribution: hash", "line 6: unknown key of a sweep 'distribution'"),
        ("dims: 5", "tolerance: 0.1", "line 6: unknown key of a sweep 'tolerance'"),
        ("dims: 5", "methods: hsah", "line 6: unknown method 'hsah': did you mean hash"),
        ("dims: 5", "schedule: cosin", "line 6: schedule must be one of onecycle, cosine"),
        ("net: mlp-8", "net: lenett", "line 4: unknown net 'lenett': did you mean lenet"),
        ("net: mlp-8", "net: absent:f", "line 3: net 'absent:f': there is no module 'absent'"),
        ("net: mlp-8", "data: ./nowhere", "line 3: there is no data folder ./nowhere"),
        ("sweep:", "sweeps:", "line 3: unknown key of an experiment 'sweeps': did you mean sweep"),
        (
            "source: Nobody 2026",
            "sourc: A",
            "line 2: unknown key of an experiment 'sourc': did you",
        ),
        ("source: Nobody 2026\n", "", "line 1: an experiment needs a source"),
        (TINY.partition("sweep:")[2], "\n", "line 3: a sweep is empty: say what to train"),
        (TINY.partition("sweep:")[2], " {}\n", "line 3: a sweep is empty: say what to train"),
        ("title: Digits", "title: [a]", "line 1: title must be a text, got ['a']"),
        ("title: Digits", "title: Digits\ntitle: A", "has the key 'title' twice, in lines 1 and 2"),
        ("title: Digits", "title: a: b", "is no YAML (line 1, column 9"),
        ("title: Digits", "title: !x a", "line 1: could not determine a constructor"),
        ("END", "budgets: {quik: {}}", "line 9: unknown budget 'quik': did you mean quick"),
        ("END", "budgets: {quick: 3}", "line 9: quick must be a mapping of names to values, got 3"),
        ("END", "budgets: {quick: {epochs: x}}", "line 9: epochs must be an integer, got 'x'"),
        ("END", "budgets: {quick: {only: a}}", "line 9: unknown part 'a'"),
        ("END", "budgets: {quick: {only: []}}", "line 9: only names no part"),
        ("END", "parts: {a: {}, b: {}}\nbudgets: {quick: {only: a}, full: {only: a}}", "part b"),
        ("END", "parts:\n  ../a: {}", "line 10: a part is the name of a folder, got '../a'"),
        ("END", "parts:\n  a: {}\n  b: {net: no}", "line 11: unknown net 'no'"),
        ("END", "parts: {a: {}}\nbudgets: {full: {parts: {b: {}}}}", "line 10: unknown part 'b'"),
        ("END", "published: 3", "line 9: published must be a list of curves"),
        ("END", "published: [{label: A, dims: [1, 2], accuracy: 0.3}]", "line 9: dims has 2 entri"),
        ("END", "published: [{label: A, dims: 1, accuracy: 90}]", "line 9: an accuracy is a fract"),
        (
            "END",
            "published: [{label: A, dims: 1, accuracy: 0.3, d_int: .inf}]",
            "line 9: d_int must be a finite number, got inf",
        ),
        (
            "END",
            "published: [{label: A, dims: 1, accuracy: 0.3, d_int: -5}]",
            "line 9: d_int must be a positive number, got -5",
        ),
        (
            "END",
            "published: [{label: A, dims: 1, accuracy: 0.3, method: hsh}]",
            "line 9: unknown method 'hsh': did you mean hash?",
        ),
        ("END", "published: [{label: A, dims: 1}]", "line 9: a published curve needs accuracy"),
        ("END", "bench: {}", "line 3: unknown key of an experiment with a bench 'sweep'"),
    ],
)
def test_what_is_wrong_is_said_by_line_and_nothing_is_written(old, new, message, in_tmp_path, cli):
    text = TINY + new + "\n" if old == "END" else TINY.replace(old, new)
    assert text != TINY
    written(text)
    before = contents(in_tmp_path)
    said = cli("reproduce", "mine.yaml", "--jobs", 1)
    assert (said.code, said.out) == (2, "")
    assert "mine.yaml" in said.err
    assert message in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert contents(in_tmp_path) == before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.yaml", None, "there is no file absent.yaml"),
        ("./absent", None, "there is no file ./absent"),
        ("empty.yaml", "", "empty.yaml, line 1: the file must be a mapping"),
        ("list.yaml", "- a\n", "list.yaml, line 1: the file must be a mapping"),
        ("li-mnist-fc.yaml", TINY, "has the name of another experiment, 'li-mnist-fc': rename"),
        ("all.yaml", TINY, "has the name of another experiment, 'all': rename"),
        ("b.yaml", "bench: {width: 0}\ntitle: a\nsource: b\n", "b.yaml, line 1: "),
        (
            "b.yaml",
            "bench: {ranks: a}\ntitle: a\nsource: b\n",
            "line 1: ranks[0] must be an integer",
        ),
    ],
)
def test_files_that_are_none(name, text, message, in_tmp_path, cli):
    if text is not None:
        written(text, name)
    before = contents(in_tmp_path)
    said = cli("reproduce", name)
    assert (said.code, said.out) == (2, "")
    assert message in said.err
    assert contents(in_tmp_path) == before


def test_a_text_that_is_not_utf8(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"title: a\nsource: \xff\n")
    with pytest.raises(SubspanError, match="not UTF-8 in line 2"):
        load(tmp_path / "mine.yaml")
