"""The score of a network, and of a checkpoint that is rebuilt from its file."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from subspan import checkpoint
from subspan.errors import SubspanError
from subspan.subspace import init
from subspan.subspace.model import SubspaceModel
from subspan.subspace.parameters import digest_buffers
from subspan.training import state, tasks
from subspan.training.config import Training
from subspan.training.methods import method
from subspan.training.tasks import Part, Task


def evaluate(model: nn.Module, task: Task, part: Part) -> tuple[float, float]:
    """Loss and score of a model on a part of a task; the network stays in eval mode.

    Whatever the task does, a training goes on as if there had been no evaluation. Of a
    :class:`SubspaceModel` P w is computed once, and not for every batch.

    Raises:
        SubspanError: if what the task returns is no loss and score, or its evaluation trains.
    """
    net = model.eval().merge() if isinstance(model, SubspaceModel) else model.eval()
    before = _digests(net)
    # An evaluation may end in training mode, without gradients, or seed a generator.
    with state.aside(), torch.set_grad_enabled(torch.is_grad_enabled()):
        found = task.evaluate(net, part)
    model.eval()
    now = _digests(net)
    if changed := next((name for name in before if now.get(name) != before[name]), None):
        raise SubspanError(
            f"the task's evaluate changed {changed} of the network, as if the {part} part were "
            "to be trained on; in training mode BatchNorm does that: leave the network in eval mode"
        )
    try:
        loss, score = map(float, found)
    except (TypeError, ValueError) as error:
        raise SubspanError(
            f"the task's evaluate must return its loss and its score, two numbers, got {found!r}"
        ) from error
    return loss, task.score.checked(score)


def _digests(net: nn.Module) -> dict[str, str]:
    """Return a digest of every buffer of real numbers, by name; a counter may count calls."""
    digests = digest_buffers(net).items()
    return {name: digest for name, digest in digests if net.get_buffer(name).is_floating_point()}


def describe(task: Task, training: Training, seed: int) -> dict[str, Any]:
    """Describe network and task for a checkpoint, so that :func:`rebuild` finds them again."""
    own: dict[str, Any] = {"task": training.task} if training.task else {}
    if training.task or training.validation != Training.validation:
        own["validation"] = training.validation  # it decides which images give mean and deviation
    known = {"net": training.net, "data": training.data, "seed": seed}
    passing = {o.name for o in tasks.kind(training.task).options if not o.lasting}
    read = {name: v for name, v in training.task_options.items() if name not in passing}
    return known | read | own | tasks.describe(task)


@state.aside()
def rebuild(
    path: str | os.PathLike[str], net: str | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model of a checkpoint of the laboratory, and what the file says of it.

    ``net`` names its network, where it is not that of the training any more.

    Raises:
        SubspanError: if the file is unusable, or does not say which network it belongs to.
    """
    header = checkpoint.inspect(path)
    extra = header["extra"]
    if net is not None and "net" in extra:
        extra["net"] = net
    # A file of another program may say something else under the name of a task.
    of_a_run = {"net", "data", "seed"} <= extra.keys()
    make = tasks.kind(extra.get("task")).network(extra) if of_a_run else None
    if make is None:
        raise SubspanError(
            f"{path} does not say which network it belongs to: load it with subspan.load(path, net)"
        )
    if header["kind"] != "part":
        return checkpoint.load(path, make), header
    seed = extra.get("init_seed")
    begun = make() if seed is None else init.build(make, seed)
    how = method(extra["method"])
    return checkpoint.load(path, how.wrap(begun, extra["seed"], extra["options"])), header


def evaluate_checkpoint(
    path: str | os.PathLike[str], name: str | None = None, *, net: str | None = None, **options: Any
) -> dict[str, Any]:
    """Test score of a checkpoint; the data are read and normalised as in its training.

    The data set, the name of the network, and options of the task, as ``resize``, may be others
    than in the training.

    Returns:
        ``data``, ``test_accuracy`` (or what else the task's score is called), ``test_loss``,
        ``checkpoint_bytes``; of image classification ``images``, too, how many there are.
    """
    model, header = rebuild(path, net)
    extra = header["extra"]
    task = tasks.again(extra, name, **options).as_trained(extra, str(path))
    loss, score = evaluate(model, task, "test")
    return {
        "data": extra["data"] if name is None else name,
        f"test_{task.score.name.replace(' ', '_')}": score,
        "test_loss": loss,
        **task.sizes(),
        "checkpoint_bytes": header["bytes"],
    }
