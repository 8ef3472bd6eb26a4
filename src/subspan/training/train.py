"""One training run: a task, a method; a checkpoint and a record on disk.

Choices look at the validation part only; the test set is read once, at the end.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from subspan.errors import SubspanError
from subspan.training import state, trackers
from subspan.training.config import Run
from subspan.training.devices import accelerate_aside, accelerator
from subspan.training.folder import RunFolder
from subspan.training.locks import lock_folder
from subspan.training.loop import Loop, Report
from subspan.training.prepare import prepare
from subspan.training.records import CompleteRun, RunRecord
from subspan.training.resume import find_state
from subspan.training.schema import fitting
from subspan.training.score import Score
from subspan.training.stop import Stop


def completed(
    run: Run, out: str | os.PathLike[str], *, overwrite: bool = False
) -> CompleteRun | None:
    """Return the record of a run that is complete in a folder, if it is, as :func:`train` does."""
    out, run = Path(out), fitting(Run, run, "run")
    found = RunRecord.claim(out, run.as_dict(), overwrite=overwrite)
    model = RunFolder(out, writes=False).model
    if model.exists() and not (out / RunRecord.FILE).exists() and not overwrite:
        raise SubspanError(
            f"{model} is there without a record of its training: give another --out, or --overwrite"
        )
    return found if isinstance(found, CompleteRun) and model.is_file() else None


def train(
    run: Run,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    report: Report | None = None,
    on_step: Callable[[], None] | None = None,
    on_start: Callable[[int, int, Score], None] | None = None,
    stop: Stop | None = None,
    log: Sequence[str] = (),
) -> CompleteRun:
    """Train, and leave ``model.safetensors`` (the best epoch) and ``record.json`` in a folder.

    After every epoch ``best.safetensors`` and ``last.safetensors`` are there, too, and
    ``state.pt``: from there an interrupted run goes on when it is started again, and ends with the
    same bits as one that was not. SIGINT and SIGTERM save the state after the step that is under
    way; a second one does not wait. A run that is complete in this folder is not repeated.

    The caller's generators, and accelerate's state, are afterwards as they were. In one process
    there is one training at a time: one of another thread waits for its end.

    Args:
        run: what to do.
        out: output folder; made if it is not there.
        overwrite: replace what another configuration left there.
        report: called with each epoch's row of the history.
        on_step: called after each step; it must not draw from generators that the training has.
        on_start: called before the first step with the number of steps, and how many of them were
            made before, and the task's score.
        stop: the request to stop of a larger program; by default signals are taken here.
        log: trackers that are told every epoch (:mod:`subspan.training.trackers`).

    Returns:
        The record.

    Raises:
        SubspanError: for bad input, and if another process trains in this folder, with nothing
            written; and for a loss that stops being finite, with the record saying so and the last
            good state kept.
        Stopped: after a signal, or when asked to stop.
    """
    out = Path(out)
    trackers.check(log)
    if found := completed(run, out, overwrite=overwrite):
        return found
    with state.aside(), accelerate_aside(), torch.inference_mode(False):  # with gradients
        ready = prepare(run)
        devices = accelerator(run.training, log_with=list(log) or None, project_dir=out)
        with lock_folder(out) if devices.is_main_process else contextlib.nullcontext():
            if found := completed(run, out, overwrite=overwrite):  # meanwhile, by another process
                return found
            begun = RunRecord.claim(out, run.as_dict(), overwrite=overwrite)
            before = find_state(run.as_dict(), out) if begun else None
            loop = Loop(ready, devices, out, before, report, on_step, stop)
            loop.open()
            return _finish(loop, on_start)


def _finish(loop: Loop, on_start: Callable[[int, int, Score], None] | None) -> CompleteRun:
    """Do all that is left of a training; its record."""
    try:
        if on_start:
            on_start(loop.total, loop.progress.done, loop.score)
        loop.log.begin(loop.record.config, loop.record.history)
        with loop.stop:
            loop.fit()
        loop.finish()
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        if loop.stop.requested and not interrupted and not loop.accelerator.is_main_process:
            # What went wrong is that the main process has stopped, and answers no more.
            raise loop.stop.error("with the first process") from error
        said = "" if isinstance(error, SystemExit) else str(error)  # which is a number
        with contextlib.suppress(OSError):  # on a full disk the record cannot say that it is full
            loop.write("interrupted" if interrupted else "failed", error=said or repr(error))
        raise
    finally:
        loop.log.end()
    assert isinstance(loop.record, CompleteRun)
    return loop.record
