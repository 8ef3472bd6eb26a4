"""A checkpoint evaluated, looked into and exported, here and in another process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch import nn

from subspan import checkpoint
from subspan.errors import SubspanError
from subspan.training import data
from subspan.training.data import Split
from subspan.training.devices import accelerator
from subspan.training.evaluate import evaluate, evaluate_checkpoint, rebuild
from subspan.training.export import export
from subspan.training.tasks.classification import Classification
from subspan.training.train import train
from tests.forks import python_code
from tests.runs import STEPS, a_run, record_of
from tests.training.data.makers import image_folder


class Pixel(nn.Module):
    """Its scores are the pixels of the first row; in training mode they are wrong."""

    def forward(self, x):
        return -x[:, 0, 0] if self.training else x[:, 0, 0]


def test_evaluate_is_exact():
    digits = data.load("digits")
    # One of 3 images more than a batch is wrong.
    images = torch.zeros(1003, 1, 1, 8, dtype=torch.uint8)
    labels = torch.arange(1003) % 8
    images[torch.arange(1003), 0, 0, labels] = 255
    labels[1002] = (labels[1002] + 1) % 8
    model = Pixel()
    task = Classification(replace(digits, test=Split(images, labels)), "mlp")
    loss, accuracy = evaluate(model, task, "test")
    assert accuracy == 1002 / 1003
    scores = digits.normalize(images)[:, 0, 0]
    assert loss == pytest.approx(float(nn.functional.cross_entropy(scores, labels)), rel=1e-5)
    assert not model.training


def test_a_checkpoint_gives_what_its_record_says(trained):
    found = evaluate_checkpoint(trained / "model.safetensors")
    record = record_of(trained)
    assert found["test_accuracy"] == record["test_score"]
    assert found["data"] == "digits"
    assert found["images"] == 359
    assert found["checkpoint_bytes"] == record["checkpoint_bytes"]
    model, header = rebuild(trained / "model.safetensors")
    assert header["extra"]["net"] == "mlp-8"
    digits = data.load("digits")
    _, accuracy = evaluate(model, Classification(digits, "mlp-8"), "validation")
    assert accuracy == record["val_score"]


FRESH = """
import torch
from subspan.cli import main
torch.set_num_threads(torch.get_num_threads() + 1)
for command in ("eval", "inspect"):
    assert main([command, {file!r}]) == 0
"""


def test_in_a_fresh_process_with_other_threads(trained, tmp_path):
    """The same accuracy; and what is no terminal gets plain lines."""
    said = python_code(FRESH.format(file=str(trained / "model.safetensors")), tmp_path)
    assert f"test_accuracy: {record_of(trained)['test_score']}\n" in said.stdout
    assert "kind: subspace\n" in said.stdout
    assert "  net: mlp-8\n" in said.stdout
    assert all(line.isprintable() for line in said.stdout.splitlines())
    assert said.stderr == ""


def test_normalisation_is_that_of_the_training(trained, monkeypatch):
    """Not that of the data it is evaluated on."""
    record, digits = record_of(trained), data.load("digits")
    other = replace(digits, mean=digits.mean + 1, std=digits.std * 2)
    monkeypatch.setattr(data, "load", lambda *_, **__: other)
    found = evaluate_checkpoint(trained / "model.safetensors", "other")
    assert found["test_accuracy"] == record["test_score"]
    extra = checkpoint.inspect(trained / "model.safetensors")["extra"]
    assert torch.equal(torch.tensor(extra["mean"]), digits.mean)
    assert torch.equal(torch.tensor(extra["std"]), digits.std)


def test_other_data(trained, tmp_path, cli):
    for size, count in (((8, 8), 2), ((4, 3), 2)):
        folder = image_folder(tmp_path / f"{size[0]}", count=count * 6, size=size)
        with pytest.raises(
            SubspanError, match=r"has 2 classes and images of shape .* trained on 10"
        ):
            evaluate_checkpoint(trained / "model.safetensors", str(folder))
        said = cli("eval", trained / "model.safetensors", "--data", folder)
        assert said.code == 2
        assert "was trained on 10 and (1, 8, 8)" in said.err


@pytest.mark.parametrize("extra", [{}, {"net": "mlp"}, {"task": "text", "net": "x"}, {"task": 3}])
def test_a_file_that_names_no_network(extra, tmp_path):
    net = nn.Linear(3, 2)
    checkpoint.save(net, tmp_path / "model.safetensors", extra=extra)
    with pytest.raises(
        SubspanError, match=r"does not say which network .* load it with subspan.load"
    ):
        rebuild(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("hash", {"dim": 30, "compartments": "layer"}),
        ("full", {}),
        ("dlrt", {"tolerance": 0.2}),
        ("prodsum", {"p": 3}),
    ],
)
def test_exported_weights_load_with_plain_torch(method, options, tmp_path):
    """Into an ordinary network, which then gives the same logits."""
    train(a_run(method, lr=0.05, **options), tmp_path / "run")
    file = tmp_path / "run" / "model.safetensors"
    size = export(file, tmp_path / "weights.safetensors")
    assert size == (tmp_path / "weights.safetensors").stat().st_size
    plain = nn.Sequential()
    plain.add_module("flatten", nn.Flatten())
    plain.add_module("fc1", nn.Linear(64, 8))
    plain.add_module("relu", nn.ReLU())
    plain.add_module("fc2", nn.Linear(8, 10))
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / "weights.safetensors"))
    model, _ = rebuild(file)
    images = torch.linspace(-1, 1, 5 * 64).view(5, 1, 8, 8)
    close = {} if method in ("hash", "full") else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(plain(images), model(images), **close or {"rtol": 0, "atol": 0})
    assert any(p.abs().sum() > 0 for p in plain.parameters())


def test_export_refuses(trained, tmp_path, cli):
    file = trained / "model.safetensors"
    before = file.read_bytes()
    for out, message in (
        (tmp_path / "no" / "w.safetensors", "give a file name in a folder that exists"),
        (tmp_path, "give a file name in a folder that exists"),
        (file, "is the checkpoint itself: give another file name"),
    ):
        said = cli("export", file, out)
        assert said.code == 2
        assert message in said.err
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "w.safetensors").write_text("mine")
    said = cli("export", tmp_path / "nothing", tmp_path / "w.safetensors")
    assert said.code == 2
    assert "nothing is not a file: expected a checkpoint that subspan saved" in said.err
    assert (tmp_path / "w.safetensors").read_text() == "mine"


def test_export_by_command(trained, tmp_path, cli):
    said = cli("export", trained / "model.safetensors", tmp_path / "w.safetensors")
    size = (tmp_path / "w.safetensors").stat().st_size
    assert (said.code, said.err) == (0, "")
    assert said.out == f"{tmp_path}/w.safetensors: {size:,} bytes\n"


def test_a_run_with_bits_leaves_a_compact_file_that_every_command_reads(tmp_path, cli):
    out = tmp_path / "run"
    record = train(a_run(dim=40, epochs=4, bits=3), out)
    file = out / "model.subspan"
    found = checkpoint.inspect(file)
    assert record.checkpoint_bytes == file.stat().st_size == found["bytes"] < 40 * 3 / 8 + 70
    exact = checkpoint.read(out / "model.safetensors")[1]["coordinates"]
    assert torch.equal(checkpoint.read(file)[1]["coordinates"], exact)
    assert evaluate_checkpoint(file)["test_accuracy"] == record.test_score
    assert record.best_epoch == 4  # all coordinates are rounded at the end only
    said = cli("inspect", file)
    assert said.code == 0
    assert "bytes_of_parts:" in said.out
    assert cli("eval", file).code == 0
    assert cli("export", file, tmp_path / "weights.safetensors").code == 0


@pytest.mark.filterwarnings("ignore:Seems like .optimizer.step:UserWarning")  # as with accelerate
def test_a_run_with_bits_counts_the_steps_that_a_scaler_leaves_out(tmp_path, monkeypatch):
    steps = iter(range(4 * STEPS))

    class Scaler(torch.amp.GradScaler):
        def step(self, optimizer, *args):
            if next(steps) < 3 * STEPS:
                optimizer.step()

    def scaled(*args, **kwargs):
        made = accelerator(*args, **kwargs)
        made.scaler = Scaler("cpu", enabled=False)
        return made

    monkeypatch.setattr("subspan.training.train.accelerator", scaled)
    record = train(a_run(dim=40, epochs=4, bits=3), tmp_path)
    assert record.status == "complete"
    assert next(steps, None) is None
    exact = checkpoint.read(tmp_path / "model.safetensors")[1]["coordinates"]
    assert torch.equal(checkpoint.read(tmp_path / "model.subspan")[1]["coordinates"], exact)
