"""The score of a network, and of a checkpoint that is rebuilt from its file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from subspan import checkpoint
from subspan.errors import SubspanError
from subspan.subspace import init
from subspan.subspace.model import SubspaceModel
from subspan.training import nets, state, tasks
from subspan.training.config import DECODING, Training
from subspan.training.methods import method
from subspan.training.tasks import Part, Task
from subspan.training.tasks.classification import Classification


def evaluate(model: nn.Module, task: Task, part: Part) -> tuple[float, float]:
    """Loss and score of a model on a part of a task; the network stays in eval mode.

    Of a :class:`SubspaceModel` P w is computed once, and not for every batch.
    """
    model.eval()
    found = task.evaluate(model.merge() if isinstance(model, SubspaceModel) else model, part)
    try:
        loss, score = map(float, found)
    except (TypeError, ValueError) as error:
        raise SubspanError(
            f"the task's evaluate must return its loss and its score, two numbers, got {found!r}"
        ) from error
    return loss, task.score.checked(score)


def describe(task: Task, training: Training, seed: int) -> dict[str, Any]:
    """Describe network and task for a checkpoint, so that :func:`rebuild` finds them again."""
    own = {"task": training.task, "validation": training.validation} if training.task else {}
    known = {"net": training.net, "data": training.data, "seed": seed} | training.decoding
    return known | own | task.describe()


def network(extra: Mapping[str, Any]) -> Callable[[], nn.Module] | None:
    """Return a function that makes a file's network with its first weights, or None."""
    if extra.get("task"):
        task, seed = _task(extra), extra["seed"]
        return lambda: tasks.draw(task, seed)
    if not {"net", "image_shape", "classes", "seed"} <= extra.keys():
        return None

    def make() -> nn.Module:
        state.seed_generators(extra["seed"])
        return nets.build(extra["net"], tuple(extra["image_shape"]), extra["classes"])

    return make


def _task(extra: Mapping[str, Any], data: str | None = None, **decoding: Any) -> Task:
    """Return the task that a checkpoint was trained on, or the same on other data."""
    as_trained: dict[str, Any] = {key: extra.get(key) for key in DECODING}
    given = {key: value for key, value in decoding.items() if value is not None}
    training = Training(
        task=extra.get("task"),
        net=extra["net"],
        data=data or extra["data"],
        validation=extra.get("validation", Training.validation),
        **as_trained | given,
    )
    return tasks.load(training, extra["seed"])


def rebuild(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model of a checkpoint of the laboratory, and what the file says of it.

    Raises:
        SubspanError: if the file is unusable, or does not say which network it belongs to.
    """
    header = checkpoint.inspect(path)
    make = network(header["extra"])
    if make is None:
        raise SubspanError(
            f"{path} does not say which network it belongs to: load it with subspan.load(path, net)"
        )
    if header["kind"] != "part":
        return checkpoint.load(path, make), header
    extra, seed = header["extra"], header["extra"].get("init_seed")
    net = make() if seed is None else init.build(make, seed)
    how = method(extra["method"])
    return checkpoint.load(path, how.wrap(net, extra["seed"], extra["options"])), header


def evaluate_checkpoint(
    path: str | os.PathLike[str], name: str | None = None, **decoding: Any
) -> dict[str, Any]:
    """Test score of a checkpoint; images are read and normalised as in its training.

    Args:
        path: a checkpoint of ``subspan train``.
        name: the data set; by default the one it was trained on.
        decoding: ``image_column``, ``label_column`` and ``resize`` of :func:`data.load`, where
            they are not to be those of the training.

    Returns:
        ``data``, ``test_accuracy`` (or what else the task's score is called), ``test_loss``,
        ``checkpoint_bytes``; of image classification ``images``, too, how many there are.
    """
    model, header = rebuild(path)
    extra = header["extra"]
    task = _task(extra, name, **decoding)
    more = {}
    if isinstance(task, Classification):
        images = task.images
        if list(images.image_shape) != extra["image_shape"] or images.classes != extra["classes"]:
            raise SubspanError(
                f"{images.name} has {images.classes} classes and images of shape "
                f"{images.image_shape}; {path} was trained on {extra['classes']} and "
                f"{tuple(extra['image_shape'])}: give other --data; --resize changes the size of "
                "its images"
            )
        if images.depth != extra.get("depth", "8 bits"):
            raise SubspanError(
                f"{images.name} has images of {images.depth}, in which a level means another "
                f"brightness than in the images of {extra.get('depth', '8 bits')} that {path} was "
                "trained on: save them alike"
            )
        own = task.describe().get("names")
        if own and extra.get("names", own) != own:
            raise SubspanError(
                f"{images.name} has other classes ({', '.join(images.names[:5])}) than the images "
                f"that {path} was trained on, and they are numbered in the order of their names: "
                "name them alike"
            )
        mean, std = torch.tensor(extra["mean"]), torch.tensor(extra["std"])
        task = type(task)(replace(images, mean=mean, std=std), extra["net"])
        more = {"images": len(images.test)}
    loss, score = evaluate(model, task, "test")
    return {
        "data": name or extra["data"],
        f"test_{task.score.name.replace(' ', '_')}": score,
        "test_loss": loss,
        **more,
        "checkpoint_bytes": header["bytes"],
    }
