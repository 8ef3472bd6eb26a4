"""Small convolutional networks that apply one layer again and again.

Depth costs no numbers where its layers share their weights, and neither does the width of a network
that is trained in a random subspace; what counts then is what the network can do at all. These
take the layer shared over depth from small networks for MNIST that people have published, and
leave images their position: the last layer sees a grid of 3×3 averages, not one of the whole image.
The normalisation has neither weights nor buffers, so that nothing beside the coordinates is stored.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

NAME = re.compile(r"tied((?:-[1-9]\d*){3,})")
GRID = 3  # the height and width to which the last features are averaged


class Tied(nn.Module):
    """A stem and stages of halved size, each of which applies one convolution several times.

    Args:
        shape: channels, height and width of the images.
        classes: outputs.
        repeats: how often a stage applies its shared convolution.
        stem: channels of the first convolution.
        widths: channels of the stages, in a list.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        repeats: int,
        stem: int,
        widths: Sequence[int],
    ) -> None:
        super().__init__()
        self.repeats = repeats
        self.stem = _normalised(nn.Conv2d(shape[0], stem, 3, padding=1))
        self.entries, self.shared = nn.ModuleList(), nn.ModuleList()
        for before, width in zip((stem, *widths), widths, strict=False):
            self.entries.append(_separable(before, width))
            self.shared.append(_separable(width, width))
        self.halve = nn.MaxPool2d(2)
        self.grid = nn.AdaptiveAvgPool2d(GRID)
        self.head = nn.Linear(widths[-1] * GRID**2, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, C, H, W)."""
        x = self.stem(x)
        for entry, shared in zip(self.entries, self.shared, strict=True):
            x = entry(self.halve(x))
            for _ in range(self.repeats):
                x = shared(x)
        return self.head(self.grid(x).flatten(1))


def _normalised(*convolutions: nn.Module) -> nn.Sequential:
    """Convolutions, ReLU, and a normalisation of each image without weights of its own.

    It comes last: averages of what is positive still say how much of it there is.
    """
    last = convolutions[-1]
    assert isinstance(last, nn.Conv2d)
    norm = nn.GroupNorm(1, last.out_channels, affine=False)
    names = ("depthwise", "pointwise") if len(convolutions) == 2 else ("conv",)
    layers = OrderedDict(zip(names, convolutions, strict=True))
    return nn.Sequential(OrderedDict([*layers.items(), ("relu", nn.ReLU()), ("norm", norm)]))


def _separable(channels: int, out: int) -> nn.Sequential:
    """Return a convolution of 3×3 of each channel, and one of 1×1 between channels (Sifre 2014)."""
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    return _normalised(depthwise, nn.Conv2d(channels, out, 1))
