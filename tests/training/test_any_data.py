"""Data of the user's own, from the command line to the checkpoint that is evaluated again."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from subspan import checkpoint
from subspan.training import records, state
from subspan.training.evaluate import evaluate_checkpoint
from subspan.training.train import train
from tests.runs import STEPS, a_run, contents, record_of, train_up_to
from tests.training.data.makers import as_structs, encoded, folder_of, image_folder, parquet_folder

TRAIN = ("train", "--net", "mlp-8", "--epochs", "1", "--dim", "5", "--batch-size", "8")


def birds(folder, *, photo="photo", genus="genus", mode="L"):
    """Parquet with an edge map beside each photograph, and a number beside each name."""
    colour = (lambda i: (10 * i, 9, 8)) if mode == "RGB" else (lambda i: 10 * i)
    columns = {
        photo: as_structs([encoded(colour(i), mode, (8 + i % 3, 9)) for i in range(24)]),
        "edges": as_structs([encoded(0)] * 24),
        genus: ["wren", "emu", "owl"] * 8,
        "number": list(range(24)),
    }
    return parquet_folder(folder, **columns)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_other_columns_and_sizes(mode, in_tmp_path, cli):
    """The checkpoint says how the data was read, and so is other data."""
    birds(in_tmp_path / "birds", mode=mode)
    words = ("--image-column", "photo", "--label-column", "genus", "--resize", "6x10")
    said = cli(*TRAIN, "--data", "./birds", *words, "--out", "run")
    assert (said.code, said.err) == (0, "")
    record = record_of(in_tmp_path / "run")
    told = {"image_column": "photo", "label_column": "genus", "resize": "6x10"}
    assert told.items() <= record["config"].items()
    file = in_tmp_path / "run" / "model.safetensors"
    extra = checkpoint.inspect(file)["extra"]
    assert told.items() <= extra.items()
    assert (extra["image_shape"], extra["classes"]) == ([3 if mode == "RGB" else 1, 6, 10], 3)
    assert evaluate_checkpoint(file)["test_accuracy"] == record["test_score"]
    birds(in_tmp_path / "same", mode=mode)
    said = cli("eval", file, "--data", "./same")
    assert f"test_accuracy: {record['test_score']}\n" in said.out
    # Where its columns are called otherwise, it can be said.
    birds(in_tmp_path / "other", mode=mode, photo="picture", genus="family")
    said = cli("eval", file, "--data", "./other")
    assert said.code == 2
    assert "unknown image column of " in said.err
    assert "known are edges, family, number, picture" in said.err
    words = ("--image-column", "picture", "--label-column", "family")
    said = cli("eval", file, "--data", "./other", *words)
    assert f"test_accuracy: {record['test_score']}\n" in said.out
    said = cli("eval", file, "--data", "./other", *words, "--resize", "6")
    assert said.code == 2
    assert "6, 6)" in said.err
    assert "--resize changes the size" in said.err


def test_classes_of_other_names(in_tmp_path, cli):
    """Their numbers follow from the order of the names: a score would mean nothing."""
    image_folder(in_tmp_path / "pets")
    assert cli(*TRAIN, "--data", "./pets", "--out", "run").code == 0
    file = in_tmp_path / "run" / "model.safetensors"
    shutil.copytree(in_tmp_path / "pets", in_tmp_path / "same")
    said = cli("eval", file, "--data", "./same")
    assert said.code == 0
    for part in ("train", "test"):
        (in_tmp_path / "same" / part / "cat").rename(in_tmp_path / "same" / part / "zebra")
    said = cli("eval", file, "--data", "./same")
    assert (said.code, said.out) == (2, "")
    assert "same has other classes (dog, zebra) than the images that " in said.err
    assert "numbered in the order of their names: name them alike" in said.err


def test_an_image_folder_of_photographs(in_tmp_path, cli):
    """Images have any size and no test part; the network wants images of a certain size."""
    pets = image_folder(in_tmp_path / "pets", parts=("train",), count=30, mode="RGB", size=(31, 20))
    (pets / "train" / "dog" / "29.png").write_bytes(encoded((1, 2, 3), "RGB", (50, 40)))
    command = (*TRAIN, "--net", "lenet", "--data", "./pets", "--out", "run")
    said = cli(*command)
    assert (said.code, "found 20x31 and 40x50" in said.err) == (2, True)
    assert not (in_tmp_path / "run").exists()
    said = cli(*command, "--resize", "8")
    assert (said.code, "got 8x8: use larger images (--resize 12 makes them so)" in said.err) == (
        2,
        True,
    )
    said = cli(*command, "--resize", "16")
    assert (said.code, said.err) == (0, "")
    assert "note: no test part: 1/6 of the images" in said.out
    record = record_of(in_tmp_path / "run")
    assert record["config"]["resize"] == 16
    assert record["notes"][0].startswith("no test part: 1/6 of the images")
    before = contents(in_tmp_path / "run")
    said = cli(*command, "--resize", "17")
    assert (said.code, "another configuration (resize 16 → 17)" in said.err) == (2, True)
    said = cli(*command, "--resize", "16")
    assert (said.code, "complete already" in said.out) == (0, True)
    assert contents(in_tmp_path / "run") == before


def test_what_was_not_asked_for_is_not_in_the_file(trained):
    """Checkpoints of usual data stay as small, and the same bytes, as they were."""
    extra = checkpoint.inspect(trained / "model.safetensors")["extra"]
    assert not {"image_column", "label_column", "resize", "depth"} & extra.keys()


def test_a_run_that_an_older_version_began_goes_on(tmp_path):
    """Its record and its state have null for these settings."""
    run, starts = a_run(dim=5, epochs=2), []
    train_up_to(STEPS + 2, run, tmp_path)
    record, where = record_of(tmp_path), state.read(tmp_path / state.FILE)
    for config in (record["config"], where.config):
        for name in ("image_column", "label_column", "resize"):
            assert name not in config
            config[name] = None
    records.write_json(tmp_path / "record.json", record)
    state.write(tmp_path / state.FILE, where)
    done = train(run, tmp_path, on_start=lambda *told: starts.append(told[:2]))
    assert starts == [(2 * STEPS, STEPS)]
    assert done.status == "complete"


def deep(folder, scale=1.0):
    """Grey images of floating-point numbers, of which those of one class are brighter."""
    rng = np.random.default_rng(0)

    def images(part, label):
        for _ in range(12):
            levels = (0.4 + 0.5 * (label == "dog") + 0.1 * rng.random((8, 8))) * scale
            yield Image.fromarray(levels.astype(np.float32))

    return folder_of(folder, images, "tiff")


def test_deep_images(in_tmp_path, cli):
    """They are learnt, the record tells their levels, and a file tells how it read them."""
    deep(in_tmp_path / "pets")
    words = ("--epochs", "30", "--lr", "0.1", "--out", "run")
    said = cli(*TRAIN, "--data", "./pets", *words)
    assert (said.code, said.err) == (0, "")
    record = record_of(in_tmp_path / "run")
    assert record["test_score"] > 0.9
    assert record["notes"][0].startswith("images of floating point: their levels, 0.4")
    file = in_tmp_path / "run" / "model.safetensors"
    assert checkpoint.inspect(file)["extra"]["depth"] == "floating point"
    shutil.copytree(in_tmp_path / "pets", in_tmp_path / "same")
    said = cli("eval", file, "--data", "./same")
    assert f"test_accuracy: {record['test_score']}\n" in said.out
    image_folder(in_tmp_path / "other", size=(8, 8))
    said = cli("eval", file, "--data", "./other")
    assert (said.code, said.out) == (2, "")
    assert (
        "other has images of 8 bits, in which a level means another brightness than in" in said.err
    )
    assert "the images of floating point that " in said.err
