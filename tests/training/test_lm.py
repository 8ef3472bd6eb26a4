"""The task ``lm``: blocks of text, perplexity, and decoders by folder."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from subspan.training import tasks
from subspan.training.config import Run, Training
from subspan.training.evaluate import evaluate_checkpoint
from subspan.training.train import train
from tests.runs import contents, record_of
from tests.training.bases import bert, gpt2

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers has many of its own

TEXT = "the film was good and the plot was bad " * 120  # 1080 words


@pytest.fixture(scope="module")
def made(tmp_path_factory, cache_once):
    """A folder with a decoder, another of which there is only a configuration, and a text."""
    folder = tmp_path_factory.mktemp("lm")
    gpt2(folder / "gpt2")
    gpt2(folder / "bare", weights=False)
    bert(folder / "bert")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def here(made, in_tmp_path):
    """The same, copied into the current folder."""
    shutil.copytree(made, in_tmp_path, dirs_exist_ok=True)
    return in_tmp_path


WORDS = ("--task", "lm", "--net", "./gpt2", "--data", "text.txt", "--batch-size", 8)


def loaded(folder, net="gpt2", data="text.txt", **options):
    named = {"net": f"{folder}/{net}", "data": f"{folder}/{data}", "task": "lm"}
    return tasks.load(Training(**named, task_options=options), 0)


def test_by_command(here, cli):
    said = cli(
        "train", *WORDS, "--block", 9, "--method", "full", "--lr", 0.02, "--epochs", 4, "--out", "r"
    )
    assert (said.code, said.err) == (0, "")
    record = record_of(here / "r")
    # Of a text whose every word but two follows from those before it.
    assert 1 <= record["test_score"] < 1.5
    assert record["config"]["block"] == 9
    assert record["score"]["name"] == "perplexity"
    assert record["score"]["zero"] == 14
    assert "no test part: the last sixth of the text serves as it" in record["notes"]
    said = cli("eval", "r/model.safetensors")
    assert f"test_perplexity: {record['test_score']}\n" in said.out
    assert "tokens: 180\n" in said.out


def test_no_method_trains_the_output_layer_unasked(here, cli):
    """vLLM takes no LoRA with another output layer; and methods are compared at equal counts."""
    words = (*WORDS, "--method", "lora-subspace", "--layers", "attention", "--dim", 20)
    said = cli("train", *words, "--rank", 2, "--lr", 0.1, "--steps", 1, "--out", "r")
    assert (said.code, said.err) == (0, "")
    record = record_of(here / "r")
    assert (record["trainable_parameters"], record["stored_parameters"]) == (20, 20)
    assert cli("export", "r/model.safetensors", "lora", "--format", "peft").code == 0
    assert (
        json.loads((here / "lora" / "adapter_config.json").read_text())["modules_to_save"] is None
    )


def test_the_intrinsic_dimension_of_a_text(here, cli):
    words = (*WORDS, "--block", 9, "--epochs", 1, "--stage-epochs", 1, "--dims", "4,8")
    said = cli("intrinsic", *words, "--seeds", 1, "--baseline-lrs", 0.02, "--jobs", 1, "--out", "d")
    assert (said.code, said.err) == (0, "")
    assert "perplexity" in said.out
    (curve,) = (record_of(run) for run in (here / "d" / "runs").iterdir() if "hash" in run.name)
    assert [row["trainable_parameters"] for row in curve["history"]][:1] == [4]


def test_blocks(made):
    task = loaded(made, block=9)
    words = task.tokenizer.inner.convert_ids_to_tokens(task.data.test.tokens[0].tolist())
    assert " ".join(words) == "the film was good and the plot was bad"
    assert (task.size(), len(task.data.validation), len(task.data.test)) == (92, 8, 20)
    assert loaded(made).data.train.tokens.shape[1] == 16  # what the network takes


def test_perplexity_is_of_the_tokens_that_are_told(made):
    task = loaded(made, block=9)
    net = tasks.draw(task, 0).eval()
    loss, perplexity = task.evaluate(net, "test")
    tokens = task.data.test.tokens.long()
    with torch.no_grad():
        theirs = float(net(input_ids=tokens, labels=tokens).loss)
    assert loss == pytest.approx(theirs, rel=1e-5)
    assert perplexity == pytest.approx(math.exp(theirs), rel=1e-5)
    assert 8 < perplexity < 20  # it knows nothing yet of 14 words


def test_a_subspace_over_a_configuration_alone(here):
    """Its weights are random, and the same when the file finds them again."""
    training = Training(net="./bare", data="text.txt", task="lm", epochs=1, batch_size=8)
    record = train(Run(training, "hash", {"dim": 20}, 0.1), Path("run"))
    assert "./bare has a configuration and no weights: they are random" in record.notes
    found = evaluate_checkpoint("run/model.safetensors")
    assert found["test_perplexity"] == record.test_score


def test_sets_of_texts(here):
    (here / "set").mkdir()
    for part, count in (("train", 30), ("test", 10)):
        rows = [{"text": "the film was good"}] * count
        text = "\n".join(map(json.dumps, rows))
        (here / "set" / f"{part}.jsonl").write_text(text)
    task = loaded(here, data="set", block=5)
    assert len(task.data.test) == 9  # 49 tokens: an end between two texts
    end = task.tokenizer.end
    assert task.data.test.tokens[:, 4].tolist() == [end] * 9
    lines = here / "lines"
    lines.mkdir()
    (lines / "train.txt").write_text(TEXT.replace(" the", "\nthe"))
    assert loaded(here, data="lines", block=5).size() > 100


def test_a_byte_order_mark_is_no_word(here):
    (here / "marked.txt").write_text(TEXT, encoding="utf-8-sig")
    (here / "marked").mkdir()
    (here / "marked" / "train.txt").write_text(TEXT, encoding="utf-8-sig")
    for data in ("marked.txt", "marked"):
        assert torch.equal(
            loaded(here, data=data).data.train.tokens, loaded(here).data.train.tokens
        )


BAD = {
    "--block 17": "--block must be at least 2 and at most 16, the positions of ./gpt2, got 17",
    "--block 1": "--block must be at least 2",
    "--data short.txt": "give more text, or a smaller --block",
    "--data ./untested": "give more text, or a smaller --block",
    "--data ./nothing": "there is no data folder ./nothing",
    "--data latin.txt": "is no text in UTF-8",
    "--max-length 8": "unknown option of lm 'max_length'",
    "--net ./bert": "./bert sees the tokens that it is to tell, as an encoder does",
    "--net ./small": "does not take a block of 16 tokens up to number 13",
}


def test_refusals(here, cli):
    (here / "short.txt").write_text("the film " * 10)
    (here / "untested").mkdir()
    (here / "untested" / "train.txt").write_text(TEXT)
    (here / "untested" / "test.txt").touch()
    (here / "latin.txt").write_bytes("für".encode("latin-1"))
    gpt2(here / "small", vocab_size=10)
    before = contents(here)
    for words, message in BAD.items():
        said = cli("train", *WORDS, "--dim", 5, *words.split(), "--out", "run")
        assert (said.code, message in said.err) == (2, True), (words, said.err)
        assert said.err.count("\n") == 1, said.err
        assert contents(here) == before
