"""A data set as tensors: its splits, and the statistics that normalise it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from subspan.training.data.tensors import Raw, Tensors

PIECE = 2**20  # levels that are in memory as float64 at a time


@dataclass(frozen=True, eq=False)
class Split(Tensors):
    """Some labelled images."""

    images: Tensor  # uint8 (N, C, H, W); float32 where the files have more levels than 256
    labels: Tensor  # int64 (N,), in [0, classes)

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor) -> Split:
        """Return the samples at ``index`` (int64, on the split's device), in that order."""
        return Split(self.images.index_select(0, index), self.labels.index_select(0, index))


@dataclass(frozen=True, eq=False)
class RawData(Raw):
    """The content of a source of images."""

    train: Split  # the whole training part
    test: Split  # the test part
    classes: int  # number of classes
    names: tuple[str, ...] = ()  # of the classes, in order; empty where classes are only numbered
    depth: str = "8 bits"  # what a level means, one of `subspan.training.data.pixels.DEPTHS`


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageData(RawData):
    """An image classification set, ready to train on: its training part is without validation.

    Choices (learning rate, best epoch, early stopping) look at ``validation``; ``test`` is for
    the final evaluation alone.
    """

    name: str  # what it was loaded by
    image_shape: tuple[int, int, int]  # channels, height and width of every image
    validation: Split  # the part of the set's training part that was drawn for choices
    mean: Tensor  # float32 (C,), of the training part's levels, divided by 255
    std: Tensor  # float32 (C,), of the same

    def normalize(self, images: Tensor) -> Tensor:
        """Bring pixels (N, C, H, W) of a part to mean 0 and deviation 1 by channel, as float32."""
        mean, std = self.mean[:, None, None], self.std[:, None, None]
        return (images.float() / 255 - mean) / std


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, float32 (C,), of levels divided by 255.

    Images are uint8 or float32 (N, C, H, W) on the CPU, N at least 1. Neither depends on the number
    of threads. Those of 8 bits are exact, from counts of the levels. The deviation is at least one
    level, 1/255 (of float32, 2^-20 of the largest): a constant channel must not turn the rounding
    of its mean into a signal.
    """
    channels = images.transpose(0, 1).flatten(1)
    if images.is_floating_point():
        return _statistics_of_floats(channels)
    counts = torch.stack([torch.bincount(c, minlength=256) for c in channels]).double()
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(dim=1, keepdim=True)
    mean = (share * levels).sum(dim=1)
    variance = (share * (levels - mean[:, None]) ** 2).sum(dim=1)
    return mean.float(), variance.sqrt().clamp(min=1 / 255).float()


def _statistics_of_floats(channels: Tensor) -> tuple[Tensor, Tensor]:
    # By NumPy, which adds with one thread; in pieces, for they are of twice the size.
    means, deviations = [], []
    for levels in channels.numpy():
        mean = levels.mean(dtype=np.float64)
        pieces = np.split(levels, range(PIECE, levels.size, PIECE))
        variance = sum(float(np.square(piece - mean).sum()) for piece in pieces) / levels.size
        floor = float(np.abs(levels).max()) * 2.0**-20 or 1.0
        means.append(float(mean) / 255)
        deviations.append(max(variance**0.5, floor) / 255)
    return torch.tensor(means), torch.tensor(deviations)
