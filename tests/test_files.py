"""Files are there whole or not at all."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from subspan import files
from subspan.files import remove_unfinished, write_atomically, write_together

NEW = b"new" * 10_000


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "record.json"
    assert write_atomically(path, b"old") == 3
    assert write_atomically(str(path), NEW) == len(NEW)
    assert path.read_bytes() == NEW
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path) == ["record.json"]


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("call", ["fsync", "replace", "fchmod"])
@pytest.mark.parametrize("failure", [no_space, interrupted])
def test_a_failure_leaves_what_was_there(call, failure, tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    path.write_bytes(b"old")
    monkeypatch.setattr(files.os, call, failure)
    with pytest.raises((OSError, KeyboardInterrupt)):
        write_atomically(path, NEW)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["record.json"]


def read_only(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system", ".record.json.x8a.tmp")


@pytest.mark.parametrize("module", [files.os, files.tempfile])
@pytest.mark.parametrize("failure", [no_space, read_only])
def test_an_error_names_the_file_and_no_hidden_one(module, failure, tmp_path, monkeypatch):
    call = "replace" if module is files.os else "NamedTemporaryFile"
    monkeypatch.setattr(module, call, failure)
    with pytest.raises(OSError, match=r"space|Read") as caught:
        write_atomically(tmp_path / "record.json", NEW)
    assert caught.value.filename == str(tmp_path / "record.json")


@pytest.mark.parametrize("call", ["fsync", "fchmod"])
def test_files_that_belong_together_stay_the_old_ones_together(call, tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("weights", "config")]
    assert write_together(dict.fromkeys(paths, b"old")) == 6
    real, calls = getattr(os, call), iter(range(5))
    monkeypatch.setattr(files.os, call, lambda *a: no_space() if next(calls) else real(*a))
    with pytest.raises(OSError, match="No space left"):
        write_together(dict.fromkeys(paths, NEW))
    assert [path.read_bytes() for path in paths] == [b"old", b"old"]
    assert sorted(os.listdir(tmp_path)) == ["config", "weights"]


def test_an_interruption_just_after_the_renaming(tmp_path, monkeypatch):
    replace = os.replace

    def then_interrupted(*names):
        replace(*names)
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", then_interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "record.json", NEW)
    assert (tmp_path / "record.json").read_bytes() == NEW
    assert os.listdir(tmp_path) == ["record.json"]


@contextmanager
def files_no_larger_than(size):
    """The kernel refuses longer ones in the middle of a write, as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(("data", "room"), [(NEW, 10_000), (b"new and short", 3)])
def test_a_disk_that_is_full_half_way(data, room, tmp_path):
    """In the middle of a write; or when Python at last writes what it had in a buffer."""
    path = tmp_path / "record.json"
    path.write_bytes(b"old")
    with files_no_larger_than(room), pytest.raises(OSError, match="large") as caught:
        write_atomically(path, data)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["record.json"]


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "no" / "record.json", NEW)
    assert os.listdir(tmp_path) == []


WRITER = """
import sys
from subspan.files import write_atomically
for i in range(10_000):
    write_atomically(sys.argv[1], str(i % 10).encode() * 1_000_000)
"""


def test_killed_at_any_moment(tmp_path):
    """The file is one of the versions, and a half-written one has another name."""
    path = tmp_path / "record.json"
    for delay in (0.0, 0.013, 0.037):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
        while not path.exists():
            assert writer.poll() is None
            time.sleep(0.002)
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        data = path.read_bytes()
        assert len(data) == 1_000_000
        assert data == data[:1] * 1_000_000
        remove_unfinished(path)
        assert os.listdir(tmp_path) == ["record.json"]
        path.unlink()


def test_remove_unfinished_takes_that_of_one_file_only(tmp_path):
    kept = {"a[b].json", "other.tmp", ".other.x1.tmp", ".a[b].json", ".ab.json.x1.tmp"}
    for name in (*kept, ".a[b].json.x1.tmp", ".a[b].json.x2.tmp"):
        (tmp_path / name).write_text("")
    remove_unfinished(tmp_path / "a[b].json")
    assert set(os.listdir(tmp_path)) == kept
