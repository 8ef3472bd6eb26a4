"""From the configuration of a run to what it trains: task, method, network and weights."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
import weakref
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from subspan import checkpoint
from subspan.errors import SubspanError
from subspan.subspace import init
from subspan.subspace.parameters import bytes_of, digest_tensors, find_slots
from subspan.training import data, nets, state, tasks
from subspan.training.config import Run, Training
from subspan.training.devices import on_cpu
from subspan.training.methods import Method, method
from subspan.training.schema import fitting
from subspan.training.tasks import Task


@dataclass
class Prepared:
    """Everything that a run needs, checked, with nothing written yet."""

    run: Run  # what was asked for
    task: Task  # what is trained on
    method: Method  # by which
    model: nn.Module  # the network as the method has wrapped it, before the first step
    init_seed: int | None  # of the initial weights that the library drew; None of the code's own

    @functools.cached_property
    def digest(self) -> int:
        """A checksum of the samples of all parts, and of what the task says of itself."""
        found = zlib.crc32(json.dumps(tasks.describe(self.task), sort_keys=True).encode())
        for tensor in self.task.samples():
            if tensor.layout is torch.strided:
                found = zlib.crc32(bytes_of(tensor).numpy().data, found)
        return found

    @property
    def steps(self) -> int:
        """The steps of an epoch."""
        return data.steps_per_epoch(self.task.size(), self.run.training.batch_size)

    @property
    def total(self) -> int:
        """The steps of the run."""
        return self.run.training.steps or self.steps * self.run.training.epochs

    @property
    def planned(self) -> Run:
        """The run as methods are told, who plan by epochs; the last may be a part of one."""
        epochs = -(-self.total // self.steps)
        return replace(self.run, training=replace(self.run.training, epochs=epochs))

    @property
    def stages(self) -> tuple[int, ...]:
        """The epochs with which the method's stages end."""
        run, found = self.planned, self.method.stages(self.planned)
        growing = isinstance(found, tuple) and list(found) == sorted({0, *found})[1:]
        if not growing or found[-1:] != (run.training.epochs,):
            must = f"a tuple of epochs that grow, of which the last is {run.training.epochs}"
            raise self.method.wrong("stages", must, found)
        return found

    def optimizer(
        self,
        model: nn.Module,
        out: Path,
        extra: Mapping[str, Any],
        resume: Mapping[str, Any] | None = None,
    ) -> Optimizer:
        """Return the method's optimizer, of the model on its device."""
        checkpoint.contents(model)  # refuses here what could not be saved after an epoch
        said = {**extra, "init_seed": self.init_seed}
        found: object = self.method.optimizer(
            model, self.planned, out, said, steps=self.total, resume=resume
        )
        if not isinstance(found, Optimizer):
            raise self.method.wrong("optimizer", "an Optimizer", found)
        return found


def complete_options(options: Mapping[str, Any], how: Method, training: Training) -> dict[str, Any]:
    """Return a method's options; what of the network is new is trained fully if they are silent.

    Where nothing is new, as in language modelling, no method trains the output layer unasked.
    """
    head = tasks.kind(training.task).head
    known = any(option.name == "train_fully" for option in how.options)
    usual: dict[str, Any] = {}
    if known and head:
        usual = {"train_fully": head}
    elif head == "" and how.trains_head:
        usual = {"train_fully": []}
    return usual | dict(options)


def prepare(run: Run) -> Prepared:
    """Load the task, build and wrap its network; refuse whatever cannot be run as asked."""
    how = method(fitting(Run, run, "run").method)
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

    def draw() -> nn.Module:
        return make() if init_seed is None else init.build(make, init_seed)

    alike = True
    if ":" in f"{training.net}{training.task}":  # by the user's code, which may do anything
        first, tensors = _digest_and_tensors(draw())
        net = draw()
        alike = _digest(net) == first
        if {id(tensor()) for tensor in tensors} & set(map(id, net.parameters())):
            net = copy.deepcopy(net)  # the code has kept it, and would give it to the next run
    else:
        net = draw()
    for slot in find_slots(net):  # refuses parameters without values
        if not bool(torch.isfinite(net.get_parameter(slot.tensor)).all()):
            raise SubspanError(f"{slot.tensor} of the network is not finite before the first step")
    task.check(net)
    model = how.wrap(net, run.seed, run.options)
    if not isinstance(model, nn.Module):
        raise how.wrong("wrap", "a Module", model)
    if not alike and "fingerprint" in checkpoint.contents(model)[0]:  # of what is not in the file
        raise SubspanError(
            "your function makes another network at every call, and numbers that are trained "
            "around one mean nothing in another: draw its weights and buffers from PyTorch's "
            "generator, which a run seeds, or from one of a fixed seed"
        )
    if init_seed is not None and hasattr(model, "init_seed"):
        # The checkpoint then holds no θ₀ and needs none.
        model.init_seed = init_seed  # type: ignore[assignment]
    return Prepared(run, task, how, model, init_seed)


def _digest_and_tensors(net: nn.Module) -> tuple[str, list[weakref.ref[nn.Parameter]]]:
    return _digest(net), list(map(weakref.ref, net.parameters()))


def _digest(net: nn.Module) -> str:
    """Return a digest of all that a network holds, buffers that no ``state_dict`` has among it."""
    find_slots(net)  # refuses parameters without values
    held = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    plain = (Tensor, nn.Parameter)  # others are quantised, and have digests of their own
    return digest_tensors({name: held[name] for name in held if type(held[name]) in plain})


@state.aside()
def rehearse(run: Run, processes: int = 1) -> Prepared:
    """Prepare a run that is to begin later; refuse what would end it before its first step."""
    ready = prepare(run)
    check_batches(run.training, processes)
    with tempfile.TemporaryDirectory() as folder:
        ready.optimizer(ready.model, Path(folder), {})
    return ready


def check_batches(training: Training, processes: int) -> None:
    """Refuse batches that so many processes cannot share."""
    if training.batch_size % processes:
        raise SubspanError(
            f"batch_size must be a multiple of the {processes} processes, got {training.batch_size}"
        )
