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
from subspan.errors import SubspanError
from subspan.files import refuse_what_is_no_file as refuse_early
from subspan.files import remove_unfinished, write_atomically, write_together

NEW = b"new" * 10_000


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "record.json"
    assert write_atomically(path, b"old") == 3
    assert write_atomically(str(path), NEW) == len(NEW)
    assert path.read_bytes() == NEW
    assert os.listdir(tmp_path) == ["record.json"]


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    link, file = tmp_path / "latest.json", tmp_path / "disk" / "one.json"
    link.symlink_to("disk/one.json")
    for data in (b"old", NEW):  # also where it leads to nothing yet
        assert write_atomically(link, data) == len(data)
        assert link.is_symlink()
        assert file.read_bytes() == data
    (tmp_path / "disk" / ".one.json.x1.tmp").touch()
    remove_unfinished(link)
    assert os.listdir(tmp_path / "disk") == ["one.json"]


def test_permissions_are_those_of_the_file_or_of_new_ones(tmp_path):
    path = tmp_path / "record.json"
    before = os.umask(0o077)
    try:
        write_atomically(path, b"old")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    write_atomically(path, NEW)
    assert path.stat().st_mode & 0o777 == 0o640


def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link, tmp_path):
        for write in (lambda p: write_together({tmp_path / "a": b"", p: b""}), refuse_early):
            with pytest.raises(SubspanError, match=f"{path.name} cannot be a file"):
                write(path)
    assert pipe.is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_a_protected_file_stays(tmp_path, monkeypatch):
    """Whoever may write to its folder could rename another one to it."""
    path = tmp_path / "record.json"
    path.write_bytes(b"old")
    path.chmod(0o444)
    monkeypatch.setattr(files.os, "access", lambda name, _: os.stat(name).st_mode & 0o200)  # root
    for write in (lambda p: write_atomically(p, NEW), refuse_early):
        with pytest.raises(PermissionError, match=r"record\.json"):
            write(path)
    assert path.read_bytes() == b"old"
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


@pytest.mark.parametrize(("owner", "call"), [(files.os, "replace"), (files.Path, "open")])
@pytest.mark.parametrize("failure", [no_space, read_only])
def test_an_error_names_the_file_and_no_hidden_one(owner, call, failure, tmp_path, monkeypatch):
    monkeypatch.setattr(owner, call, failure)
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


@pytest.mark.heavy
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
