"""Random changes of training images that leave their class as it is.

Each is a function from images (N, C, H, W), levels in [0, 255] of any dtype, to as many of the same
shape. What comes into the picture from outside is black. They draw from PyTorch's generator, which
a run seeds and keeps in its state, so that a run that goes on draws what it would have drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad

from subspan.errors import SubspanError, unknown
from subspan.training.config import split

Change = Callable[[Tensor], Tensor]

ANGLE, SCALE, SHEAR, SHIFT = math.radians(10), 0.1, 0.15, 1 / 14  # ±, of affine changes
BORDER = 1 / 8  # of the height and width, by which a crop may be off: 4 pixels of 32


def affine(images: Tensor) -> Tensor:
    """Turn, scale, shear and shift each image a little, as another hand writes a digit."""
    count = len(images)
    angle, scale, shear = (_spread(count, limit, images) for limit in (ANGLE, SCALE, SHEAR))
    x, y = (_spread(count, 2 * SHIFT, images) for _ in range(2))  # the picture is 2 wide
    sine, cosine, scale = angle.sin(), angle.cos(), 1 + scale
    rows = (scale * cosine, scale * (shear - sine), x), (scale * sine, scale * cosine, y)
    matrices = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    grid = affine_grid(matrices, list(images.shape), align_corners=False)
    return grid_sample(images.float(), grid, align_corners=False)


def crop(images: Tensor) -> Tensor:
    """Shift each image by up to an eighth of its height and width (He 2016: 4 pixels of 32)."""
    count, channels, *sides = images.shape
    borders = [math.ceil(side * BORDER) for side in sides]
    wide = pad(images, (borders[1], borders[1], borders[0], borders[0]))
    rows, columns = (
        torch.randint(2 * border + 1, (count, 1), device=images.device)
        + torch.arange(side, device=images.device)
        for border, side in zip(borders, sides, strict=True)
    )
    which = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    return wide[which, channel, rows[:, None, :, None], columns[:, None, None, :]]


def flip(images: Tensor) -> Tensor:
    """Turn half of the images left to right."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, images.flip(3), images)


CHANGES: dict[str, Change] = {change.__name__: change for change in (affine, crop, flip)}


def changes(names: str | list[str] | None) -> list[Change]:
    """Return changes by names, as "affine" or "crop,flip"; refuse others, and repeated ones."""
    given = () if names is None else split(names, "augment")
    for name in given:
        if name not in CHANGES:
            raise unknown("change of images", name, CHANGES)
    if len(set(given)) < len(given):
        raise SubspanError(f"augment has a change twice: {','.join(given)}")
    return [CHANGES[name] for name in given]


def _spread(count: int, limit: float, like: Tensor) -> Tensor:
    """Draw numbers uniformly in ±limit, float32 (count,)."""
    return (2 * torch.rand(count, device=like.device) - 1) * limit
