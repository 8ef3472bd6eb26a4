"""Published experiments: what they are told can be run, and what they write is side by side."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import subspan.experiments as module
from subspan.errors import SubspanError
from subspan.experiments import Experiment, Published, experiments, reproduce
from subspan.report import bars, read
from subspan.subspace import init
from subspan.sweeps.result import SweepRecord
from subspan.sweeps.running import Running
from subspan.sweeps.smaller import smaller
from subspan.sweeps.sweep import _points, check, total_runs
from subspan.training.config import Sweep, Training
from subspan.training.nets import weights
from subspan.training.train import prepare
from tests.runs import NET
from tests.training.data.makers import encoded


@pytest.fixture
def tiny(monkeypatch):
    """An experiment of two seconds."""
    monkeypatch.setattr(module, "_registry", {})
    settings = {"methods": ("hash",), "dims": ("5", "30"), "lrs": (0.3,), "baseline_lrs": (0.01,)}
    tiny = Experiment(
        name="tiny",
        title="Digits",
        source="Nobody 2026",
        differences="all of it",
        published={
            "": (
                Published(
                    label="Nobody 2026",
                    dims=(5, 30),
                    accuracy=(0.25, 0.5),
                    baseline=0.75,
                    d_int=17,
                ),
            )
        },
        sweeps={
            "quick": {"": Sweep(Training(net=NET, epochs=1), **settings)},
            "full": {"": Sweep(Training(net=NET, epochs=2), **settings)},
        },
    )
    module.register(tiny)
    return tiny


def test_the_published_ones():
    assert list(experiments()) == [
        "dlrt-cifar-resnet",
        "dlrt-cifar-vgg",
        "dlrt-fc",
        "dlrt-lenet5",
        "dlrt-pruning",
        "dlrt-timing",
        "few-numbers-minilm",
        "golf-cifar10",
        "golf-mnist",
        "gressmann-compartments",
        "gressmann-distributed",
        "gressmann-families",
        "gressmann-table1",
        "gressmann-table1-fashion",
        "li-cifar-lenet",
        "li-mnist-fc",
        "li-mnist-lenet",
        "li-shuffled-labels",
        "minut-cifar-lenet",
        "minut-cifar-mlp",
        "minut-mnist-lenet",
        "minut-mnist-mlp",
        "minut-small-nets",
        "minut-sparse-benchmark",
        "prodsumnet-dct",
        "prodsumnet-lenet",
        "prodsumnet-lenet-conv",
        "prodsumnet-linear",
        "prodsumnet-mlp",
        "prodsumnet-table1",
        "said-minilm",
    ]
    found = experiments()
    table, fashion = found["gressmann-table1"], found["gressmann-table1-fashion"]
    distributed, li = found["gressmann-distributed"], found["li-mnist-lenet"]
    minut, kinds = found["minut-mnist-mlp"], found["minut-sparse-benchmark"]
    assert {part: rows[-1].baseline for part, rows in table.published.items()} == {
        "fc-mnist": 0.9827,
        "fc-cifar10": 0.5209,
        "cnn-mnist": 0.9941,
        "cnn-cifar10": 0.814,
        "cnn-cifar10-fpd": 0.814,
        "fc-mnist-nes": 0.9827,
    }
    assert [(p.method, p.accuracy) for p in table.published["cnn-mnist"]] == [
        ("nes", (0.51,)),
        ("fpd", (0.889,)),
        ("rbd", (0.9717,)),
    ]
    assert [rows[-1].accuracy for rows in fashion.published.values()] == [(0.8565,), (0.8556,)]
    assert [s.processes for s in distributed.parts("quick").values()] == [1, 2, 2, 4, 4]
    assert (li.published[""][0].d_int, li.published[""][0].baseline) == (290, 0.991)
    assert dict(zip(li.published[""][0].dims, li.published[""][0].accuracy, strict=True)) == {
        100: 0.763,
        200: 0.864,
        500: 0.939,
        1000: 0.963,
        5000: 0.983,
    }
    assert dict(zip(minut.published[""][0].dims, minut.published[""][0].accuracy, strict=True)) == {
        850: 0.901,
        1500: 0.925,
        2500: 0.941,
        5000: 0.955,
    }
    assert minut.published[""][0].baseline == 0.976
    fc, cifar = found["li-mnist-fc"].published[""][0], found["li-cifar-lenet"].published[""][0]
    assert (fc.d_int, fc.baseline, fc.accuracy) == (750, 0.981, (0.175, 0.451, 0.593))
    assert dict(zip(cifar.dims, cifar.accuracy, strict=True)) == {
        500: 0.384,
        1000: 0.463,
        2900: 0.534,
        5000: 0.563,
        10_000: 0.598,
    }
    assert (cifar.d_int, cifar.baseline) == (2900, 0.584)
    layers = {
        "minut-mnist-lenet": ({125: 0.855, 250: 0.913, 350: 0.928, 450: 0.952, 700: 0.969}, 0.989),
        "minut-cifar-lenet": (
            {100: 0.308, 750: 0.431, 2000: 0.53, 3500: 0.552, 6000: 0.589},
            0.615,
        ),
        "minut-cifar-mlp": ({150: 0.267, 3000: 0.444, 4750: 0.466}, 0.517),
    }
    for name, (curve, baseline) in layers.items():
        published = found[name].published[""][0]
        assert dict(zip(published.dims, published.accuracy, strict=True)) == curve
        assert published.baseline == baseline
        for budget in ("quick", "full"):
            assert found[name].parts(budget)[""].options == {"compartments": "layer"}
    assert kinds.timed
    assert [e.timed for e in (li, minut)] == [False, False]
    assert {s.dims for budget in kinds.sweeps.values() for s in budget.values()} == {("4000+500",)}
    assert {"stored-dense", "stored-coo", "stored-csr", "stored-csc"} <= set(
        kinds.parts("quick")[""].methods
    )


def test_runs_that_are_timed_run_alone(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(module._registry, "tiny", replace(tiny, timed=True))
    with pytest.raises(SubspanError, match="times its runs: one at a time, not --jobs 2"):
        reproduce("tiny", tmp_path / "out", Running(jobs=2))
    told = []

    def run(parts, out, running, **more):
        told.append(running.jobs)
        return {}

    monkeypatch.setattr(module, "sweep_parts", run)
    reproduce("tiny", tmp_path / "out")
    assert told == [1]


SWEEPS = sorted(name for name, found in experiments().items() if isinstance(found, Experiment))
TEXTS = [name for name in SWEEPS if name.endswith("minilm")]


SLOW = {("dlrt-cifar-vgg", "full"), ("dlrt-fc", "full")}  # many large networks
PARTLY = {("minut-cifar-lenet", "full")}  # takes hours


@pytest.fixture(scope="module")
def few_images(tmp_path_factory):
    """Three images of each class, of the size of every set; all tests decode them once."""
    folder = tmp_path_factory.mktemp("images")
    for part, label, i in product(("train", "test"), range(10), range(3)):
        for data, mode, side in (
            ("mnist", "L", 28),
            ("fashion_mnist", "L", 28),
            ("cifar10", "RGB", 32),
        ):
            place = folder / data / part / str(label)
            place.mkdir(parents=True, exist_ok=True)
            value = 20 * label + i if mode == "L" else (20 * label, i, 0)
            (place / f"{i}.png").write_bytes(encoded(value, mode, size=(side, side)))
    return folder


@pytest.fixture
def no_decompositions(monkeypatch):
    """Bases of unit vectors: whether a network can be factorised does not hang on its values."""

    def qr(a, mode="reduced"):
        assert mode == "reduced"
        k = min(a.shape)
        return torch.return_types.linalg_qr((torch.eye(a.shape[0], k), torch.eye(k, a.shape[1])))

    def svd(a, full_matrices=True):
        assert not full_matrices
        k = min(a.shape)
        return torch.eye(a.shape[0], k), torch.ones(k), torch.eye(k, a.shape[1])

    monkeypatch.setattr(torch.linalg, "qr", qr)
    monkeypatch.setattr(torch.linalg, "svd", svd)


@pytest.fixture
def no_drawing(monkeypatch):
    """Let weights be those that PyTorch draws: the library's own generator takes its time."""
    monkeypatch.setattr(init, "initialize", lambda *_: None)


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (case in SLOW))
        for case in product(sorted({*SWEEPS} - {*TEXTS}), ("quick", "full"))
    ],
)
@pytest.mark.usefixtures("no_decompositions", "no_drawing")
def test_each_can_be_run(name, budget, few_images, monkeypatch):
    """On images of the right size; and it has a point at every published d, with an exception."""
    monkeypatch.setenv("SUBSPAN_DATA", str(few_images))
    monkeypatch.setenv("SUBSPAN_CACHE", str(few_images / "cache"))
    experiment = experiments()[name]
    assert experiment.name == name
    parts = experiment.parts(budget)
    for part, config in parts.items():
        data, _, _ = config.training.data.partition("[:")  # there are few images here
        there = replace(config, training=replace(config.training, data=data))
        check(there)
        for published in experiment.published.get(part, ()):
            if published.labels:
                assert len(published.labels) == len(published.accuracy)
                assert len(published.dims) in (0, len(published.accuracy))
                same = set(config.dims) & set(published.labels)
                assert len(same) == min(len(config.dims), len(published.labels))
            else:
                assert len(published.dims) == len(published.accuracy)
                dims = {sum(map(int, dim.split("+"))) for dim in config.dims}
                assert (set(published.dims) <= dims) == ((name, budget) not in PARTLY)
                assert set(published.dims) & dims
            assert 0 < min(published.accuracy) <= max(published.accuracy)
            above = published.baseline is not None and max(published.accuracy) > published.baseline
            # Li's LeNet on CIFAR-10 did better in a subspace than by all its weights.
            assert above == (name == "li-cifar-lenet")
        # Of the files that a bound is made of, the best one counts.
        one = budget == "quick" or "nes" in part or "bound" in part
        assert config.seeds == (1 if one else 3)
    assert sum(map(total_runs, parts.values())) < 160


@pytest.mark.parametrize("name", TEXTS)
def test_each_on_texts_can_be_run(name, tmp_path, monkeypatch):
    """With another encoder, of which norms and biases are as many numbers as are needed."""
    pytest.importorskip("transformers", reason="texts need Hugging Face's transformers")
    pytest.importorskip("peft", reason="LoRA, VeRA and Uni-LoRA are PEFT's")
    monkeypatch.setenv("SUBSPAN_DATA", str(tmp_path))
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path / "cache"))
    for data, part in product(("mpqa", "subj"), ("train", "test")):
        (tmp_path / data).mkdir(exist_ok=True)
        rows = [
            json.dumps({"text": "good bad"[5 * (i % 2) :][:4], "label": i % 2}) for i in range(24)
        ]
        (tmp_path / data / f"{part}.jsonl").write_text("\n".join(rows))
    encoder = tiny_encoder(tmp_path / "encoder")
    found = experiments()[name]
    for budget in ("quick", "full"):
        for part, config in found.parts(budget).items():
            if budget == "quick" or part in ("mpqa", "mpqa-all-weights"):
                check(replace(config, training=replace(config.training, net=str(encoder))))
            assert config.seeds == (1 if budget == "quick" else 3)
    assert sum(map(total_runs, found.parts("full").values())) < 160


def tiny_encoder(folder):
    """A BERT of 4 layers of width 64 that knows two words, with its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "good", "bad"))}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    tokens.save_pretrained(folder)
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    more = {"intermediate_size": 128, "vocab_size": 4, "max_position_embeddings": 16}
    BertModel(BertConfig(**sizes, **more)).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.parametrize("name", [n for n in SWEEPS if "fashion" not in n and n not in TEXTS])
def test_the_networks_have_the_published_size(name, real_data):
    config = next(iter(experiments()[name].parts("quick").values()))
    point = next(point for point in reversed(_points(config)) if not point.small)
    ready = prepare(point.job(0.1, 0).run)
    published = {
        "dlrt-cifar-resnet": 77_850,
        "dlrt-cifar-vgg": 9_228_362,
        "dlrt-fc": 1_149_010,
        "dlrt-lenet5": 431_080,
        "dlrt-pruning": 431_080,
        "li-cifar-lenet": 62_006,
        "li-mnist-fc": 199_210,
        "li-mnist-lenet": 44_426,
        "li-shuffled-labels": 959_610,
        "minut-cifar-lenet": 62_006,
        "minut-cifar-mlp": 472_610,
        "minut-mnist-lenet": 61_706,
        "minut-small-nets": 159_010,
        "minut-mnist-mlp": 159_010,
        "minut-sparse-benchmark": 472_610,
        "prodsumnet-dct": 6_449_090,
        "prodsumnet-lenet": 3_274_634,
        "prodsumnet-lenet-conv": 3_274_634,
        "prodsumnet-linear": 7_850,
        "prodsumnet-mlp": 1_333_770,
        "prodsumnet-table1": 431_080,
        "gressmann-families": 101_770,
        "gressmann-table1": 101_770,
        "gressmann-distributed": 101_770,
        "gressmann-compartments": 93_322,
    }
    assert ready.method.counts(ready.model)["weights"] == published[name]


def test_published_and_measured_side_by_side(tiny, tmp_path):
    out = tmp_path / "tiny"
    [result] = reproduce("tiny", out, Running(jobs=1)).values()
    assert SweepRecord.read(out) == result
    again = result
    result = json.loads((out / "sweep.json").read_text())
    assert result["experiment"] == {
        "name": "tiny",
        "budget": "quick",
        "title": "Digits",
        "source": "Nobody 2026",
        "differences": "all of it",
        "part": "",
    }
    assert result["published"] == [
        {
            "label": "Nobody 2026",
            "dims": [5, 30],
            "accuracy": [0.25, 0.5],
            "baseline": 0.75,
            "d_int": 17,
            "method": None,
            "labels": [],
        }
    ]
    assert [row["dim"] for row in result["rows"]] == [5, 30]
    assert set(os.listdir(out)) == {"sweep.json", "runs", "curve.png", "curve.svg", "report.html"}
    page = (out / "report.html").read_text()
    assert "Published and measured side by side: Nobody 2026" in page
    measured = 100 * result["rows"][1]["test_score"][0]
    assert f"{measured:.1f} ({measured - 50:+.1f})" in page
    # Again: nothing is repeated, and another budget is another configuration.
    runs = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")}
    assert reproduce("tiny", out, Running(jobs=1)) == {"": again}
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")} == runs
    with pytest.raises(SubspanError, match=r"belongs to another configuration \(epochs 1 → 2\)"):
        reproduce("tiny", out, Running(jobs=1), budget="full")


def test_several_parts(tiny, in_tmp_path, cli, monkeypatch):
    settings = tiny.parts("quick")[""]
    parts = {"one": settings, "two": replace(settings, baseline=None, dims=("7",))}
    other = Published(label="Else 2026", dims=(7,), accuracy=(0.4,), baseline=0.9)
    published = {"one": tiny.published[""] * 2, "two": (other,)}
    several = replace(tiny, sweeps={"quick": parts}, published=published)
    monkeypatch.setitem(module._registry, "tiny", several)
    said = cli("reproduce", "tiny", "--jobs", 1, "--out", "out")
    assert (said.code, said.err) == (0, "")
    for words in ("\none\n", "\ntwo\n", "picture: out/two/curve.png", "out/summary.png"):
        assert words in said.out
    assert Path("out/summary.png").read_bytes().startswith(b"\x89PNG")
    assert cli("reproduce", "tiny", "--only", "two", "--jobs", 1, "--out", "some").code == 0
    assert {path.name for path in Path("some").iterdir()} == {"two"}
    with pytest.raises(
        SubspanError, match=r"unknown part of tiny \(quick\) 'tow': did you mean two"
    ):
        reproduce("tiny", Path("some"), only=["tow"])
    results = {part: json.loads(Path(f"out/{part}/sweep.json").read_text()) for part in parts}
    assert [row["dim"] for row in results["two"]["rows"]] == [7]
    found = {part: read(Path("out") / part) for part in parts}
    [axes] = bars.summary(found, "All of it").axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["one: full", "one: hash, d = 5", "one: hash, d = 30", "two: hash, d = 7"]
    diamonds = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D"]
    assert diamonds == pytest.approx([75, 25, 50, 40])
    colours = {text.get_text(): text.get_color() for text in axes.texts}
    assert {text for text, colour in colours.items() if colour != "black"} == {
        *("75", "25", "50", "40")  # nobody takes what was published for what was measured
    }
    [row] = found["two"].rows
    found["two"] = replace(found["two"], rows=[replace(row, dim=1234)])
    labels = bars.summary(found, "All of it").axes[0].get_yticklabels()
    assert labels[-1].get_text() == "two: hash, 1,234 numbers"
    found["two"] = replace(found["two"], rows=[replace(row, bytes_sent_per_step=[900.0, 1100.0])])
    _, sent = bars.summary(found, "All of it").axes
    assert [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in sent.patches] == [
        (3, 1000)
    ]
    with pytest.raises(SubspanError, match="budget must be quick, got 'full'"):
        reproduce("tiny", Path("out"), budget="full")


def test_on_other_data(tiny, cli, in_tmp_path, monkeypatch):
    """The same command, with nothing published beside it."""
    rng = np.random.default_rng(0)
    for part, label in product(("train", "test"), range(3)):
        folder = Path("mine") / part / str(label)
        folder.mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    said = cli("reproduce", "tiny", "--data", "mine", "--jobs", 1)
    assert (said.code, said.err) == (0, "")
    [made] = Path("runs").iterdir()
    assert made.name == "tiny-mine-quick"
    record = json.loads((made / "sweep.json").read_text())
    assert record["published"] == []
    assert record["experiment"]["title"] == "Digits; here with mine"
    assert record["config"]["data"] == "mine"
    said = cli("reproduce", "dlrt-timing", "--data", "mine")
    assert said.code == 2
    assert "dlrt-timing is a benchmark, it has no data to replace by 'mine'" in said.err


def test_what_is_unknown(tmp_path):
    with pytest.raises(
        SubspanError,
        match="unknown experiment 'li-mnist': did you mean li-mnist-fc or ",
    ):
        reproduce("li-mnist", tmp_path / "out")
    with pytest.raises(SubspanError, match="budget must be quick or full, got 'slow'"):
        reproduce("li-mnist-lenet", tmp_path / "out", budget="slow")
    with pytest.raises(SubspanError, match=r"^running must be a Running, got {'jobs': 1}"):
        reproduce("li-mnist-lenet", tmp_path / "out", {"jobs": 1})
    with pytest.raises(SubspanError, match=r"^which must be an Experiment or a Benchmark, got 3"):
        reproduce(3, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_by_command(tiny, in_tmp_path, cli):
    said = cli("reproduce", "tiny", "--jobs", 1)
    assert (said.code, said.err) == (0, "")
    assert "picture: runs/tiny-quick/curve.png\nreport: runs/tiny-quick/report.html\n" in said.out
    assert cli("reproduce", "tiny", "--jobs", 1).code == 0
    for words in ([], ["--list"]):
        said = cli("reproduce", *words)
        assert said.code == 0
        assert "tiny\n    Digits\n    Nobody 2026\n" in said.out
        assert "li-mnist-lenet\n" in said.out


def test_small_networks_are_those_of_the_generator():
    """At the sizes that the parts name; and the perceptrons of 10 units, which were published."""
    shapes = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
    for part, sweep in experiments()["minut-small-nets"].parts("full").items():
        shape = shapes[sweep.training.data]
        sizes = [weights(name, shape, 10) for name in sweep.small]
        assert sizes == sorted(sizes), part
        for name, size in zip(sweep.small, sizes, strict=True):
            found = smaller(sweep.training.net, [size], shape)
            same = [other for other in found if other == name]
            assert same == [name] or "mlp" in name, (name, found)


def test_all(tiny, in_tmp_path, cli, monkeypatch):
    """One folder and one page; what cannot be run is said, and does not stop the others."""
    lost = replace(
        tiny,
        name="lost",
        sweeps={"quick": {"": Sweep(Training(net=NET, data="./nowhere"), dims=("5",))}},
    )
    monkeypatch.setattr(module, "_published", dict)
    for found in (replace(tiny, name="z"), lost):
        module.register(found)
    said = cli("reproduce", "all", "--jobs", 1)
    assert (said.code, said.err) == (0, "")
    missing = "lost could not be run: there is no data folder ./nowhere"
    assert missing in said.out
    assert "page of all: runs/all-quick/index.html" in said.out
    page = Path("runs/all-quick/index.html").read_text()
    assert missing in page
    assert page.count("Nobody 2026") >= 2
    again = cli("reproduce", "all", "--jobs", 1)
    assert again.code == 0
    assert Path("runs/all-quick/index.html").read_text() == page
    # Nor does a record that was edited.
    spoilt = Path("runs/all-quick/tiny/sweep.json")
    spoilt.write_text("{}")
    said = cli("reproduce", "all", "--jobs", 1)
    assert (said.code, said.err) == (0, "")
    assert "tiny could not be run: runs/all-quick/tiny/sweep.json is damaged" in said.out
    page = Path("runs/all-quick/index.html").read_text()
    assert page.count("Nobody 2026") >= 1
    assert "tiny/sweep.json is damaged" in page
    assert spoilt.read_text() == "{}"
    said = cli("reproduce", "all", "--data", "mnist")
    assert said.code == 2
    assert "all experiments have data of their own: leave --data out" in said.err
    said = cli("reproduce", "all", "--jobs", 0)  # of all alike: it is said once
    assert (said.code, said.out) == (2, "")
    assert "jobs must be at least 1, or -1 for one per core, got 0" in said.err
    del module._registry["z"], module._registry["tiny"]
    said = cli("reproduce", "all", "--jobs", 1, "--out", "none")
    assert said.code == 2
    assert "no experiment could be run: see above" in said.err
