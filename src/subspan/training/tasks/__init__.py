"""A task: a network, the samples that it is trained on, a loss and a score.

Training and sweeps know no task by name: they ask :class:`Task`. A file in this folder that makes
an instance of :class:`TaskKind` has added one, as ``images`` and ``text`` are; yours is ``--task
package.module:function``, where the function returns one (``examples/language_model.py`` and
``examples/physics.py``).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from subspan.errors import SubspanError
from subspan.registry import Registry
from subspan.training import own, state
from subspan.training.config import IMAGES, Option, Training, check_options
from subspan.training.data.tensors import Tensors
from subspan.training.schema import MisfitError, from_json
from subspan.training.score import ACCURACY, Score

Part = Literal["validation", "test"]
# What a file says of the run, beside what the task describes.
OF_RUN = {"net", "data", "task", "validation", "seed", "method", "options", "init_seed"}

_registry: Registry[TaskKind] = Registry("task")


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

        What is random in them comes from the generators of PyTorch, NumPy or Python, which a run
        that goes on sets as they were; one of the task's own would begin anew.

        Args:
            index: int64 (n,), in [0, :meth:`size`), on the task's device.
        """

    @abstractmethod
    def loss(self, net: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss over a batch, a scalar with a gradient."""

    @abstractmethod
    def evaluate(self, net: nn.Module, part: Part) -> tuple[float, float]:
        """Return loss and score of a network in eval mode; gradients are yours to switch off.

        The network stays as it is: in training mode BatchNorm would learn from this part.
        """

    def count_mistakes(self, net: nn.Module) -> tuple[int, int]:
        """Count the samples that a network, in eval mode, tells wrongly, and all samples.

        The samples are those of the training and the validation part together: ``subspan bound``
        needs a task whose loss is 0 or 1, as a mistake is, and never looks at the test part.

        Raises:
            SubspanError: where there are no mistakes to count, which is the default.
        """
        raise SubspanError(
            f"the task's score, {self.score.name}, has no mistakes to count, and only a loss of 0 "
            "or 1 has this bound: a task of classification defines count_mistakes"
        )

    def describe(self) -> dict[str, Any]:
        """Describe the task for a checkpoint, as JSON values by name."""
        return {}

    def as_trained(self, extra: Mapping[str, Any], path: str) -> Task:
        """Return the task as it was in the training of a checkpoint, for its evaluation.

        Args:
            extra: what :meth:`describe` and the run said there.
            path: of the file, for errors.

        Raises:
            SubspanError: if the data are of another kind than those of the training.
        """
        return self

    def samples(self) -> Iterable[Tensor]:
        """Return what a training that goes on knows its samples by, those of all parts.

        By default they are the task's tensors, and those of its sets.
        """
        for value in vars(self).values():
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, Tensors):
                yield from value.pack()[0].values()

    def sizes(self) -> dict[str, int]:
        """Return what the test part holds, in people's words."""
        return {}

    def to(self, device: torch.device) -> Self:
        """Return a copy of the task whose tensors and sets are on another device."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, (Tensor, Tensors)):
                setattr(moved, name, value.to(device))
        return moved

    def check(self, net: nn.Module) -> None:
        """Refuse a network that does not fit, before anything is written.

        Raises:
            SubspanError: if the loss of two samples is no number that has a gradient.
        """
        try:
            with in_eval(net):
                loss = self.loss(net, self.batch(torch.arange(min(2, self.size()))))
        except Exception as error:  # of a user's own task it may be any
            raise SubspanError(f"the task's loss of two samples cannot be had: {error}") from error
        real = isinstance(loss, Tensor) and loss.is_floating_point()
        if not real or loss.numel() != 1 or not loss.requires_grad:
            raise SubspanError(
                f"the task's loss must be a tensor of one number with a gradient, got {_what(loss)}"
            )


@contextmanager
def in_eval(net: nn.Module) -> Iterator[None]:
    """Keep a network in eval mode for a while, so that calls change nothing that it holds."""
    mode = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(mode)


def _what(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    without = ", without one" * (not value.requires_grad)
    return f"a tensor of shape {tuple(value.shape)}, {value.dtype}{without}"


class TaskKind(ABC):
    """A task that people name, with options of its own.

    Args:
        name: what people type.
        help: one line on what it is.
    """

    options: tuple[Option, ...] = ()
    """The options of this task, beside those of the training."""
    head: str | None = None
    """The part of its networks that is new, and trained as it is: a preset, or a pattern; "" if
    nothing is new, None if the task does not know."""

    def __init__(self, name: str, help: str) -> None:  # noqa: A002 (the word that command lines use)
        self.name, self.help = name, help

    @abstractmethod
    def load(self, training: Training, seed: int) -> Task:
        """Return the task of a run (:func:`load`)."""

    @abstractmethod
    def network(self, extra: Mapping[str, Any]) -> Callable[[], nn.Module] | None:
        """Return a function that makes the network of a checkpoint with its first weights.

        Args:
            extra: what the file says of the run and of the task.

        Returns:
            None if it does not say enough.
        """

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options that this task does not have, or that have no meaning."""
        check_options("task", self, options, kinds().values())


def register(kind: TaskKind) -> None:
    """Add a task to those that people can name."""
    _registry.add(kind.name, kind)


def kinds() -> dict[str, TaskKind]:
    """Return all tasks that have a name so far, by it."""
    own.import_all(__name__)
    return dict(_registry)


def option_names() -> list[str]:
    """Return the options of all tasks that have a name, each once."""
    return list(dict.fromkeys(o.name for each in kinds().values() for o in each.options))


def kind(name: str | None) -> TaskKind:
    """Return the task of that name, of images without one; refuse one that there is not."""
    if name is not None and ":" in name:
        return _Own(name, "a task of your own")
    own.import_all(__name__)
    return _registry.find(IMAGES if name is None else name)


class _Own(TaskKind):
    """A task of the user's own: package.module:function."""

    def load(self, training: Training, seed: int) -> Task:
        asked = {"net": training.net, "data": training.data}
        asked = {key: value for key, value in asked.items() if value is not None}
        offered = asked | {"validation": training.validation, "seed": seed}
        task = own.call("task", self.name, offered, asked)
        if not isinstance(task, Task):
            raise SubspanError(
                f"task {self.name!r} must return a subspan.training.tasks.Task, got "
                f"{type(task).__name__}"
            )
        return task

    def network(self, extra: Mapping[str, Any]) -> Callable[[], nn.Module]:
        task = again(extra)
        return lambda: draw(task, extra["seed"])


def load(training: Training, seed: int) -> Task:
    """Return the task of a run, which draws, as its validation part, from the seed.

    Raises SubspanError if there is no such task, or it cannot be had.
    """
    how = kind(training.task)
    how.check(training.task_options)
    task = how.load(training, seed)
    size = task.size()
    if not isinstance(size, int) or size < 1:
        raise SubspanError(f"the task's size must be a positive integer, got {size!r}")
    if not isinstance(task.score, Score):
        raise SubspanError(f"the task's score must be a Score, got {task.score!r}")
    return task


def again(extra: Mapping[str, Any], data: str | None = None, **options: Any) -> Task:
    """Return the task that a checkpoint was trained on, by what the file says of it.

    The data, and options of the task, may be others than those of the training.
    """
    how = kind(extra.get("task"))
    as_trained = {option.name: extra.get(option.name) for option in how.options}
    chosen = as_trained | {name: value for name, value in options.items() if value is not None}
    training = Training(
        task=extra.get("task"),
        net=extra["net"],
        data=extra["data"] if data is None else data,
        validation=extra.get("validation", Training.validation),
        task_options={name: value for name, value in chosen.items() if value is not None},
    )
    return load(training, extra["seed"])


def describe(task: Task) -> dict[str, Any]:
    """Return what a task says of itself; refuse what no file could hold, or says of the run."""
    try:
        found = from_json(dict[str, Any], task.describe())
    except MisfitError as error:
        raise SubspanError(f"what the task's describe returns, for a file: {error}") from None
    if taken := found.keys() & OF_RUN:
        raise SubspanError(
            f"the task's describe returns {', '.join(sorted(taken))}, under which a file has what "
            "the run says: call it otherwise"
        )
    return found


def draw(task: Task, seed: int) -> nn.Module:
    """Return the task's network; what it draws of initial weights comes from this seed."""
    state.seed_generators(seed)
    net = task.network()
    if not isinstance(net, nn.Module):
        raise SubspanError(f"the task's network must be an nn.Module, got {type(net).__name__}")
    return net
