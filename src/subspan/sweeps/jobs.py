"""One run of a sweep, in whichever process it is given to."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from subspan.cache import cache
from subspan.errors import Stopped, SubspanError
from subspan.families import stored
from subspan.sweeps.claims import Place
from subspan.training.config import Run
from subspan.training.locks import BusyError, refuse_if_trained_in
from subspan.training.records import CompleteRun
from subspan.training.train import completed, train

LOOK_EVERY = 0.5  # seconds between looks whether the sweep is to stop
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Job:
    """One run of a sweep and its folder's name."""

    name: str
    run: Run


@dataclass(frozen=True)
class Pending:
    """Why a run has come to no outcome yet.

    Args:
        why: another process has it under way; it saved where it is, after a signal or since its
            sweep stops; its process died; the process was to do it died before; the disk is full.
        number: of the signal, or of the error.
    """

    why: Literal["elsewhere", "stopped", "killed", "not begun", "full"]
    number: int = 0


Outcome = tuple[Job, CompleteRun | str]
"""A run that has ended: its record, or a sentence on what went wrong."""


def perform(
    job: Job, place: Place, *, overwrite: bool, processes: int, apart: bool, log: Sequence[str]
) -> tuple[Job, CompleteRun | str | Pending]:
    """Train one run; nothing that it raises may stop the others.

    Args:
        job: which one.
        place: of its sweep.
        overwrite: as of :func:`subspan.training.train.train`.
        processes: of this run.
        apart: whether this process is another than the sweep's.
        log: as of :func:`subspan.training.train.train`.
    """
    if apart and _in_main_thread():
        # Ctrl-C reaches all processes of a terminal. What it means is for the sweep's own to say.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if place.stopping:
        return job, Pending("stopped")
    try:
        with place.busy_with(job.name) as free:
            if not free:
                return job, Pending("elsewhere")
            with _no_sudden_end(apart):
                return job, _outcome(job, place, overwrite, processes, log)
    except OSError as error:  # of the locks
        return job, _failure(error)
    finally:  # or the next run in this process would count it as its own
        stored.forget()
        cache.clear()


def _outcome(
    job: Job, place: Place, overwrite: bool, processes: int, log: Sequence[str]
) -> CompleteRun | str | Pending:
    folder = place.run(job.name)
    try:
        if processes > 1:
            return _together(job.run, folder, overwrite, processes, place, log)
        return train(job.run, folder, overwrite=overwrite, asked_to_stop=_Watch(place), log=log)
    except Stopped as stopped:
        return Pending("stopped", stopped.signal)
    except BusyError:
        return Pending("elsewhere")
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> str | Pending:
    """What to say of a run that failed; a full disk is no fault of the run."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in FULL:
            return Pending("full", cause.errno)
        cause = cause.__cause__ or cause.__context__
    return str(error) if isinstance(error, SubspanError) else f"{type(error).__name__}: {error}"


class _Watch:
    """Says after each step whether the sweep is to stop; it looks now and then only."""

    def __init__(self, place: Place) -> None:
        self.place, self.due, self.stopping = place, 0.0, False

    def __call__(self) -> bool:
        now = time.monotonic()
        if not self.stopping and now >= self.due:
            self.due = now + LOOK_EVERY
            self.stopping = self.place.stopping
        return self.stopping


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def _no_sudden_end(apart: bool) -> Iterator[None]:
    """Ignore SIGTERM where the training itself does not listen, as while it loads its data.

    One that went to all processes has gone to the sweep's own, too, which tells this one. If this
    process ended at once, the others of the pool would be killed, in the middle of saving.
    """
    if not (apart and _in_main_thread()):
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _together(
    run: Run, folder: Path, overwrite: bool, processes: int, place: Place, log: Sequence[str]
) -> CompleteRun:
    """One run in several processes, as a person would start it."""
    refuse_if_trained_in(folder)
    settings = run.as_dict()
    settings |= settings.pop("options") | {"log": list(log) or None}
    with tempfile.TemporaryDirectory() as temporary:
        file, said = Path(temporary) / "run.yaml", Path(temporary) / "said"
        file.write_text(json.dumps(settings))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [f"--nproc-per-node={processes}", "-m", "subspan.cli", "train"]
        options = ["--config", str(file), "--out", str(folder)] + ["--overwrite"] * overwrite
        with said.open("w") as errors:
            stopped = _wait(
                subprocess.Popen(
                    [*launch, *command, *options],
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    start_new_session=True,  # a terminal's Ctrl-C is the sweep's to pass on
                ),
                place,
            )
        lines = said.read_text(errors="replace").splitlines()
    record = completed(run, folder)
    if record is not None:
        return record
    if stopped:
        raise Stopped("stopped with its sweep", signal.SIGTERM)
    refuse_if_trained_in(folder)  # by others, who had begun to begin
    reasons = [line for line in lines if line.startswith("subspan train:")] or lines[-1:]
    reason = (reasons or ["no word of why"])[0]
    for number in FULL:
        if os.strerror(number) in reason:
            raise OSError(number, os.strerror(number))
    raise SubspanError(reason)


def _wait(process: subprocess.Popen[bytes], place: Place) -> bool:
    """Wait for the processes of a run; says whether they were told to stop."""
    told = False
    try:
        while True:
            try:
                process.wait(LOOK_EVERY)
                return told
            except subprocess.TimeoutExpired:
                if not told and place.stopping:
                    told = True
                    process.terminate()  # torchrun passes it on
    except BaseException:
        # Torchrun's processes are in sessions of their own, and would train on without it.
        family = list[psutil.Process]()
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        raise
