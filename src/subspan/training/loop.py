"""The loop of a training run: epochs, choices, the files that it leaves and goes on from.

It is accelerate's: CPU or GPU, mixed precision, one process or many (``torchrun``, ``accelerate
launch``).
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from subspan import checkpoint, distributed
from subspan.errors import Stopped, SubspanError
from subspan.training import data, machine, records, resume, state, trackers
from subspan.training.evaluate import describe, evaluate
from subspan.training.folder import RunFolder
from subspan.training.machine import PeakMemory
from subspan.training.prepare import Prepared, check_batches
from subspan.training.records import CompleteRun, Epoch, RunRecord
from subspan.training.schedule import restart, schedule
from subspan.training.schema import MisfitError, from_json, to_json
from subspan.training.state import Progress, TrainState, Within
from subspan.training.stop import Stop

CHECK_EVERY = 50  # steps between looks at the loss, each of which waits for the device
SAVE_EVERY = 300.0  # seconds between states within an epoch

Report = Callable[[Epoch], None]
Checked = TypeVar("Checked", Epoch, RunRecord, CompleteRun)


class Loop:
    """A run under way: what is trained, how far it is, and what is told of it.

    It goes on from ``before``, or begins anew. Each epoch's row of the history is reported,
    ``on_step`` is called after each step, and ``stop`` is asked then whether to save and end.

    Raises:
        SubspanError: for a run that cannot begin, or go on, like this; nothing is written then.
    """

    def __init__(
        self,
        ready: Prepared,
        accelerator: Accelerator,
        out: Path,
        before: TrainState | None,
        report: Report | None,
        on_step: Callable[[], None] | None,
        stop: Stop | None = None,
    ) -> None:
        self.ready, self.accelerator, self.before = ready, accelerator, before
        self.run, self.method, self.training = ready.run, ready.method, ready.run.training
        self.report, self.on_step, self.stop = report, on_step, stop or Stop()
        self.folder = RunFolder(out, accelerator.is_main_process)
        self.log = trackers.Log(accelerator, out, before.log if before else None)
        device, processes = accelerator.device, accelerator.num_processes
        self.memory = PeakMemory(device)
        self.started = time.perf_counter() - (before.seconds_total if before else 0.0)
        self.digest = ready.digest  # of samples as they are at first
        self.task = ready.task.to(device)
        self.score = self.task.score
        check_batches(self.training, processes)
        notes = list(ready.task.notes)
        if before:
            alike = self.method.needs_processes(self.run.options)
            changed = resume.check_processes(before, out, processes, must_agree=alike)
            changed += resume.find_changes(before, machine.device_name(device), machine.versions())
            notes = before.notes + changed
        self.steps, self.total, self.planned = ready.steps, ready.total, ready.planned
        self.epochs = self.planned.training.epochs
        # The layers that there were; their values come when a journal has been read from θ₀ on.
        model = checkpoint.rebuild(ready.model, before.header) if before else ready.model
        if before:
            resume.check_beginning(before, self.folder, model, ready)
        self.model = model.to(device)
        resumed = before.optimizer if before else None
        optimizer = self.bare = ready.optimizer(self.model, out, self.extra(), resumed)
        # Where nothing is scaled, accelerate's wrappers only look for packages, at every step.
        scaled = accelerator.scaler is not None
        self.optimizer = accelerator.prepare_optimizer(optimizer) if scaled else optimizer
        self.backward = accelerator.backward if scaled else Tensor.backward
        self.wrapped = self.distributed()
        self.progress = Progress(Within(torch.zeros((), device=device)))
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.schedule = schedule(optimizer, self.training.schedule, self.left)
        if before:
            checkpoint.restore(self.model, before.tensors)
            optimizer.load_state_dict(before.optimizer)
            self.schedule.load_state_dict(before.schedule)
            if accelerator.scaler is not None and before.scaler is not None:
                accelerator.scaler.load_state_dict(before.scaler)
            self.progress = before.progress
            self.progress.within.total = before.progress.within.total.to(device)
        self.saved = time.perf_counter()
        unknown = ("test_score", "val_score", "checkpoint_bytes", "seconds_per_step")
        begun: dict[str, Any] = dict.fromkeys((*unknown, "peak_memory_bytes")) | {
            "status": "running",
            "config": records.plain(self.run.as_dict()),
            "score": to_json(self.score),
            "seconds_total": 0.0,
            "log": [str(name) for name in accelerator.log_with],
            "processes": processes,
            "device": machine.device_name(device),
            "versions": machine.versions(),
            "notes": notes,
            "digest": self.digest,
        }
        self.record = self.checked(RunRecord, begun | self.counts())

    def counts(self) -> dict[str, Any]:
        """Return the method's counts, and that of the head."""
        head = sum(p.numel() for p in self.method.head(self.model, self.run.options))
        if not isinstance(found := self.method.counts(self.model), Mapping):
            raise self.method.wrong("counts", "numbers by name", found)
        return dict(found) | {"head_parameters": head}

    def checked(self, kind: type[Checked], content: dict[str, Any]) -> Checked:
        """Return a part of the record with what the method says of the run, or refuse that."""
        try:
            return from_json(kind, content)
        except MisfitError as error:
            name = self.method.name
            raise SubspanError(f"what the method {name} says of the run: {error}") from None

    def distributed(self) -> nn.Module:
        """Return the model with accelerate's wrappers: of mixed precision, of DDP."""
        # "Evaluation" is accelerate's word for all but DDP.
        wrapped: nn.Module = self.accelerator.prepare_model(
            self.model, evaluation_mode=not self.method.averages_gradients
        )
        return wrapped

    def open(self) -> None:
        """Make the folder, say in it that the run is running, and clear away what is another's."""
        self.bring_up_to_date("running")
        self.folder.open(self.record, goes_on=self.before is not None)

    def fit(self) -> None:
        """Train all epochs, or as many as patience allows; the last may be a part of one."""
        if self.before:
            state.set_generators(self.before.generators)
        else:
            state.seed_generators(self.run.seed)  # of what the network draws, as dropout does
        progress = self.progress
        for epoch in range(len(progress.history) + 1, self.epochs + 1):
            # Choices are the first process's, so that all stop together; and so are generators:
            # from smaller parts of a last batch the others may have drawn less.
            row, generators = broadcast_object_list([self.epoch(epoch), state.generators()])
            if self.accelerator.num_processes > 1:
                state.set_generators(generators)
            progress.history.append(row)
            self.folder.save(self.model, self.folder.last, self.extra())
            last = self.method.finished(self.planned, progress.history, self.score)
            ready = self.method.ready(self.model, self.bare, self.planned, last)
            best = progress.best_score if progress.best_epoch else None
            if last and not ready and best is None:
                raise self.method.wrong("ready", "true for the last epoch", ready)
            if ready and (best is None or self.score.better(row.val_score, best)):
                progress.best_score, progress.best_epoch = row.val_score, epoch
                self.folder.save(self.model, self.folder.best, self.extra())
            self.write("running")
            with state.aside():
                if self.report:
                    self.report(row)
                self.log.epoch(row)
            patience = self.training.patience
            waited = patience and ready and epoch - progress.best_epoch >= patience
            if waited or (last and epoch < self.epochs):
                break
            if not last:
                self.change()
            self.save_state()
            if self.stopping and not last:
                raise self.stopped()

    @property
    def left(self) -> int:
        """The steps of a schedule that begins now: to the end of the stage."""
        done, ends = self.progress.done, (epoch * self.steps for epoch in self.ready.stages)
        return min(self.total, next(end for end in ends if end > done)) - done

    def change(self) -> None:
        """Let the method change what is trained, between two epochs."""
        model = self.method.after_epoch(self.model, self.bare, self.planned, self.progress.history)
        if model is not None:
            if not isinstance(model, nn.Module):
                raise self.method.wrong("after_epoch", "a Module, or None", model)
            self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
            # It would take what it has unwrapped for wrapped; a run that goes on wraps it anew.
            vars(model).pop("_is_accelerate_prepared", None)
            self.model = model
            self.wrapped = self.distributed()
            self.schedule = restart(self.bare, self.rates, self.training.schedule, self.left)

    def steps_in(self, epoch: int) -> int:
        """Return the number of steps of an epoch, 1, 2, …; the last may have fewer."""
        return min(self.steps, self.total - (epoch - 1) * self.steps)

    def epoch(self, epoch: int) -> Epoch:
        """Pass over the training part once, and evaluate on the validation part."""
        accelerator, training, progress = self.accelerator, self.training, self.progress
        within = progress.within
        self.wrapped.train()
        if not within.seen:
            within.lr = float(self.schedule.get_last_lr()[0])
        total, seen = within.total, within.seen
        started, sent = time.perf_counter() - within.seconds, machine.bytes_sent()
        batches = data.batches(
            self.task.size(),
            training.batch_size,
            seed=self.run.seed,
            epoch=epoch,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            device=accelerator.device,
        )
        train_loss, last = math.nan, self.steps_in(epoch)
        for step, (index, weight) in enumerate(itertools.islice(batches, last), start=1):
            if (epoch - 1) * self.steps + step <= progress.done:
                continue
            loss = self.step(self.task.batch(index), weight)
            whole = min(training.batch_size, self.task.size() - (step - 1) * training.batch_size)
            total, seen = total + loss.detach() * whole, seen + whole
            if step % CHECK_EVERY == 0 or step == last:
                train_loss = self.finite(total / seen, epoch)
            progress.done += 1
            if self.on_step:
                self.on_step()
            if step < last and (self.stopping or time.perf_counter() - self.saved > SAVE_EVERY):
                seconds = time.perf_counter() - started
                progress.within = Within(total, seen, seconds, within.lr)
                self.save_state()
                if self.stopping:
                    raise self.stopped()
        seconds = time.perf_counter() - started
        progress.within = Within(torch.zeros_like(total), lr=within.lr)
        if accelerator.num_processes > 1:
            own = torch.tensor((machine.bytes_sent() - sent) / last)
            progress.sent.append(float(accelerator.reduce(own.to(accelerator.device), "mean")))
            distributed.share_buffers(self.model)
        said, ended = self.method.diagnose(self.model, self.bare), dict[str, Any]()
        if epoch in self.ready.stages and len(self.ready.stages) > 1:
            trained = self.counts()["trainable_parameters"]
            _, score = evaluate(self.model, self.task, "test")
            ended = {"test_score": score, "trainable_parameters": trained}
        val_loss, val_score = evaluate(self.model, self.task, "validation")
        row = ended | {
            "epoch": epoch,
            "train_loss": train_loss,
            "val_loss": self.finite(total.new_tensor(val_loss), epoch),
            "val_score": val_score,
            "learning_rate": within.lr,
            "seconds": seconds,
        }
        taken = row.keys() | {"test_score"}
        if not isinstance(said, Mapping) or said.keys() & taken:
            must = f"values by name, other than {', '.join(sorted(taken))}"
            raise self.method.wrong("diagnose", must, said)
        return self.checked(Epoch, row | dict(said))

    def step(self, batch: Any, weight: float) -> Tensor:
        """Make one step of the optimizer and of the schedule.

        Gradients are averaged over the processes: times its weight, the mean of each part counts
        every sample of the joint batch alike.
        """

        def loss() -> Tensor:
            with self.accelerator.autocast():
                mean = self.task.loss(self.wrapped, batch)
                return mean if weight == 1 else weight * mean

        value = self.method.step(self.optimizer, loss, self.backward)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise self.method.wrong("step", "the loss, a tensor of one number", value)
        self.schedule.step()
        return value

    def finite(self, loss: Tensor, epoch: int) -> float:
        """Return the mean of a loss over the processes; an error if it is not a number."""
        mean = float(self.accelerator.reduce(loss, "mean"))
        if not math.isfinite(mean):
            best = self.progress.best_epoch
            kept = f"; best.safetensors holds epoch {best}" if best else ""
            self.folder.forget_state()  # from there it would come to the same end
            raise SubspanError(
                f"the loss stopped being finite in epoch {epoch}: lower --lr {self.run.lr:g}" + kept
            )
        return mean

    def finish(self) -> None:
        """Go back to the best epoch, read the test set once, and write what was found."""
        self.accelerator.wait_for_everyone()
        _, tensors = checkpoint.read(best := self.folder.kept_best)
        size = best.stat().st_size
        checkpoint.restore(self.model, tensors)
        # In full precision, as everyone who loads the file will.
        net = self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        _, score = evaluate(net, self.task, "test")
        if (bits := self.method.bits(self.run.options)) is not None:
            self.folder.save(self.model, self.folder.compact, self.extra(), bits)
        self.accelerator.wait_for_everyone()
        if bits is not None:
            size = self.folder.compact.stat().st_size
        self.folder.keep_best()
        self.bring_up_to_date("complete")
        found = self.counts() | {"test_score": score, "checkpoint_bytes": size}
        self.record = self.checked(CompleteRun, to_json(self.record) | found)
        self.folder.write(self.record)
        self.folder.forget_state()
        self.log.score(self.record)
        # The others read the record rather than be sent it: Gloo's thread may still hold what was
        # sent last when Python ends, and aborts the process then. A barrier holds nothing.
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            self.record = RunRecord.read(self.folder.path) or self.record

    def save_state(self) -> None:
        """Write everything that what follows depends on, from the main process."""
        self.saved = time.perf_counter()
        if not self.accelerator.is_main_process:
            return
        header, tensors = checkpoint.contents(self.model)
        now = TrainState(
            config=self.record.config,
            header=header,
            tensors=tensors,
            optimizer=self.bare.state_dict(),
            schedule=self.schedule.state_dict(),
            scaler=None if (scaler := self.accelerator.scaler) is None else scaler.state_dict(),
            generators=state.generators(),
            progress=self.progress,
            log=self.log.state(),
            notes=self.record.notes,
            processes=self.accelerator.num_processes,
            device=self.record.device,
            versions=self.record.versions,
            size=self.task.size(),
            samples=self.digest,
            seconds_total=time.perf_counter() - self.started,
        )
        state.write(self.folder.state, now)

    @property
    def stopping(self) -> bool:
        """Whether to end now. The main process does; the others cannot go on without it."""
        return self.stop.requested and self.accelerator.is_main_process

    def stopped(self) -> Stopped:
        """Return the exception that ends a run of which all is saved."""
        return self.stop.error(f"after {self.progress.done:,} of {self.total:,} steps")

    def extra(self) -> dict[str, Any]:
        """Return what the checkpoint says so that ``subspan eval`` finds network and task again."""
        described = describe(self.ready.task, self.training, self.run.seed)
        method: dict[str, Any] = {"method": self.method.name}
        if checkpoint.base_of(self.ready.model):  # it is to be wrapped by the method again
            method |= {"options": self.run.options, "init_seed": self.ready.init_seed}
        return described | method

    def bring_up_to_date(self, status: str, error: str | None = None) -> None:
        """Let the record say how far the run is."""
        progress = self.progress
        steps = [row.seconds / self.steps_in(row.epoch) for row in progress.history]
        self.record = replace(
            self.record,
            status=status,
            error=error,
            val_score=progress.best_score if progress.best_epoch else None,
            best_epoch=progress.best_epoch or None,
            seconds_total=time.perf_counter() - self.started,
            seconds_per_step=statistics.median(steps) if steps else None,
            history=progress.history,
            peak_memory_bytes=self.memory.read(),
            bytes_sent_per_step=statistics.median(progress.sent) if progress.sent else None,
        )

    def write(self, status: str, error: str | None = None) -> None:
        """Bring ``record.json`` up to date, from the main process."""
        self.bring_up_to_date(status, error)
        self.folder.write(self.record)
