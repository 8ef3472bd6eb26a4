"""One training run: a network, a data set, a method; a checkpoint and a record on disk.

The loop is accelerate's: CPU or GPU, mixed precision, one process or many (``torchrun``,
``accelerate launch``). Choices look at the validation part only; the test set is read
once, at the end.
"""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

from subspan import checkpoint, distributed, init
from subspan.errors import Stopped, SubspanError
from subspan.files import remove_unfinished
from subspan.lab import data, nets, records, state, trackers
from subspan.lab.config import Run, Training
from subspan.lab.evaluate import draw, evaluate
from subspan.lab.methods import Method, method

CHECK_EVERY = 50  # steps between looks at the loss, each of which waits for the device
SAVE_EVERY = 300.0  # seconds between states within an epoch

Report = Callable[[dict[str, Any]], None]


@dataclass
class Prepared:
    """Everything that a run needs, checked, with nothing written yet."""

    run: Run
    data: data.ImageData
    method: Method
    model: nn.Module
    init_seed: int | None


def prepare(run: Run) -> Prepared:
    """Load the data, build and wrap the network.

    Raises:
        SubspanError: for whatever cannot be run as asked.
    """
    how = method(run.method)
    how.check(run.options)
    training = run.training
    if training.device == "cuda" and not torch.cuda.is_available():
        raise SubspanError("device cuda: PyTorch sees no CUDA device here; use cpu or auto")
    images = data.load(
        training.data, validation=training.validation, seed=run.seed, **training.decoding
    )
    own = training.init == "own" or (training.init == "auto" and not nets.is_builtin(training.net))
    init_seed = None if own else run.seed

    def make() -> nn.Module:
        return draw(training.net, images.image_shape, images.classes, run.seed)

    net = make() if init_seed is None else init.build(make, init_seed)
    _check_output(net, images)
    model = how.wrap(net, run.seed, run.options)
    if init_seed is not None and hasattr(model, "init_seed"):
        # The checkpoint then holds no θ₀ and needs none.
        model.init_seed = init_seed  # type: ignore[assignment]
    return Prepared(run, images, how, model, init_seed)


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
    return found if found and found["status"] == "complete" and model.is_file() else None


def train(
    run: Run, out: Path, *, overwrite: bool = False, report: Report | None = None,
    on_step: Callable[[], None] | None = None,
    on_start: Callable[[int, int], None] | None = None, log: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
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
            made before.
        log: trackers that are told every epoch (:mod:`subspan.lab.trackers`).

    Returns:
        The record.

    Raises:
        SubspanError: for bad input, with nothing written; and for a loss that stops being finite,
            with the record saying so and the last good state kept.
        Stopped: after a signal.
    """
    trackers.check(log)
    if found := completed(run, out, overwrite=overwrite):
        return found
    before = records.claim(out, "record.json", run.as_dict(), overwrite=overwrite)
    where = _where(run, out) if before else None
    ready = prepare(run)
    accelerator = _accelerator(run.training, log_with=list(log) or None, project_dir=out)
    loop = _Loop(ready, accelerator, out, where, report, on_step)
    loop.open()
    if on_start:
        on_start(loop.steps * run.training.epochs, loop.done)
    try:
        loop.log.begin(run.as_dict(), loop.record["history"])
        with loop.signals:
            loop.fit()
        loop.finish()
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        if loop.signals.seen and not interrupted:  # the main process has stopped
            raise Stopped("stopped with the first process", loop.signals.seen) from error
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


class _Signals:
    """Remembers the first SIGINT or SIGTERM; the second has the usual effect at once."""

    def __init__(self) -> None:
        self.seen = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # others cannot have handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: object) -> None:
        if self.seen:
            raise Stopped("stopped in the middle of a step", number)
        self.seen = number


class _Loop:
    """The state of a run: the model, what has been measured so far, and the files."""

    def __init__(
        self, ready: Prepared, accelerator: Accelerator, out: Path,
        where: dict[str, Any] | None, report: Report | None, on_step: Callable[[], None] | None,
    ) -> None:  # fmt: skip
        self.ready, self.accelerator, self.out, self.where = ready, accelerator, out, where
        self.signals = _Signals()
        self.report, self.on_step = report, on_step
        self.log = trackers.Log(accelerator, out, where.get("log") if where else None)
        self.training = ready.run.training
        device = accelerator.device
        self.memory = records.PeakMemory(device)
        self.started = time.perf_counter() - (where["seconds_total"] if where else 0.0)
        self.images = ready.data.to(device)
        if self.training.batch_size % accelerator.num_processes:
            raise SubspanError(
                f"batch_size must be a multiple of the {accelerator.num_processes} processes, got "
                f"{self.training.batch_size}"
            )
        notes = self.notes()
        self.steps = data.steps_per_epoch(self.images.train, self.training.batch_size)
        # The layers that there were; their values come when a journal has been read from θ₀ on.
        model = checkpoint.arranged(ready.model, where["header"]) if where else ready.model
        self.model = model.to(device)
        total = self.steps * self.training.epochs
        begun_with = self.extra() | {"init_seed": ready.init_seed}
        optimizer = self.bare = ready.method.optimizer(
            self.model, ready.run, out, begun_with, steps=total,
            resume=where["done"] if where else None,
        )  # fmt: skip
        # Where nothing is scaled, accelerate's wrappers only look for packages, at every step.
        scaled = accelerator.scaler is not None
        self.optimizer = accelerator.prepare_optimizer(optimizer) if scaled else optimizer
        self.backward = accelerator.backward if scaled else Tensor.backward
        self.wrapped = self.distributed()
        self.schedule = schedule(optimizer, self.training.schedule, ready.run.lr, total)
        self.done = 0  # steps
        self.best_accuracy, self.best_epoch = -1.0, 0
        self.sent: list[float] = []  # bytes per step and process, epoch by epoch
        # Of the epoch that is under way.
        self.within: dict[str, Any] = {
            "total": torch.zeros((), device=device), "seen": 0, "seconds": 0.0, "lr": 0.0
        }  # fmt: skip
        if where:
            checkpoint.restore(self.model, where["tensors"])
            optimizer.load_state_dict(where["optimizer"])
            self.schedule.load_state_dict(where["schedule"])
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(where["scaler"])
            self.best_accuracy, self.best_epoch = where["best_accuracy"], where["best_epoch"]
            self.sent, self.done = where["sent"], where["done"]
            self.within = where["within"] | {"total": where["within"]["total"].to(device)}
        self.saved = time.perf_counter()
        self.record: dict[str, Any] = {
            "format": records.FORMAT,
            "status": "running",
            "config": ready.run.as_dict(),
            "test_accuracy": None,
            "val_accuracy": None,
            "best_epoch": None,
            **ready.method.counts(self.model),
            "checkpoint_bytes": None,
            "seconds_total": 0.0,
            "seconds_per_step": None,
            "peak_memory_bytes": None,
            "bytes_sent_per_step": None,
            "history": where["history"] if where else [],
            "processes": accelerator.num_processes,
            "device": records.device_name(device),
            "versions": records.versions(),
            "notes": notes,
            "error": None,
        }

    def notes(self) -> list[str]:
        """What readers should know of the data, and of processes that came or went.

        Raises:
            SubspanError: if other processes than before would make it another run.
        """
        if not self.where:
            return list(self.ready.data.notes)
        notes = list(self.where.get("notes", self.ready.data.notes))
        before, now = self.where.get("processes", 1), self.accelerator.num_processes
        if before != now:
            if self.ready.method.needs_processes(self.ready.run.options):
                raise SubspanError(
                    f"{self.out} was begun in {before} processes, and what they find depends on "
                    f"their number, got {now}: go on in {before}"
                )
            notes.append(f"processes: {before} up to step {self.where['done']:,}, then {now}")
        return notes

    def distributed(self) -> nn.Module:
        """The model with accelerate's wrappers: of mixed precision, of DDP."""
        # "Evaluation" is accelerate's word for all but DDP.
        wrapped: nn.Module = self.accelerator.prepare_model(
            self.model, evaluation_mode=not self.ready.method.averages_gradients
        )
        return wrapped

    def open(self) -> None:
        """Make the folder, say in it that the run is running, and clear away what is another's."""
        if self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.out / "record.json")
        self.write("running")
        if self.accelerator.is_main_process:
            names = {f"{name}.safetensors" for name in ("best", "last", "model")} | {state.FILE}
            for name in names:
                remove_unfinished(self.out / name)
                if not self.where:
                    (self.out / name).unlink(missing_ok=True)

    def fit(self) -> None:
        """All epochs, or as many as patience allows."""
        if self.where:
            state.set_generators(self.where["generators"])
        else:
            set_seed(self.ready.run.seed % (1 << 32))  # of what the network draws, as dropout does
        for epoch in range(len(self.record["history"]) + 1, self.training.epochs + 1):
            # Choices are the first process's, so that all stop together.
            [row] = broadcast_object_list([self.epoch(epoch)])
            self.record["history"].append(row)
            self.save("last.safetensors")
            ready = self.ready.method.ready(self.model, self.bare, self.ready.run)
            if ready and row["val_accuracy"] > self.best_accuracy:
                self.best_accuracy, self.best_epoch = row["val_accuracy"], epoch
                self.save("best.safetensors")
            self.write("running")
            if self.report:
                self.report(row)
            self.log.epoch(row)
            patience = self.training.patience
            if ready and patience is not None and epoch - self.best_epoch >= patience:
                break
            if epoch < self.training.epochs:
                self.change()
            self.save_state()
            if self.stopping and epoch < self.training.epochs:
                self.stop()

    def change(self) -> None:
        """What a method changes between two epochs."""
        method, run, history = self.ready.method, self.ready.run, self.record["history"]
        model = method.after_epoch(self.model, self.bare, run, history)
        if model is not None:
            self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
            self.model = model
            self.wrapped = self.distributed()
            # The schedule begins again, over the epochs that are left.
            for group in self.bare.param_groups:
                group["lr"] = run.lr
                group.pop("initial_lr", None)
            left = (self.training.epochs - len(history)) * self.steps
            self.schedule = schedule(self.bare, self.training.schedule, run.lr, left)

    def epoch(self, epoch: int) -> dict[str, Any]:
        """One pass over the training part and a look at the validation part."""
        accelerator, training = self.accelerator, self.training
        self.wrapped.train()
        if not self.within["seen"]:
            self.within["lr"] = self.schedule.get_last_lr()[0]
        total, seen = self.within["total"], self.within["seen"]
        started = time.perf_counter() - self.within["seconds"]
        sent = records.bytes_sent()
        batches = data.batches(
            self.images.train, training.batch_size, seed=self.ready.run.seed, epoch=epoch,
            rank=accelerator.process_index, world=accelerator.num_processes,
        )  # fmt: skip
        train_loss = math.nan
        for step, (images, labels) in enumerate(batches, start=1):
            if (epoch - 1) * self.steps + step <= self.done:
                continue
            size = min(
                training.batch_size, len(self.images.train) - (step - 1) * training.batch_size
            )
            share = size / accelerator.num_processes
            loss = self.step(images, labels, share)
            total, seen = total + loss.detach() * share, seen + share
            if step % CHECK_EVERY == 0 or step == self.steps:
                train_loss = self.finite(total / seen, epoch)
            self.done += 1
            if self.on_step:
                self.on_step()
            due = time.perf_counter() - self.saved > SAVE_EVERY
            if step < self.steps and (due or self.stopping):
                seconds = time.perf_counter() - started
                self.within |= {"total": total, "seen": seen, "seconds": seconds}
                self.save_state()
                if self.stopping:
                    self.stop()
        seconds, lr = time.perf_counter() - started, self.within["lr"]
        self.within = {"total": torch.zeros_like(total), "seen": 0, "seconds": 0.0, "lr": lr}
        if accelerator.num_processes > 1:
            own = torch.tensor((records.bytes_sent() - sent) / self.steps)
            self.sent.append(float(accelerator.reduce(own.to(accelerator.device), "mean")))
        more = self.ready.method.diagnose(self.model, self.bare)
        val_loss, val_accuracy = evaluate(self.model, self.images, self.images.validation)
        return {
            "epoch": epoch,
            "train_loss": train_loss,
            "val_loss": self.finite(total.new_tensor(val_loss), epoch),
            "val_accuracy": val_accuracy,
            "learning_rate": lr,
            "seconds": seconds,
            **more,
        }

    def step(self, images: Tensor, labels: Tensor, share: float) -> Tensor:
        """One step of the optimizer and of the schedule.

        ``share`` is the joint batch's size over the number of processes. Their gradients are
        averaged: divided by it, what an unequal part sums up counts every sample alike.
        """

        def loss() -> Tensor:
            with self.accelerator.autocast():
                scores = self.wrapped(self.images.normalize(images))
                if share == len(labels):
                    return cross_entropy(scores, labels)
                total = cross_entropy(scores, labels, ignore_index=data.FILL, reduction="sum")
                return total / share

        value = self.ready.method.step(self.optimizer, loss, self.backward)
        self.schedule.step()
        return value

    def finite(self, loss: Tensor, epoch: int) -> float:
        """The mean of a loss over the processes; an error if it is not a number."""
        mean = float(self.accelerator.reduce(loss, "mean"))
        if not math.isfinite(mean):
            kept = f"; best.safetensors holds epoch {self.best_epoch}" if self.best_epoch else ""
            # From there it would come to the same end.
            if self.accelerator.is_main_process:
                (self.out / state.FILE).unlink(missing_ok=True)
            raise SubspanError(
                f"the loss stopped being finite in epoch {epoch}: lower --lr {self.ready.run.lr:g}"
                + kept
            )
        return mean

    def finish(self) -> None:
        """Go back to the best epoch, read the test set once, and write what was found."""
        self.accelerator.wait_for_everyone()
        best = self.out / "best.safetensors"
        if not best.exists():  # it got its last name, and then all ended
            best = self.out / "model.safetensors"
        _, tensors = checkpoint.read(best)
        checkpoint.restore(self.model, tensors)
        # In full precision, as everyone who loads the file will.
        net = self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        _, accuracy = evaluate(net, self.images, self.images.test)
        self.record |= {"test_accuracy": accuracy} | self.ready.method.counts(self.model)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            best.replace(self.out / "model.safetensors")
            (self.out / "last.safetensors").unlink(missing_ok=True)
            self.record["checkpoint_bytes"] = (self.out / "model.safetensors").stat().st_size
        self.write("complete")
        if self.accelerator.is_main_process:
            (self.out / state.FILE).unlink(missing_ok=True)
        self.log.score(self.record)
        # The others read the record rather than be sent it: Gloo's thread may still hold what was
        # sent last when Python ends, and aborts the process then. A barrier holds nothing.
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            self.record = records.read_json(self.out / "record.json") or self.record

    def save(self, name: str) -> None:
        """The model's checkpoint, from the main process."""
        if self.accelerator.is_main_process:
            checkpoint.save(self.model, self.out / name, extra=self.extra())

    def save_state(self) -> None:
        """Everything that what follows depends on, from the main process."""
        self.saved = time.perf_counter()
        if not self.accelerator.is_main_process:
            return
        header, tensors = checkpoint.contents(self.model)
        scaler = self.accelerator.scaler
        content = {
            "config": records.plain(self.ready.run.as_dict()),
            "header": header,
            "tensors": tensors,
            "optimizer": self.bare.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "generators": state.generators(),
            "history": self.record["history"],
            "log": self.log.state(),
            "best_accuracy": self.best_accuracy,
            "best_epoch": self.best_epoch,
            "sent": self.sent,
            "notes": self.record["notes"],
            "processes": self.accelerator.num_processes,
            "done": self.done,
            "within": self.within,
            "seconds_total": time.perf_counter() - self.started,
        }
        state.write(self.out / state.FILE, content)

    @property
    def stopping(self) -> bool:
        """Whether to end now. The main process does; the others cannot go on without it."""
        return bool(self.signals.seen) and self.accelerator.is_main_process

    def stop(self) -> None:
        """End as a signal asked for; all is saved."""
        steps = self.steps * self.training.epochs
        number = self.signals.seen
        raise Stopped(f"stopped after {self.done:,} of {steps:,} steps", number)

    def extra(self) -> dict[str, Any]:
        """What ``subspan eval`` needs to build the network and its input again."""
        images, training = self.ready.data, self.training
        return {
            "net": training.net,
            "data": training.data,
            "method": self.ready.method.name,
            "image_shape": list(images.image_shape),
            "classes": images.classes,
            "mean": [float(f"{m:.9g}") for m in images.mean],  # 9 digits tell float32 apart
            "std": [float(f"{s:.9g}") for s in images.std],
            "seed": self.ready.run.seed,
        } | training.decoding

    def write(self, status: str, error: str | None = None) -> None:
        """Bring ``record.json`` up to date, from the main process."""
        history = self.record["history"]
        steps = [row["seconds"] / self.steps for row in history]
        self.record |= {
            "status": status,
            "error": error,
            "val_accuracy": self.best_accuracy if self.best_epoch else None,
            "best_epoch": self.best_epoch or None,
            "seconds_total": time.perf_counter() - self.started,
            "seconds_per_step": statistics.median(steps) if steps else None,
            "peak_memory_bytes": self.memory.read(),
        }
        if self.sent:
            self.record["bytes_sent_per_step"] = statistics.median(self.sent)
        if self.accelerator.is_main_process:
            records.write_json(self.out / "record.json", self.record)


def schedule(optimizer: Optimizer, name: str, lr: float, steps: int) -> LRScheduler:
    """The learning rate step by step; its highest value is ``lr``."""
    if name == "onecycle":
        return OneCycleLR(optimizer, lr, total_steps=max(steps, 2), cycle_momentum=False)
    if name == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    return LambdaLR(optimizer, lambda _: 1.0)


def on_cpu(training: Training) -> bool:
    """Whether a run takes the processor: it was told to, or there is nothing else."""
    return training.device == "cpu" or not torch.accelerator.is_available()


def _accelerator(training: Training, **more: Any) -> Accelerator:
    # What accelerate knows of the run before this one would make it refuse other settings.
    AcceleratorState._reset_state(reset_partial_state=True)
    distributed.meet_again("gloo" if on_cpu(training) else None)
    # Processes of torchrun find each other on CPUs only if it is told that there is nothing else.
    precision = training.mixed_precision
    return Accelerator(cpu=on_cpu(training), mixed_precision=precision, **more)


@torch.no_grad()
def _check_output(net: nn.Module, images: data.ImageData) -> None:
    """One image through the network, so that a wrong shape is a sentence and not a traceback."""
    state = net.training
    net.eval()
    try:
        out = net(images.normalize(images.train.images[:1]))
    except Exception as error:  # of a user's own network it may be any
        raise SubspanError(
            f"the network does not take images of shape {images.image_shape}: {error}"
        ) from error
    finally:
        net.train(state)
    if not isinstance(out, Tensor) or tuple(out.shape) != (1, images.classes):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise SubspanError(
            f"the network must give one score per class, shape (batch, {images.classes}), got {got}"
        )
