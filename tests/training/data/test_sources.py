"""Names of data: digits, folders, the Hub, and the real sets."""

import pytest
import torch

from subspan.errors import SubspanError
from subspan.training import data
from subspan.training.data import sources, tables
from tests.training.data.makers import image_folder, parquet_folder


@pytest.fixture
def no_hub(monkeypatch):
    """A Hub that cannot be reached."""
    import huggingface_hub

    def dataset_info(self, *args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)


def test_digits():
    digits = data.load("digits")
    assert (digits.name, digits.classes, digits.image_shape) == ("digits", 10, (1, 8, 8))
    assert [len(s) for s in (digits.train, digits.validation, digits.test)] == [1318, 120, 359]
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.labels.dtype == torch.int64
    assert digits.train.images.max() == 255
    assert len(digits.train.images.unique()) == 17
    assert digits.notes == ()
    assert digits.test.labels[:12].tolist() == [0, 1, 5, 9, 6, 7, 9, 8, 7, 7, 2, 3]
    again = data.load("digits", seed=1)
    assert torch.equal(again.test.images, digits.test.images)


def test_digits_resized():
    digits, larger = data.load("digits"), data.load("digits", resize="16x12")
    assert larger.image_shape == (1, 16, 12)
    assert torch.equal(larger.test.labels, digits.test.labels)
    means = [d.test.images.flatten(1).float().mean(1) for d in (digits, larger)]
    assert means[1] == pytest.approx(means[0], rel=0.05)
    with pytest.raises(SubspanError, match="digits has no columns, got label_column 'digit'"):
        data.load("digits", label_column="digit")


def test_names():
    assert data.names() == ["cifar10", "digits", "fashion_mnist", "mnist"]


def test_subspan_data_goes_first(tmp_path, monkeypatch):
    """For every short name, known or not, but not for a path."""
    monkeypatch.setenv("SUBSPAN_DATA", str(tmp_path / "sets"))
    image_folder(tmp_path / "sets" / "mnist")
    image_folder(tmp_path / "sets" / "pets", mode="RGB")
    assert data.load("mnist").image_shape == (1, 3, 4)
    assert data.load("pets").image_shape == (3, 3, 4)
    assert data.load("digits").image_shape == (1, 8, 8)
    with pytest.raises(SubspanError, match=r"there is no data folder \./pets"):
        data.load("./pets")


def test_links_in_a_folder(tmp_path):
    """``datasets`` passes over what lies behind a link to a folder: the test part of a set, say."""
    image_folder(tmp_path / "pets")
    pets = data.load(str(tmp_path / "pets"))
    (tmp_path / "pets" / "test").rename(tmp_path / "elsewhere")
    (tmp_path / "pets" / "test").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SubspanError, match="pets/test is a link to a folder, and what lies behind"):
        data.load(str(tmp_path / "pets"))
    (tmp_path / "pets" / "test").unlink()
    for file in (tmp_path / "elsewhere").rglob("*.png"):
        link = tmp_path / "pets" / "test" / file.relative_to(tmp_path / "elsewhere")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    assert data.load(str(tmp_path / "pets")).test.images.equal(pets.test.images)


def test_a_known_name_is_no_folder_here(tmp_path, monkeypatch):
    """An output folder that happens to be called like the data is not taken for it."""
    image_folder(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert data.load("digits").image_shape == (1, 8, 8)
    assert data.load("./digits").image_shape == (1, 3, 4)


def test_files_that_are_no_part_of_a_set_are_noted(tmp_path):
    """``datasets`` passes over files of other formats, and over others where some tell a part."""
    folder = image_folder(tmp_path / "pets")
    for file in ("README.md", "LICENSE", ".cache/a.png", "train/.thumbs.db"):  # of no interest
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()
    assert data.load(str(folder)).notes == ()
    for file in ("train/cat/99.heic", "more/cat/1.png", "more/dog/2.png", "more/dog/3.png"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    left = "more/cat/1.png, more/dog/2.png, more/dog/3.png, …"
    note = f"4 files are no part of the set, and left out: {left}"
    assert data.load(str(folder)).notes == (note,)


def test_tables_of_another_format_are_noted(tmp_path):
    folder = parquet_folder(tmp_path / "set", text=["a"], label=[0])
    (folder / "train-2.jsonl").write_text('{"text": "b", "label": 1}\n')
    (folder / "test-2.jsonl").write_text('{"text": "b", "label": 1}\n')
    (folder / "more.parquet").write_bytes((folder / "train.parquet").read_bytes())
    *_, notes = tables.open_set(str(folder), None, "texts", "")
    left = "more.parquet, test-2.jsonl, train-2.jsonl"
    assert notes == (f"3 files are no part of the set, and left out: {left}",)


@pytest.mark.parametrize("parts", [False, True])
def test_a_set_that_save_to_disk_has_written(parts, tmp_path):
    import datasets

    whole = datasets.Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 0, 1]})
    some = whole.select([3, 1])
    saved = datasets.DatasetDict(train=whole, test=some) if parts else some
    saved.save_to_disk(tmp_path / "set")
    found, features, _ = tables.open_set(str(tmp_path / "set"), None, "texts", "")
    assert [row["text"] for row in found["test" if parts else "train"]] == ["d", "b"]
    assert set(found) == ({"train", "test"} if parts else {"train"})
    assert list(features) == ["text", "label"]


def test_hub_set_is_pinned_and_needs_no_network_again(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    folder = image_folder(tmp_path / "pets")
    local, calls = datasets.load_dataset_builder, []

    def load_dataset_builder(path, **options):
        calls.append((path, options["revision"]))
        return local(str(folder))

    def dataset_info(self, name, **options):
        return type("Info", (), {"sha": "c0ffee"})

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    pets = data.load("someone/pets")
    assert calls == [("someone/pets", "c0ffee")]
    assert pets.notes == ("someone/pets at revision c0ffee",)
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    again = data.load("someone/pets")
    assert torch.equal(again.train.images, pets.train.images)
    assert again.notes == pets.notes
    for other in ({"label_column": "other"}, {"resize": 5}):  # another set
        with pytest.raises(SubspanError, match="gave no data set"):
            data.load("someone/pets", **other)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnsit", r"unknown data set 'mnsit': did you mean mnist\?.*no network.*SUBSPAN_DATA"),
        ("fashion_mnist", "^no folder 'fashion_mnist' .*no network.*SUBSPAN_DATA"),
        ("someone/pets", "no folder 'someone/pets' .*no network.*check the name and the network"),
        ("./pets", "there is no data folder ./pets"),
        ("a/b/c", "there is no data folder a/b/c"),
        ("~nobody-of-this-name/pets", "there is no data folder ~nobody-of-this-name/pets"),
        ("", "unknown data set ''"),
    ],
)
def test_unknown_names(name, message, cache_folder):
    with pytest.raises(SubspanError, match=message):
        data.load(name)
    assert not cache_folder.exists()


@pytest.mark.usefixtures("no_hub")
def test_a_set_of_images_that_is_asked_for_texts():
    """The name is known, so that no other one is suggested."""
    with pytest.raises(SubspanError, match=r"^no folder .digits. was found, and the Hugging Face"):
        sources.find("digits", "digits", lambda *_: None)[1]()


def test_a_name_that_no_hub_has():
    """An impossible name is refused without a request."""
    with pytest.raises(SubspanError, match=r"unknown data set 'not a name'.*it has no such set"):
        data.load("not a name")


@pytest.mark.realdata
@pytest.mark.slow
def test_mnist(real_data):
    mnist = data.load("mnist", validation=0)
    assert [len(s) for s in (mnist.train, mnist.validation, mnist.test)] == [60_000, 0, 10_000]
    assert (mnist.classes, mnist.image_shape) == (10, (1, 28, 28))
    assert mnist.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert mnist.mean.item() == pytest.approx(0.1307, abs=5e-5)
    assert mnist.std.item() == pytest.approx(0.3081, abs=5e-5)


@pytest.mark.realdata
@pytest.mark.slow
def test_cifar10(real_data):
    cifar = data.load("cifar10")
    assert [len(s) for s in (cifar.train, cifar.validation, cifar.test)] == [45_833, 4_167, 10_000]
    assert (cifar.classes, cifar.image_shape) == (10, (3, 32, 32))
    assert cifar.test.labels[:5].tolist() == [3, 8, 8, 0, 6]
    assert cifar.mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-3)
    assert cifar.std.tolist() == pytest.approx([0.2470, 0.2435, 0.2616], abs=1e-3)
