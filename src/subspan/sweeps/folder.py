"""The folder of a sweep, which several sweeps may share, on one machine or on many.

While any sweep is under way, ``.locks/`` in the folder holds

- ``folder``, locked briefly while a sweep joins, leaves or writes ``sweep.json``;
- ``TOKEN.alive`` for each sweep, locked while it lives;
- ``TOKEN.go-on`` for each sweep, until its runs are to stop.

The last sweep to leave removes them. A run is locked in its own folder while it is trained
(:mod:`subspan.training.locks`), also by a person and by processes whose sweep was killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from subspan.errors import SubspanError
from subspan.files import remove_unfinished
from subspan.sweeps.result import SweepRecord
from subspan.training import locks

LOCKS = ".locks"


def _new_token() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


@dataclass(frozen=True)
class SweepFolder:
    """The folder as all processes of one sweep see it, on whichever machine.

    Its path is absolute. The token names this sweep among those that share the folder.
    """

    out: Path
    token: str = field(default_factory=_new_token)

    def run(self, name: str) -> Path:
        """Return the folder of a run."""
        return self.out / "runs" / name

    def is_busy(self, name: str) -> bool:
        """Return whether any process trains this run now."""
        return locks.is_locked(self.run(name) / locks.FILE)

    def is_stopping(self) -> bool:
        """Return whether the runs of this sweep are to save where they are and stop."""
        return not self._sign("go-on").exists()

    def ask_to_stop(self) -> None:
        """Ask the runs of this sweep to save and stop. It works on a full disk, too."""
        self._sign("go-on").unlink(missing_ok=True)

    @contextlib.contextmanager
    def join(
        self, first: SweepRecord, *, overwrite: bool, shown: Path | None = None
    ) -> Iterator[None]:
        """Have a right to the folder, which other sweeps of the same configuration may have, too.

        ``sweep.json`` says at first what it is given. What another configuration left there may be
        replaced to overwrite it. Errors show the folder as the user named it.

        Raises:
            SubspanError: if the folder belongs to another configuration, or a sweep of another one
                is under way there.
        """
        shown = shown or self.out
        with contextlib.ExitStack() as life:
            try:
                with self._exclusively():
                    same = SweepRecord.claim(shown, first.config, overwrite=overwrite)
                    if same is None and self._has_others():
                        raise SubspanError(
                            f"a sweep of another configuration is under way in {shown}: wait "
                            "for its end, or give another --out"
                        )
                    life.enter_context(locks.lock_file(self._sign("alive")))
                    self._sign("go-on").touch()
                    (self.out / "runs").mkdir(exist_ok=True)
                    remove_unfinished(self.out / SweepRecord.FILE)  # nobody else writes it now
                    first.write(self.out)
                yield
            finally:
                with contextlib.suppress(OSError), self._exclusively():
                    self.ask_to_stop()
                    self._sign("alive").unlink(missing_ok=True)
                    if not self._has_others():
                        shutil.rmtree(self.out / LOCKS, ignore_errors=True)

    def write(self, result: SweepRecord) -> None:
        """Bring ``sweep.json`` up to date, unless another sweep has completed it meanwhile."""
        with self._exclusively():
            before = None
            if result.status != "complete":
                with contextlib.suppress(SubspanError):  # damaged meanwhile: it is written anew
                    before = SweepRecord.read(self.out)
            if before is None or before.status != "complete":
                result.write(self.out)

    def _sign(self, kind: str) -> Path:
        return self.out / LOCKS / f"{self.token}.{kind}"

    def _has_others(self) -> bool:
        """Return whether another sweep lives; to be called exclusively."""
        signs = (self.out / LOCKS).glob("*.alive")
        return any(locks.is_locked(sign) for sign in signs if sign != self._sign("alive"))

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Hold the lock of all sweeps; try again if the last sweep to leave has just removed it."""
        while True:
            (self.out / LOCKS).mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as lock:
                try:
                    lock.enter_context(locks.lock_file(self.out / LOCKS / "folder", wait=True))
                except FileNotFoundError:
                    continue
                yield
                return
