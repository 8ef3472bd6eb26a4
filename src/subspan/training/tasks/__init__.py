"""A task: a network, the samples that it is trained on, a loss and a score.

Training and sweeps know no task by name: they ask :class:`Task`. Image classification is one
(:mod:`subspan.training.tasks.classification`); yours is ``--task package.module:function``, where
the function returns one (``examples/language_model.py`` and ``examples/physics.py``).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from subspan.errors import SubspanError
from subspan.training import own, state
from subspan.training.config import Training
from subspan.training.score import ACCURACY, Score

Part = Literal["validation", "test"]


class Task(ABC):
    """A network, batches, a loss and a score.

    Choices (learning rate, best epoch, early stopping) look at the part "validation"; "test" is
    for the final evaluation alone.
    """

    score: Score = ACCURACY
    """The score that judges a network."""
    notes: tuple[str, ...] = ()
    """Sentences that a reader of the results should know."""

    @abstractmethod
    def network(self) -> nn.Module:
        """Make a new network with its initial weights, drawn from PyTorch's generator."""

    @abstractmethod
    def size(self) -> int:
        """Return the number of samples in an epoch."""

    @abstractmethod
    def batch(self, index: Tensor) -> Any:
        """Return some samples in the form that :meth:`loss` takes.

        Args:
            index: int64 (n,), in [0, :meth:`size`), on the task's device.
        """

    @abstractmethod
    def loss(self, net: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss over a batch, a scalar with a gradient."""

    @abstractmethod
    def evaluate(self, net: nn.Module, part: Part) -> tuple[float, float]:
        """Return loss and score of a network in eval mode; gradients are yours to switch off."""

    def describe(self) -> dict[str, Any]:
        """Describe the task for a checkpoint, as JSON values by name."""
        return {}

    def to(self, device: torch.device) -> Task:
        """Return a copy of the task whose tensor attributes are on another device."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
        return moved

    def check(self, net: nn.Module) -> None:
        """Refuse a network that does not fit, before anything is written.

        Raises:
            SubspanError: if the loss of two samples is no number that has a gradient.
        """
        state = net.training
        net.eval()  # so that nothing that it holds changes
        try:
            loss = self.loss(net, self.batch(torch.arange(min(2, self.size()))))
        except Exception as error:  # of a user's own task it may be any
            raise SubspanError(f"the task's loss of two samples cannot be had: {error}") from error
        finally:
            net.train(state)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise SubspanError(
                f"the task's loss must be a tensor of one number with a gradient, got {_what(loss)}"
            )


def _what(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"a tensor of shape {tuple(value.shape)}" + " without one" * (not value.requires_grad)


def load(training: Training, seed: int) -> Task:
    """Return the task of a run.

    Args:
        training: what is trained on what.
        seed: of what the task draws, as its validation part.

    Raises:
        SubspanError: if there is no such task, or it cannot be had.
    """
    if training.task is None:
        from subspan.training.tasks import classification

        return classification.load(training, seed)
    asked = {"net": training.net, "data": training.data}
    asked = {key: value for key, value in asked.items() if value is not None}
    offered = asked | {"validation": training.validation, "seed": seed}
    task = own.call("task", training.task, offered, asked)
    if not isinstance(task, Task):
        raise SubspanError(
            f"task {training.task!r} must return a subspan.training.tasks.Task, got "
            f"{type(task).__name__}"
        )
    size = task.size()
    if not isinstance(size, int) or size < 1:
        raise SubspanError(f"the task's size must be a positive integer, got {size!r}")
    if not isinstance(task.score, Score):
        raise SubspanError(f"the task's score must be a Score, got {task.score!r}")
    return task


def draw(task: Task, seed: int) -> nn.Module:
    """Return the task's network; what it draws of initial weights comes from this seed."""
    state.seed_generators(seed)
    net = task.network()
    if not isinstance(net, nn.Module):
        raise SubspanError(f"the task's network must be an nn.Module, got {type(net).__name__}")
    return net
