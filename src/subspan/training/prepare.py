"""From the configuration of a run to what it trains: task, method, network and weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from subspan.errors import SubspanError
from subspan.subspace import init
from subspan.training import nets, tasks
from subspan.training.config import Run, Training
from subspan.training.devices import on_cpu
from subspan.training.methods import Method, method
from subspan.training.tasks import Task


@dataclass
class Prepared:
    """Everything that a run needs, checked, with nothing written yet."""

    run: Run
    task: Task
    method: Method
    model: nn.Module
    init_seed: int | None


def complete(options: Mapping[str, Any], how: Method, training: Training) -> dict[str, Any]:
    """Return a method's options; what of the network is new is trained fully by default.

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
