"""Image folders and parquet files of every kind, decoded; and what cannot be."""

import pytest
import torch

from subspan.errors import SubspanError
from subspan.training import data
from subspan.training.data import decode, tables
from tests.training.data.makers import as_structs, encoded, image_folder, parquet_folder


def test_grey_image_folder(tmp_path):
    pets = data.load(str(image_folder(tmp_path / "pets")))
    assert (pets.classes, pets.image_shape, pets.notes) == (2, (1, 3, 4), ())
    assert [len(s) for s in (pets.train, pets.validation, pets.test)] == [22, 2, 24]
    assert pets.test.labels.tolist() == [0] * 12 + [1] * 12
    assert pets.test.images[:, 0, 2, 3].tolist() == [20 * i for i in range(12)] * 2


def test_colour_image_folder(tmp_path):
    pets = data.load(str(image_folder(tmp_path / "pets", mode="RGB")))
    assert pets.image_shape == (3, 3, 4)
    assert pets.test.images[5, :, 1, 1].tolist() == [100, 1, 2]


def test_one_colour_image_makes_the_set_colour(tmp_path):
    folder = image_folder(tmp_path / "pets")
    (folder / "test" / "cat" / "00.png").write_bytes(encoded((9, 8, 7), "RGB"))
    pets = data.load(str(folder))
    assert pets.test.images[0, :, 0, 0].tolist() == [9, 8, 7]
    assert pets.test.images[1, :, 0, 0].tolist() == [20, 20, 20]
    assert pets.train.images.shape[1:] == (3, 3, 4)


@pytest.mark.parametrize("wrap", [as_structs, list])
def test_parquet_of_plain_bytes_and_strings(tmp_path, wrap):
    """Neither the images nor the labels say what they are; strings are numbered in order."""
    images = wrap([encoded(i) for i in range(24)])
    labels = ["wren", "emu", "owl"] * 8
    birds = data.load(str(parquet_folder(tmp_path / "birds", img=images, label=labels)))
    assert birds.classes == 3
    assert birds.test.labels[:4].tolist() == [2, 0, 1, 2]
    assert birds.test.images[:, 0, 0, 0].tolist() == list(range(24))


def test_integer_labels_are_numbered_from_zero(tmp_path):
    columns = {"image": as_structs([encoded(0)] * 24), "label": [1, 5] * 12}
    birds = data.load(str(parquet_folder(tmp_path / "birds", **columns)))
    assert birds.classes == 2
    assert birds.test.labels[:3].tolist() == [0, 1, 0]


def test_columns_can_be_named(tmp_path):
    columns = {
        "image": as_structs([encoded(1)] * 24),
        "edge": as_structs([encoded(2)] * 24),
        "label": [0, 1] * 12,
        "genus": ["a", "b", "c"] * 8,
    }
    folder = str(parquet_folder(tmp_path / "birds", **columns))
    usual = data.load(folder)
    birds = data.load(folder, image_column="edge", label_column="genus")
    assert (usual.classes, birds.classes) == (2, 3)
    assert usual.train.images.unique().tolist() == [1]
    assert birds.train.images.unique().tolist() == [2]


def test_without_a_test_part_a_sixth_serves(tmp_path):
    folder = image_folder(tmp_path / "pets", parts=("train",), count=30)
    pets = data.load(str(folder))
    assert "no test part: 1/6" in pets.notes[0]
    assert [len(s) for s in (pets.train, pets.validation, pets.test)] == [46, 4, 10]
    other = data.load(str(folder), seed=1)
    assert torch.equal(other.test.images, pets.test.images)


def test_without_a_test_part_the_validation_part_serves(tmp_path):
    folder = image_folder(tmp_path / "pets", parts=("train", "valid"))
    pets = data.load(str(folder))
    assert pets.notes == ("no test part: the part 'validation' serves as it",)
    assert len(pets.test) == 24


def test_folder_without_files(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SubspanError, match=r"cannot read .*empty as images.*one sub-folder of"):
        data.load(str(tmp_path / "empty"))


def test_folder_without_images(tmp_path):
    (tmp_path / "poems").mkdir()
    (tmp_path / "poems" / "ode.txt").write_text("Thou still unravish'd bride of quietness")
    with pytest.raises(
        SubspanError, match=r"plainly the image: expected one Image, or .*found text"
    ):
        data.load(str(tmp_path / "poems"))


def test_folder_with_a_broken_image(tmp_path):
    folder = image_folder(tmp_path / "pets")
    (folder / "train" / "cat" / "03.png").write_bytes(b"no image")
    words = r"cannot read the image .*train/cat/03.png of .*UnidentifiedImageError.*: replace it"
    with pytest.raises(SubspanError, match=words):
        data.load(str(folder))


def test_rows_without_an_image(tmp_path):
    images = [*as_structs([encoded(0)] * 4), None, *as_structs([encoded(0)])]
    folder = parquet_folder(tmp_path / "rows", image=images, label=[0, 1] * 3)
    with pytest.raises(SubspanError, match=r"cannot read the image in row 5 of train of .*rows"):
        data.load(str(folder))


def test_a_folder_of_one_class(tmp_path):
    folder = tmp_path / "cats"
    for i in range(9):
        (folder / "cat").mkdir(parents=True, exist_ok=True)
        (folder / "cat" / f"{i}.png").write_bytes(encoded(i))
    with pytest.raises(SubspanError, match="make a sub-folder for each class, two at least"):
        data.load(str(folder))


def test_two_sizes(tmp_path):
    folder = image_folder(tmp_path / "pets")
    (folder / "test" / "dog" / "11.png").write_bytes(encoded(0, size=(5, 7)))
    with pytest.raises(SubspanError, match=r"one size, found 3x4 and 7x5 .*--resize 28x32"):
        data.load(str(folder))


def test_two_sizes_in_two_parts(tmp_path):
    folder = image_folder(tmp_path / "pets", parts=("train",))
    image_folder(folder, parts=("test",), size=(5, 7))
    with pytest.raises(SubspanError, match=r"one size, found 3x4 and 7x5 .*--resize 28x32"):
        data.load(str(folder))


def test_no_label_column(tmp_path):
    columns = {"image": as_structs([encoded(0)] * 4), "size": [1] * 4, "origin": ["x"] * 4}
    folder = parquet_folder(tmp_path / "birds", **columns)
    with pytest.raises(
        SubspanError, match=r"plainly the label: .* found image, size, origin: name"
    ):
        data.load(str(folder))
    with pytest.raises(SubspanError, match=r"unknown label column .*'orign': did you mean origin"):
        data.load(str(folder), label_column="orign")


def test_one_column_has_the_type_and_another_the_name(tmp_path):
    import datasets

    kinds = {"image": datasets.Image(), "label": datasets.Value("int64")}
    features = datasets.Features(**kinds, origin=datasets.ClassLabel(names=["museum", "zoo"]))
    rows = {"image": as_structs([encoded(0)] * 24), "label": [0, 1, 2] * 8, "origin": [0, 1] * 12}
    (tmp_path / "birds").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "birds" / "train.parquet")
    with pytest.raises(SubspanError, match=r"no column that is plainly the label: .*label, origin"):
        data.load(str(tmp_path / "birds"))
    assert data.load(str(tmp_path / "birds"), label_column="label").classes == 3
    assert data.load(str(tmp_path / "birds"), label_column="origin").names == ("museum", "zoo")


@pytest.mark.parametrize(
    ("labels", "found"),
    [([1.0, 2.0], "float"), ([1, None], "NoneType, int"), ([[1], [2]], "list")],
)
def test_labels_that_are_no_classes(tmp_path, labels, found):
    columns = {"image": as_structs([encoded(0)] * 2), "label": labels}
    folder = parquet_folder(tmp_path / "birds", **columns)
    with pytest.raises(SubspanError, match=f"all be integers or all strings, got {found}"):
        data.load(str(folder))


def test_class_label_that_is_missing(tmp_path):
    import datasets

    features = datasets.Features(image=datasets.Image(), kind=datasets.ClassLabel(names=["a", "b"]))
    rows = {"image": as_structs([encoded(0)] * 24), "kind": [0, 1] * 11 + [0, -1]}
    (tmp_path / "birds").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "birds" / "train.parquet")
    with pytest.raises(SubspanError, match=r"must be in \[0, 2\), got -1"):
        data.load(str(tmp_path / "birds"))


@pytest.mark.parametrize("label", [3, "cat"])
def test_a_training_part_of_one_label(label, tmp_path):
    columns = {"image": as_structs([encoded(0)] * 8), "label": [label] * 8}
    folder = parquet_folder(tmp_path / "birds", **columns)
    with pytest.raises(SubspanError, match=rf"must have two labels at least, got {label} in .*'la"):
        data.load(str(folder))


def test_labels_that_tell_samples_apart(tmp_path):
    columns = {"image": as_structs([encoded(0)] * 8), "label": list(range(8))}
    folder = parquet_folder(tmp_path / "birds", parts=["train"], **columns)
    with pytest.raises(SubspanError, match=r"every sample of .* label of its own in .* 'label'"):
        data.load(str(folder))


@pytest.mark.parametrize("labels", [(0, 1, -1), ("Cat", "Dog", "cat")])
def test_labels_that_nothing_was_trained_on(labels, tmp_path):
    """A set that keeps the labels of its test part to itself has -1 there."""
    folder, images = tmp_path / "pets", as_structs([encoded(0)] * 8)
    parquet_folder(folder, parts=["train"], image=images, label=[*labels[:2]] * 4)
    parquet_folder(tmp_path / "more", parts=["test"], image=images[:3], label=list(labels))
    (tmp_path / "more" / "test.parquet").rename(folder / "test.parquet")
    with pytest.raises(SubspanError, match=rf"no sample of the training part has \({labels[2]}\)"):
        data.load(str(folder))


@pytest.mark.parametrize("file", ["test", "train-1"])
def test_files_that_number_their_classes_otherwise(file, tmp_path):
    """``datasets`` takes the names of the first file, and the numbers of all."""
    import datasets

    (tmp_path / "pets").mkdir()
    for name, names in (("train-0", ["cat", "dog"]), (file, ["dog", "cat"])):
        features = datasets.Features(image=datasets.Image(), kind=datasets.ClassLabel(names=names))
        rows = {"image": as_structs([encoded(0)] * 8), "kind": [0, 1] * 4}
        set_of_one = datasets.Dataset.from_dict(rows, features)
        set_of_one.to_parquet(tmp_path / "pets" / f"{name}.parquet")
    match = rf"{file}.parquet has the classes dog, cat in the column 'kind', and .* have cat, dog:"
    with pytest.raises(SubspanError, match=match):
        data.load(str(tmp_path / "pets"))


def test_several_parts_and_none_to_train_on(tmp_path):
    images = as_structs([encoded(0)] * 4)
    folder = tmp_path / "birds"
    parquet_folder(folder, parts=("validation", "test"), image=images, label=[0, 1] * 2)
    with pytest.raises(
        SubspanError, match="a part 'train', or one part only, found validation, test"
    ):
        data.load(str(folder))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image_column": "size"},
            r"got 'size' and 'label' of image \(dict\), label \(int64\), size",
        ),
        ({"label_column": "image"}, "got 'image' and 'image' of .*--image-column and --label-col"),
    ],
)
def test_a_column_that_holds_something_else(tmp_path, columns, message):
    images = as_structs([encoded(0)] * 4)
    folder = parquet_folder(tmp_path / "birds", image=images, label=[0, 1] * 2, size=[1.5] * 4)
    with pytest.raises(SubspanError, match=f"a column of images and another of labels, {message}"):
        data.load(str(folder), **columns)


# ---- resized -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resize", "size"), [(7, (7, 7)), ("7", (7, 7)), ("5x9", (5, 9)), ("05x10", (5, 10))]
)
def test_a_folder_of_every_size(tmp_path, resize, size):
    folder = image_folder(tmp_path / "pets", parts=("train",))
    image_folder(folder, parts=("test",), size=(5, 7))
    (folder / "train" / "dog" / "11.png").write_bytes(encoded(220, size=(40, 70)))
    pets = data.load(str(folder), resize=resize, validation=0)
    assert pets.image_shape == (1, *size)
    for split in (pets.train, pets.test):
        assert split.images.flatten(1).float().mean(1).tolist() == [20 * i for i in range(12)] * 2


def test_colours_are_resized_alone(tmp_path):
    pets = data.load(str(image_folder(tmp_path / "pets", mode="RGB")), resize=8)
    assert pets.image_shape == (3, 8, 8)
    assert pets.test.images[5, :, 7, 7].tolist() == [100, 1, 2]


@pytest.mark.parametrize(
    "resize", ["", "x", "0", 0, -8, "8x", "8x0", "8x8x8", "8 x 8", "8.5", True, 10_000]
)
def test_no_size(resize):
    with pytest.raises(SubspanError, match="resize must be a number of pixels up to 9999, or"):
        data.load("digits", resize=resize)


# ---- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "test", "note"),
    [
        (("Train", "TEST"), 24, False),
        (("train", "Test"), 24, False),
        (("TRAIN", "Val"), 24, True),
        (("Train", "Val", "Test"), 24, False),
        (("Training", "Testing"), 24, False),
        (("my Train [1]", "my Test [1]"), 24, False),
        (("data/Train", "data/TEST"), 24, False),
        (("Train",), 4, True),
    ],
)
def test_parts_may_have_capitals(parts, test, note, tmp_path):
    """They would all be one part, or Test would be left out."""
    folder = image_folder(tmp_path / "pets", parts=parts)
    (folder / "README.md").write_text("Pets.\n")
    pets = data.load(str(folder))
    assert (len(pets.test), bool(pets.notes)) == (test, note)
    assert len(pets.train) + len(pets.validation) == (20 if parts == ("Train",) else 24)
    assert pets.names == ("cat", "dog")


def test_files_of_parts_may_have_capitals(tmp_path):
    images = as_structs([encoded(i) for i in range(24)])
    folder = parquet_folder(
        tmp_path / "birds", parts=("Train-0", "Train-1", "TEST"), image=images, label=[0, 1] * 12
    )
    birds = data.load(str(folder), validation=0)
    assert (len(birds.train), len(birds.test)) == (48, 24)


def test_classes_may_be_called_like_parts(tmp_path):
    image_folder(tmp_path, parts=("pets",))
    (tmp_path / "pets" / "cat").rename(tmp_path / "pets" / "Train")
    trains = data.load(str(tmp_path / "pets"))
    assert trains.names == ("Train", "dog")
    assert len(trains.train) + len(trains.validation) + len(trains.test) == 24


def test_parts_of_the_hub_may_have_capitals(tmp_path):
    (tmp_path / "pets").mkdir()
    folder = image_folder(tmp_path / "pets" / "all", parts=("a", "b"))
    (tmp_path / "pets" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - {split: Train, path: all/a/**}\n  - {split: VAL, path: all/b/**}\n---\n"
    )
    assert folder.is_dir()
    pets = data.load(str(tmp_path / "pets"), validation=0)
    assert (len(pets.train), len(pets.test)) == (24, 24)
    assert pets.notes == ("no test part: the part 'VAL' serves as it",)


def test_a_format_without_types_has_no_images():
    """Such as CSV: its reader was asked for a type that it has not."""
    assert not decode._may_hold_images(None)
    assert tables.kind(None) == "no type"
