"""The loop of a training run: epochs, choices, the files that it leaves and goes on from.

It is accelerate's: CPU or GPU, mixed precision, one process or many (``torchrun``, ``accelerate
launch``).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

from subspan import checkpoint, distributed
from subspan.errors import Stopped, SubspanError
from subspan.files import remove_unfinished
from subspan.subspace.model import SubspaceModel
from subspan.training import data, records, state, trackers
from subspan.training.config import Run, Training
from subspan.training.evaluate import describe, evaluate
from subspan.training.methods import Method
from subspan.training.stop import Stop
from subspan.training.tasks import Task

CHECK_EVERY = 50  # steps between looks at the loss, each of which waits for the device
SAVE_EVERY = 300.0  # seconds between states within an epoch

Report = Callable[[dict[str, Any]], None]


@dataclass
class Prepared:
    """Everything that a run needs, checked, with nothing written yet."""

    run: Run
    task: Task
    method: Method
    model: nn.Module
    init_seed: int | None


class Loop:
    """The state of a run: the model, what has been measured so far, and the files."""

    def __init__(
        self,
        ready: Prepared,
        accelerator: Accelerator,
        out: Path,
        where: dict[str, Any] | None,
        report: Report | None,
        on_step: Callable[[], None] | None,
        stop: Stop | None = None,
    ) -> None:
        self.ready, self.accelerator, self.out, self.where = ready, accelerator, out, where
        self.report, self.on_step, self.stop = report, on_step, stop or Stop()
        self.log = trackers.Log(accelerator, out, where.get("log") if where else None)
        self.training = ready.run.training
        device = accelerator.device
        self.memory = records.PeakMemory(device)
        self.started = time.perf_counter() - (where["seconds_total"] if where else 0.0)
        self.task = ready.task.to(device)
        self.score = self.task.score
        if self.training.batch_size % accelerator.num_processes:
            raise SubspanError(
                f"batch_size must be a multiple of the {accelerator.num_processes} processes, got "
                f"{self.training.batch_size}"
            )
        notes = self.notes()
        if where:
            self.check_beginning(where)
        self.steps = data.steps_per_epoch(self.task.size(), self.training.batch_size)
        # The layers that there were; their values come when a journal has been read from θ₀ on.
        model = checkpoint.arranged(ready.model, where["header"]) if where else ready.model
        self.model = model.to(device)
        total = self.steps * self.training.epochs
        begun_with = self.extra() | {"init_seed": ready.init_seed}
        optimizer = self.bare = ready.method.optimizer(
            self.model,
            ready.run,
            out,
            begun_with,
            steps=total,
            resume=where["optimizer"] if where else None,
        )
        # Where nothing is scaled, accelerate's wrappers only look for packages, at every step.
        scaled = accelerator.scaler is not None
        self.optimizer = accelerator.prepare_optimizer(optimizer) if scaled else optimizer
        self.backward = accelerator.backward if scaled else Tensor.backward
        self.wrapped = self.distributed()
        self.schedule = schedule(optimizer, self.training.schedule, ready.run.lr, total)
        self.done = 0  # steps
        self.best_score, self.best_epoch = math.nan, 0  # none yet
        self.sent: list[float] = []  # bytes per step and process, epoch by epoch
        # Of the epoch that is under way.
        self.within: dict[str, Any] = {
            "total": torch.zeros((), device=device),
            "seen": 0,
            "seconds": 0.0,
            "lr": 0.0,
        }
        if where:
            checkpoint.restore(self.model, where["tensors"])
            optimizer.load_state_dict(where["optimizer"])
            self.schedule.load_state_dict(where["schedule"])
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(where["scaler"])
            self.best_score, self.best_epoch = where["best_score"], where["best_epoch"]
            self.sent, self.done = where["sent"], where["done"]
            self.within = where["within"] | {"total": where["within"]["total"].to(device)}
        self.saved = time.perf_counter()
        self.record: dict[str, Any] = {
            "format": records.FORMAT,
            "status": "running",
            "config": ready.run.as_dict(),
            "score": self.score.as_dict(),
            "test_score": None,
            "val_score": None,
            "best_epoch": None,
            **ready.method.counts(self.model),
            "checkpoint_bytes": None,
            "seconds_total": 0.0,
            "seconds_per_step": None,
            "peak_memory_bytes": None,
            "bytes_sent_per_step": None,
            "history": where["history"] if where else [],
            "log": [str(name) for name in accelerator.log_with],
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
            return list(self.ready.task.notes)
        notes = list(self.where.get("notes", self.ready.task.notes))
        before, now = self.where.get("processes", 1), self.accelerator.num_processes
        if before != now:
            if self.ready.method.needs_processes(self.ready.run.options):
                raise SubspanError(
                    f"{self.out} was begun in {before} processes, and what they find depends on "
                    f"their number, got {now}: go on in {before}"
                )
            notes.append(f"processes: {before} up to step {self.where['done']:,}, then {now}")
        return notes

    def check_beginning(self, where: Mapping[str, Any]) -> None:
        """Refuse to go on with other samples, from other initial weights, or without the best.

        Raises:
            SubspanError: if there are others than those that the run was begun with, or the best
                epoch's checkpoint cannot be read.
        """
        size = self.task.size()
        if size != where.get("size", size):
            raise SubspanError(
                f"{self.out} was begun with {where['size']:,} training samples, now there are "
                f"{size:,}: bring the data back as they were, or give another --out"
            )
        if isinstance(self.ready.model, SubspaceModel):
            checkpoint.check_base(self.out, self.ready.model, where["header"])
        if where["best_epoch"]:  # what is missing or damaged would be noticed at the end alone
            checkpoint.read(self.best)

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
            state.seed_generators(self.ready.run.seed)  # of what the network draws, as dropout does
        for epoch in range(len(self.record["history"]) + 1, self.training.epochs + 1):
            # Choices are the first process's, so that all stop together; and so are generators:
            # from smaller parts of a last batch the others may have drawn less.
            row, generators = broadcast_object_list([self.epoch(epoch), state.generators()])
            if self.accelerator.num_processes > 1:
                state.set_generators(generators)
            self.record["history"].append(row)
            self.save("last.safetensors")
            ready = self.ready.method.ready(self.model, self.bare, self.ready.run)
            first = not self.best_epoch
            if ready and (first or self.score.better(row["val_score"], self.best_score)):
                self.best_score, self.best_epoch = row["val_score"], epoch
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
                raise self.stopped()

    def change(self) -> None:
        """What a method changes between two epochs."""
        method, run, history = self.ready.method, self.ready.run, self.record["history"]
        model = method.after_epoch(self.model, self.bare, run, history)
        if model is not None:
            self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
            # It would take what it has unwrapped for wrapped; a run that goes on wraps it anew.
            vars(model).pop("_is_accelerate_prepared", None)
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
            self.task.size(),
            training.batch_size,
            seed=self.ready.run.seed,
            epoch=epoch,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            device=accelerator.device,
        )
        train_loss = math.nan
        for step, (index, weight) in enumerate(batches, start=1):
            if (epoch - 1) * self.steps + step <= self.done:
                continue
            loss = self.step(self.task.batch(index), weight)
            whole = min(training.batch_size, self.task.size() - (step - 1) * training.batch_size)
            total, seen = total + loss.detach() * whole, seen + whole
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
                    raise self.stopped()
        seconds, lr = time.perf_counter() - started, self.within["lr"]
        self.within = {"total": torch.zeros_like(total), "seen": 0, "seconds": 0.0, "lr": lr}
        if accelerator.num_processes > 1:
            own = torch.tensor((records.bytes_sent() - sent) / self.steps)
            self.sent.append(float(accelerator.reduce(own.to(accelerator.device), "mean")))
        more = self.ready.method.diagnose(self.model, self.bare)
        val_loss, val_score = evaluate(self.model, self.task, "validation")
        return {
            "epoch": epoch,
            "train_loss": train_loss,
            "val_loss": self.finite(total.new_tensor(val_loss), epoch),
            "val_score": val_score,
            "learning_rate": lr,
            "seconds": seconds,
            **more,
        }

    def step(self, batch: Any, weight: float) -> Tensor:
        """One step of the optimizer and of the schedule.

        Gradients are averaged over the processes: times its weight, the mean of each part counts
        every sample of the joint batch alike.
        """

        def loss() -> Tensor:
            with self.accelerator.autocast():
                mean = self.task.loss(self.wrapped, batch)
                return mean if weight == 1 else weight * mean

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
        best = self.best
        _, tensors = checkpoint.read(best)
        checkpoint.restore(self.model, tensors)
        # In full precision, as everyone who loads the file will.
        net = self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        _, score = evaluate(net, self.task, "test")
        self.record |= {"test_score": score} | self.ready.method.counts(self.model)
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

    @property
    def best(self) -> Path:
        """The best epoch's checkpoint."""
        best, last = self.out / "best.safetensors", self.out / "model.safetensors"
        # Where all ended just after it got its last name, it has that.
        return last if last.exists() and not best.exists() else best

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
            "best_score": self.best_score,
            "best_epoch": self.best_epoch,
            "sent": self.sent,
            "notes": self.record["notes"],
            "processes": self.accelerator.num_processes,
            "size": self.task.size(),
            "done": self.done,
            "within": self.within,
            "seconds_total": time.perf_counter() - self.started,
        }
        state.write(self.out / state.FILE, content)

    @property
    def stopping(self) -> bool:
        """Whether to end now. The main process does; the others cannot go on without it."""
        return self.stop.requested and self.accelerator.is_main_process

    def stopped(self) -> Stopped:
        """The exception that ends a run of which all is saved."""
        steps = self.steps * self.training.epochs
        return self.stop.error(f"after {self.done:,} of {steps:,} steps")

    def extra(self) -> dict[str, Any]:
        """What ``subspan eval`` needs to find the network and the task again."""
        run = self.ready.run
        described = describe(self.ready.task, run.training, run.seed)
        return described | {"method": self.ready.method.name}

    def write(self, status: str, error: str | None = None) -> None:
        """Bring ``record.json`` up to date, from the main process."""
        history = self.record["history"]
        steps = [row["seconds"] / self.steps for row in history]
        self.record |= {
            "status": status,
            "error": error,
            "val_score": self.best_score if self.best_epoch else None,
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


def accelerator(training: Training, **more: Any) -> Accelerator:
    """The devices, processes and precision of a run, and whatever else accelerate is told."""
    # What accelerate knows of the run before this one would make it refuse other settings.
    AcceleratorState._reset_state(reset_partial_state=True)
    distributed.meet_again("gloo" if on_cpu(training) else None)
    # Processes of torchrun find each other on CPUs only if it is told that there is nothing else.
    precision = training.mixed_precision
    return Accelerator(cpu=on_cpu(training), mixed_precision=precision, **more)
