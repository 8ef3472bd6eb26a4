"""Image classification: cross entropy, and the share of images that are told rightly."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from subspan.errors import SubspanError
from subspan.training import data, nets
from subspan.training.config import Training
from subspan.training.tasks import Part, Task

BATCH = 1000  # images that are evaluated at a time


def load(training: Training, seed: int) -> Classification:
    """Return the data set and network of a run.

    Raises:
        SubspanError: if there is no such data set, or it cannot be read.
    """
    assert training.net is not None
    assert training.data is not None
    images = data.load(
        training.data, validation=training.validation, seed=seed, **training.decoding
    )
    return Classification(images, training.net)


class Classification(Task):
    """Images of some classes, and a network by name.

    Args:
        images: the data set.
        net: as :func:`subspan.training.nets.build` takes it.
    """

    def __init__(self, images: data.ImageData, net: str) -> None:
        self.images, self.net = images, net
        self.notes = images.notes

    def network(self) -> nn.Module:
        """Build the network, from images (N, C, H, W) to logits (N, classes)."""
        return nets.build(self.net, self.images.image_shape, self.images.classes)

    def size(self) -> int:
        """Return the number of training images."""
        return len(self.images.train)

    def batch(self, index: Tensor) -> data.Split:
        """Select images and labels."""
        return self.images.train.select(index)

    def loss(self, net: nn.Module, batch: data.Split) -> Tensor:
        """Return the mean cross entropy."""
        return cross_entropy(net(self.images.normalize(batch.images)), batch.labels)

    @torch.no_grad()
    def evaluate(self, net: nn.Module, part: Part) -> tuple[float, float]:
        """Return the mean cross entropy, and accuracy as a fraction."""
        split: data.Split = getattr(self.images, part)
        loss = correct = 0.0
        for index in torch.arange(len(split), device=split.labels.device).split(BATCH):
            batch = split.select(index)
            scores = net(self.images.normalize(batch.images)).float()
            loss += float(cross_entropy(scores, batch.labels, reduction="sum"))
            correct += int((scores.argmax(dim=1) == batch.labels).sum())
        return loss / len(split), correct / len(split)

    def describe(self) -> dict[str, Any]:
        """Return the network's input, so that it can be built and fed without the data."""
        images = self.images
        # A digest: of a thousand classes the names would be larger than the coordinates.
        text = json.dumps(images.names).encode()
        names = {"names": hashlib.blake2b(text, digest_size=8).hexdigest()} if images.names else {}
        told = names if images.depth == "8 bits" else {**names, "depth": images.depth}
        return told | {
            "image_shape": list(images.image_shape),
            "classes": images.classes,
            "mean": [float(f"{m:.9g}") for m in images.mean],  # 9 digits tell float32 apart
            "std": [float(f"{s:.9g}") for s in images.std],
        }

    def to(self, device: torch.device) -> Classification:
        """Return the set on another device."""
        return type(self)(self.images.to(device), self.net)

    @torch.no_grad()
    def check(self, net: nn.Module) -> None:
        """Send one image through the network: a wrong shape becomes a sentence, no traceback."""
        images = self.images
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
                "the network must give one score per class, shape "
                f"(batch, {images.classes}), got {got}"
            )
