"""Several sweeps in one folder at once, on one machine or on many that share its file system.

While any sweep is under way, ``.locks/`` in the output folder holds

- ``folder``, locked for moments by whoever asks whose the folder is, or writes ``sweep.json``;
- ``runs/NAME``, locked by the process that trains this run;
- ``sweeps/TOKEN/``, of each sweep: ``alive`` is locked while it lives, ``go-on`` is there until its
  runs are to stop, and ``begun-NAME`` while one of its processes is busy with this run.

The locks die with their process (:mod:`subspan.training.locks`). The last sweep to leave removes
all of them. What trains a run without such a lock is noticed by the run's own: one that a person
started, or processes of torchrun whose parent was killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from subspan.errors import SubspanError
from subspan.files import remove_unfinished
from subspan.sweeps.result import SweepRecord
from subspan.training.locks import held, trained_in

FOLDER = ".locks"


@dataclass(frozen=True)
class Place:
    """Where the processes of one sweep find its runs and its locks, on whichever machine."""

    out: Path
    token: str

    @property
    def locks(self) -> Path:
        """The folder of all sweeps' locks."""
        return self.out / FOLDER

    @property
    def own(self) -> Path:
        """The folder of this sweep's own signs."""
        return self.locks / "sweeps" / self.token

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.out / "runs" / name

    @property
    def stopping(self) -> bool:
        """Whether the runs of this sweep are to save where they are and end."""
        return not (self.own / "go-on").exists()

    def begun(self, name: str) -> bool:
        """Whether a process of this sweep began this run and has not come to the end of it."""
        return self._mark(name).exists()

    def is_free(self, name: str) -> bool:
        """Whether no process, of any sweep, has this run under way."""
        with held(self.locks / "runs" / name) as free:
            return free and not trained_in(self.run(name))

    @contextlib.contextmanager
    def busy_with(self, name: str) -> Iterator[bool]:
        """Hold a run while it is trained; False if another process has it."""
        with held(self.locks / "runs" / name) as free:
            if not free:
                yield False
                return
            self._mark(name).touch()
            try:
                yield True
            finally:  # which a process that is killed does not come to
                self._mark(name).unlink(missing_ok=True)

    def _mark(self, name: str) -> Path:
        return self.own / f"begun-{name}"


class Claim:
    """A sweep's right to its folder, as a context; others of its configuration may have it, too.

    Args:
        out: the folder.
        first: what ``sweep.json`` is to say from now on.
        overwrite: whether what another configuration left there may be replaced.

    Raises:
        SubspanError: if the folder belongs to another configuration, or a sweep of another one is
            at work there.
    """

    def __init__(self, out: Path, first: SweepRecord, *, overwrite: bool) -> None:
        self.first, self.overwrite = first, overwrite
        token = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.place = Place(out.absolute(), token)  # the processes of a run may be anywhere
        self.out = out
        self._folder = FileLock(self.place.locks / "folder", thread_local=False)
        self._alive = FileLock(self.place.own / "alive", thread_local=False)

    def check(self) -> None:
        """Refuse a folder that is another configuration's; nothing is written."""
        SweepRecord.claim(self.out, self.first.config, overwrite=self.overwrite)

    def __enter__(self) -> Claim:
        self.check()
        try:
            with self._alone():
                self._enter()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _enter(self) -> None:
        same = SweepRecord.claim(self.out, self.first.config, overwrite=self.overwrite)
        if same is None and self._others():
            raise SubspanError(
                f"a sweep of another configuration is under way in {self.out}: wait for its end, "
                "or give another --out"
            )
        (self.place.locks / "runs").mkdir(exist_ok=True)
        self.place.own.mkdir(parents=True)
        self._alive.acquire()
        (self.place.own / "go-on").touch()
        (self.out / "runs").mkdir(exist_ok=True)
        remove_unfinished(self.out / SweepRecord.FILE)  # with this lock, nobody is writing it
        self.first.write(self.out)

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError), self._alone():
            self._alive.release()
            shutil.rmtree(self.place.own, ignore_errors=True)
            if not self._others():
                shutil.rmtree(self.place.locks, ignore_errors=True)

    def write(self, result: SweepRecord) -> None:
        """Bring ``sweep.json`` up to date, unless another sweep has completed it meanwhile."""
        with self._alone():
            there = None
            if result.status != "complete":
                with contextlib.suppress(SubspanError):  # damaged meanwhile: it is written anew
                    there = SweepRecord.read(self.out)
            if there is None or there.status != "complete":
                result.write(self.out)

    def ask_to_stop(self) -> None:
        """Let the runs under way save where they are and end; works on a full disk, too."""
        (self.place.own / "go-on").unlink(missing_ok=True)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """With the folder's lock, whose file may just have been removed by the last that left."""
        while True:
            self.place.locks.mkdir(parents=True, exist_ok=True)
            try:
                self._folder.acquire()
            except FileNotFoundError:
                continue
            break
        try:
            yield
        finally:
            self._folder.release()

    def _others(self) -> bool:
        """Whether another sweep lives; what dead ones left is removed."""
        living = False
        for folder in (self.place.locks / "sweeps").glob("*"):
            if folder == self.place.own:
                continue
            with held(folder / "alive") as free:
                living = living or not free
            if free:
                shutil.rmtree(folder, ignore_errors=True)
        return living
