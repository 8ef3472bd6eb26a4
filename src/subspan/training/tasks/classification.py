"""Image classification: cross entropy, and the share of images that are told rightly."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from subspan.errors import SubspanError
from subspan.training import data, nets, state
from subspan.training.config import IMAGES, Option, Training
from subspan.training.data.augment import Change, changes
from subspan.training.data.cache import digest
from subspan.training.data.decode import parse_size
from subspan.training.tasks import TaskKind, in_eval, register
from subspan.training.tasks.classes import LABEL_COLUMN, ClassTask

BATCH = 1000  # images that are evaluated at a time


class Classification(ClassTask):
    """Images of some classes, and a network that :func:`subspan.training.nets.build` knows.

    The changes are made at random to a batch of training images, one after the other.
    """

    def __init__(self, images: data.ImageData, net: str, changes: Sequence[Change] = ()) -> None:
        self.images, self.net, self.changes = images, net, changes
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
        """Return the mean cross entropy, of images that are changed at random."""
        images = batch.images
        for change in self.changes:
            images = change(images)
        return cross_entropy(net(self.images.normalize(images)), batch.labels)

    def judge(self, net: nn.Module, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield scores and labels of all images of a part."""
        split: data.Split = getattr(self.images, part)
        for index in torch.arange(len(split), device=split.labels.device).split(BATCH):
            batch = split.select(index)
            yield net(self.images.normalize(batch.images)), batch.labels

    def describe(self) -> dict[str, Any]:
        """Return the network's input, so that it can be built and fed without the data."""
        images = self.images
        # A digest: of a thousand classes the names would be larger than the coordinates.
        names = {"names": digest(json.dumps(images.names))} if images.names else {}
        told = names if images.depth == "8 bits" else {**names, "depth": images.depth}
        return told | {
            "image_shape": list(images.image_shape),
            "classes": images.classes,
            "mean": [float(f"{m:.9g}") for m in images.mean],  # 9 digits tell float32 apart
            "std": [float(f"{s:.9g}") for s in images.std],
        }

    def as_trained(self, extra: Mapping[str, Any], path: str) -> Classification:
        """Return the task with images normalised as in the training of a checkpoint."""
        images = self.images
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
        own = self.describe().get("names")
        if own and extra.get("names", own) != own:
            raise SubspanError(
                f"{images.name} has other classes ({', '.join(images.names[:5])}) than the images "
                f"that {path} was trained on, and they are numbered in the order of their names: "
                "name them alike"
            )
        mean, std = torch.tensor(extra["mean"]), torch.tensor(extra["std"])
        return type(self)(replace(images, mean=mean, std=std), self.net, self.changes)

    def sizes(self) -> dict[str, int]:
        """Return the number of test images."""
        return {"images": len(self.images.test)}

    @torch.no_grad()
    def check(self, net: nn.Module) -> None:
        """Send one image through the network: a wrong shape becomes a sentence, no traceback."""
        images = self.images
        try:
            with in_eval(net):
                out = net(images.normalize(images.train.images[:1]))
        except Exception as error:  # of a user's own network it may be any
            raise SubspanError(
                f"the network does not take float32 images of shape {images.image_shape}: {error}"
            ) from error
        if not isinstance(out, Tensor) or tuple(out.shape) != (1, images.classes):
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise SubspanError(
                "the network must give one score per class, shape "
                f"(batch, {images.classes}), got {got}"
            )


class _Images(TaskKind):
    """Sets of images by name, networks by name."""

    options = (
        Option(
            "image_column",
            str | None,
            "the column of the images; null finds it by the columns' types and usual names",
        ),
        LABEL_COLUMN,
        Option(
            "resize",
            int | str | None,
            "the size to which all images are brought while they are read, 32, or 28x32 (height x "
            "width); null leaves them as they are, and then they must have one size",
        ),
        Option(
            "augment",
            str | list[str] | None,
            "random changes of training images: affine (turned, scaled, sheared and shifted a "
            "little), crop (shifted by up to an eighth), flip (left to right); several as "
            "[crop,flip]",
            lasting=False,
        ),
    )

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        if "resize" in options:
            parse_size(options["resize"])
        changes(options.get("augment"))

    def load(self, training: Training, seed: int) -> Classification:
        assert training.net is not None
        assert training.data is not None
        options = dict(training.task_options)
        chosen = changes(options.pop("augment", None))
        images = data.load(training.data, validation=training.validation, seed=seed, **options)
        return Classification(images, training.net, chosen)

    def network(self, extra: Mapping[str, Any]) -> Callable[[], nn.Module] | None:
        if not {"net", "image_shape", "classes", "seed"} <= extra.keys():
            return None

        def make() -> nn.Module:
            state.seed_generators(extra["seed"])
            return nets.build(extra["net"], tuple(extra["image_shape"]), extra["classes"])

        return make


register(_Images(IMAGES, "the classification of images; what is trained where no task is named"))
