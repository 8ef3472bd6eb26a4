"""The cache of decoded sets: hits, changes, damage, and many at once."""

import os
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from subspan.training import data
from subspan.training.data import cache, pixels, sources
from subspan.training.data.images import RawData
from tests.training.data.makers import encoded, image_folder, numbered


def test_a_second_load_neither_decodes_nor_imports_datasets(tmp_path, monkeypatch):
    folder = str(image_folder(tmp_path / "pets", parts=("train",)))
    first = data.load(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pixels, "to_array", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    second = data.load("./pets")  # the same folder by another name
    assert first.notes
    assert (second.notes, second.classes) == (first.notes, first.classes)
    for part in ("train", "validation", "test"):
        before, after = getattr(first, part), getattr(second, part)
        assert torch.equal(after.images, before.images)
        assert torch.equal(after.labels, before.labels)


def test_a_changed_file_is_decoded_again(tmp_path):
    folder = image_folder(tmp_path / "pets")
    data.load(str(folder))
    image = folder / "test" / "cat" / "01.png"
    size = image.stat().st_size
    image.write_bytes(encoded(21))
    os.utime(image, ns=(1, 1))
    assert image.stat().st_size == size
    assert data.load(str(folder)).test.images[1].unique().tolist() == [21]


def test_each_size_is_kept_apart(tmp_path, cache_folder):
    for name in (str(image_folder(tmp_path / "pets")), "digits"):
        shapes = [data.load(name, resize=size).image_shape[1:] for size in (None, 5, "5x6", "5x5")]
        assert shapes[1:] == [(5, 5), (5, 6), (5, 5)]
    assert len(list(cache_folder.iterdir())) == 6


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b"\xff" * len(b)])
def test_a_damaged_file_is_built_again(tmp_path, cache_folder, damage):
    folder = str(image_folder(tmp_path / "pets"))
    first = data.load(folder)
    [file] = cache_folder.iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    second = data.load(folder)
    assert torch.equal(second.train.images, first.train.images)
    assert file.read_bytes() == content


def raw_data(size=3):
    return RawData(numbered(size), numbered(size), classes=size)


def test_a_foreign_file_is_built_again(cache_folder):
    from safetensors.torch import save_file

    cache_folder.mkdir()
    save_file({"w": torch.zeros(3)}, cache_folder / "key.safetensors")
    assert cache.fetch("key", RawData, lambda: raw_data(5)).classes == 5


def test_what_an_older_version_decoded_is_decoded_again(tmp_path, cache_folder, monkeypatch):
    """It made 8 bits of everything: neither its key nor its content is taken for today's."""
    folder = str(image_folder(tmp_path / "pets"))
    with monkeypatch.context() as older:
        older.setattr(sources, "FORMAT", 2)
        data.load(folder)
    data.load(folder)
    _, new = sorted(cache_folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    content = new.read_bytes()
    new.write_bytes(content.replace(b"depth", b"_____"))
    assert data.load(folder).depth == "8 bits"
    assert new.read_bytes() == content


def test_an_unwritable_cache_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path / "file" / "cache"))
    assert len(data.load("digits").train) == 1318


def test_a_full_disk_leaves_nothing_behind(cache_folder, monkeypatch):
    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    assert cache.fetch("key", RawData, raw_data).classes == 3
    assert list(cache_folder.iterdir()) == []


def test_builders_at_once_leave_one_whole_file(cache_folder):
    barrier = threading.Barrier(4)

    def build():
        barrier.wait(timeout=10)
        return raw_data(7)

    threads = [threading.Thread(target=cache.fetch, args=("key", RawData, build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in cache_folder.iterdir()] == ["key.safetensors"]
    assert cache.fetch("key", RawData, pytest.fail).classes == 7


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path / "mine"))
    assert cache.folder() == tmp_path / "mine"
    monkeypatch.delenv("SUBSPAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "subspan"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "subspan"


def test_a_user_without_a_home_keeps_nothing(monkeypatch, in_tmp_path):
    for name in ("SUBSPAN_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where no user is known
    assert len(data.load("digits").train) == 1318
    assert list(in_tmp_path.iterdir()) == []


@pytest.mark.parametrize("named", [str, lambda path: {"bytes": None, "path": str(path)}])
def test_images_beside_their_set_are_read_each_time(named, tmp_path, cache_folder):
    """A change of theirs changes nothing in the folder of the set."""
    pictures, folder = tmp_path / "pictures", tmp_path / "set"
    files = [pictures / f"{i}.png" for i in range(8)]
    for place in (pictures, folder):
        place.mkdir()
    table = pa.table({"image": list(map(named, files)), "label": [0, 1] * 4})
    pq.write_table(table, folder / "train.parquet")
    for level in (10, 200):
        for file in files:
            file.write_bytes(encoded(level))
        assert set(data.load(str(folder)).train.images.unique().tolist()) == {level}
    assert not cache_folder.exists()
