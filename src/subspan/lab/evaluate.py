"""Accuracy of a network, and of a checkpoint that is rebuilt from its file."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn
from torch.nn.functional import cross_entropy

from subspan import checkpoint
from subspan.errors import SubspanError
from subspan.lab import data, nets
from subspan.lab.config import DECODING
from subspan.subspace import SubspaceModel

BATCH = 1000


@torch.no_grad()
def evaluate(model: nn.Module, images: data.ImageData, split: data.Split) -> tuple[float, float]:
    """Mean cross entropy and accuracy (a fraction) on a split; the network stays in eval mode.

    Of a :class:`SubspaceModel` P w is computed once, and not for every batch.
    """
    model.eval()
    if isinstance(model, SubspaceModel):
        model = model.merge()
    loss = correct = 0.0
    for batch, labels in data.batches(split, BATCH, seed=0, epoch=0, shuffle=False):
        scores = model(images.normalize(batch)).float()
        loss += float(cross_entropy(scores, labels, reduction="sum"))
        correct += int((scores.argmax(dim=1) == labels).sum())
    return loss / len(split), correct / len(split)


def draw(name: str, image_shape: tuple[int, int, int], classes: int, seed: int) -> nn.Module:
    """A network by name; one that draws initial weights of its own draws them from this seed."""
    set_seed(seed % (1 << 32))  # as much as NumPy's generator takes
    return nets.build(name, image_shape, classes)


def rebuild(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint of the laboratory, and what the file says of it.

    Raises:
        SubspanError: if the file is unusable, or does not say which network it belongs to.
    """
    header = checkpoint.inspect(path)
    extra = header["extra"]
    if not {"net", "image_shape", "classes", "seed"} <= extra.keys():
        raise SubspanError(
            f"{path} does not say which network it belongs to: load it with subspan.load(path, net)"
        )

    def make() -> nn.Module:
        return draw(extra["net"], tuple(extra["image_shape"]), extra["classes"], extra["seed"])

    return checkpoint.load(path, make), header


def evaluate_checkpoint(
    path: str | os.PathLike[str], name: str | None = None, **decoding: Any
) -> dict[str, Any]:
    """Test accuracy of a checkpoint, on images read and normalised as in its training.

    Args:
        path: a checkpoint of ``subspan train``.
        name: the data set; by default the one it was trained on.
        decoding: ``image_column``, ``label_column`` and ``resize`` of :func:`data.load`, where
            they are not to be those of the training.

    Returns:
        ``data``, ``test_accuracy``, ``test_loss``, ``images``, ``checkpoint_bytes``.
    """
    model, header = rebuild(path)
    extra = header["extra"]
    as_trained = {key: extra[key] for key in DECODING if key in extra}
    given = {key: value for key, value in decoding.items() if value is not None}
    images = data.load(name or extra["data"], seed=extra["seed"], **as_trained | given)
    if list(images.image_shape) != extra["image_shape"] or images.classes != extra["classes"]:
        raise SubspanError(
            f"{images.name} has {images.classes} classes and images of shape {images.image_shape}; "
            f"{path} was trained on {extra['classes']} and {tuple(extra['image_shape'])}: give "
            "other --data; --resize changes the size of its images"
        )
    images = replace(images, mean=torch.tensor(extra["mean"]), std=torch.tensor(extra["std"]))
    loss, accuracy = evaluate(model, images, images.test)
    return {
        "data": images.name,
        "test_accuracy": accuracy,
        "test_loss": loss,
        "images": len(images.test),
        "checkpoint_bytes": header["bytes"],
    }
