"""One training run: a task, a method; a checkpoint and a record on disk.

Choices look at the validation part only; the test set is read once, at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subspan.errors import SubspanError
from subspan.subspace import init
from subspan.training import nets, records, state, tasks, trackers
from subspan.training.config import Run
from subspan.training.locks import lock_folder
from subspan.training.loop import Loop, Prepared, Report, accelerator, on_cpu
from subspan.training.methods import method
from subspan.training.score import Score
from subspan.training.stop import Stop


def prepare(run: Run) -> Prepared:
    """Load the task, build and wrap its network.

    Raises:
        SubspanError: for whatever cannot be run as asked.
    """
    how = method(run.method)
    how.check(run.options)
    training = run.training
    if training.device == "cuda" and not torch.cuda.is_available():
        raise SubspanError("device cuda: PyTorch sees no CUDA device here; use cpu or auto")
    if training.mixed_precision == "fp16":
        if on_cpu(training):
            raise SubspanError("mixed_precision fp16 needs a GPU: use bf16, or no")
        if how.evaluates:
            raise SubspanError(
                f"a step of {run.method} evaluates the loss itself, which fp16's scaled gradients "
                "do not allow: use bf16, or no"
            )
    task = tasks.load(training, run.seed)
    known = training.task is None and nets.is_builtin(str(training.net))
    own = training.init == "own" or (training.init == "auto" and not known)
    init_seed = None if own else run.seed

    def make() -> nn.Module:
        return tasks.draw(task, run.seed)

    net = make() if init_seed is None else init.build(make, init_seed)
    task.check(net)
    for name, tensor in net.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise SubspanError(f"{name} of the network is not finite before the first step")
    model = how.wrap(net, run.seed, run.options)
    if init_seed is not None and hasattr(model, "init_seed"):
        # The checkpoint then holds no θ₀ and needs none.
        model.init_seed = init_seed  # type: ignore[assignment]
    return Prepared(run, task, how, model, init_seed)


def completed(run: Run, out: Path, *, overwrite: bool = False) -> dict[str, Any] | None:
    """The record of a run that is complete in a folder, if it is.

    Raises:
        SubspanError: if the folder holds something else (see :func:`train`).
    """
    found = records.claim(out, "record.json", run.as_dict(), overwrite=overwrite)
    model = out / "model.safetensors"
    if model.exists() and not (out / "record.json").exists() and not overwrite:
        raise SubspanError(
            f"{model} is there without a record of its training: give another --out, or --overwrite"
        )
    if not found or found["status"] != "complete" or not model.is_file():
        return None
    damage = records.damage(found)
    if damage and not overwrite:
        raise SubspanError(
            f"{out / 'record.json'} is damaged: {damage}; restore it, or give --overwrite to train "
            "again"
        )
    return None if damage else found


def train(
    run: Run,
    out: Path,
    *,
    overwrite: bool = False,
    report: Report | None = None,
    on_step: Callable[[], None] | None = None,
    on_start: Callable[[int, int, Score], None] | None = None,
    stop: Stop | None = None,
    log: Sequence[str] = (),
) -> dict[str, Any]:
    """Train, and leave ``model.safetensors`` (the best epoch) and ``record.json`` in a folder.

    After every epoch ``best.safetensors`` and ``last.safetensors`` are there, too, and
    ``state.pt``: from there an interrupted run goes on when it is started again, and ends with the
    same bits as one that was not. SIGINT and SIGTERM save the state after the step that is under
    way; a second one does not wait. A run that is complete in this folder is not repeated.

    Args:
        run: what to do.
        out: output folder; made if it is not there.
        overwrite: replace what another configuration left there.
        report: called with each epoch's row of the history.
        on_step: called after each step.
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
    trackers.check(log)
    if found := completed(run, out, overwrite=overwrite):
        return found
    ready = prepare(run)
    devices = accelerator(run.training, log_with=list(log) or None, project_dir=out)
    with lock_folder(out) if devices.is_main_process else contextlib.nullcontext():
        if found := completed(run, out, overwrite=overwrite):  # meanwhile, by another process
            return found
        before = records.claim(out, "record.json", run.as_dict(), overwrite=overwrite)
        where = _where(run, out) if before else None
        loop = Loop(ready, devices, out, where, report, on_step, stop)
        loop.open()
        if on_start:
            on_start(loop.steps * run.training.epochs, loop.done, loop.score)
        return _trained(loop)


def _trained(loop: Loop) -> dict[str, Any]:
    """All that is left of a training, and its record."""
    try:
        loop.log.begin(loop.ready.run.as_dict(), loop.record["history"])
        with loop.stop:
            loop.fit()
        loop.finish()
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        if loop.stop.requested and not interrupted and not loop.accelerator.is_main_process:
            # What went wrong is that the main process has stopped, and answers no more.
            raise loop.stop.error("with the first process") from error
        with contextlib.suppress(OSError):  # on a full disk the record cannot say that it is full
            loop.write("interrupted" if interrupted else "failed", error=str(error) or repr(error))
        raise
    finally:
        loop.log.end()
    return loop.record


def _where(run: Run, out: Path) -> dict[str, Any] | None:
    """Where an earlier training of this run stands, if that can be told."""
    found = state.read(out / state.FILE)
    # A file of another run is there if that one was just being replaced when all ended.
    same = found is not None and not records.differences(found["config"], run.as_dict())
    return found if same else None
