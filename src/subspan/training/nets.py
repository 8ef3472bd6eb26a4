"""Networks by name: those of the published experiments, and a user's own.

A name is one string that says everything, so that a record can rebuild its network:
``build("lenet")``, ``build("mlp-1024-512")``, ``build("package.module:function")``. The weights
are PyTorch's defaults (those of ``gressmann-…`` Keras's, as published); whoever needs a θ₀ that
every version of PyTorch reproduces overwrites them.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn

from subspan.errors import SubspanError, unknown
from subspan.layers import SpectralFilters
from subspan.training import own

Shape = tuple[int, int, int]  # channels, height, width
Builder = Callable[[Shape, int], nn.Module]

# Those of any size; "minut-" crops. Plain names are the 784-200-10 and the LeNet of Minut 2023.
_MLP = re.compile(r"(minut-)?mlp((?:-[1-9]\d*)*)")
_SEPARABLE = re.compile(r"separable(-ln)?((?:-[1-9]\d*){2,})")
_LENET = re.compile(r"(minut-)?lenet(?:-k([1-9]))?((?:-[1-9]\d*){2,})?")


class _Entry(NamedTuple):
    build: Builder
    smallest: int  # the least height and width that leaves every layer a pixel


@dataclass(frozen=True)
class Widths:
    """The widths of a network with layers of any width: a LeNet if it has channels, else an MLP."""

    crop: bool  # whether it sees the middle 28x28 pixels only, as in Minut 2023
    channels: tuple[int, ...]  # of the two convolutions; none in a perceptron
    dense: tuple[int, ...]  # units of the hidden dense layers
    kernel: int = 5  # height and width of the convolutions' kernels

    @property
    def name(self) -> str:
        """The name that :func:`build` makes this network from."""
        kind = f"lenet-k{self.kernel}" if self.channels else "mlp"
        return "-".join(["minut"] * self.crop + [kind, *map(str, self.channels + self.dense)])


def widths(name: str) -> Widths | None:
    """Return the widths behind a name, None if it is of no network with widths."""
    if match := _MLP.fullmatch(name):
        return Widths(bool(match[1]), (), _numbers(match[2]) or (200,))
    if match := _LENET.fullmatch(name):
        units = _numbers(match[3] or "") or (6, 16, 120, 84)
        return Widths(bool(match[1]), units[:2], units[2:], int(match[2] or 5))
    return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("-")[1:])


def names() -> list[str]:
    """Names that `build` knows; it takes those with WIDTHs and ``module:function`` besides."""
    return sorted([*_WITH_WIDTHS, *_NETS])


def is_builtin(name: str) -> bool:
    """Return whether `build` makes ``name`` itself, without importing a user's module."""
    return name in _NETS or widths(name) is not None or _SEPARABLE.fullmatch(name) is not None


def build(name: str, input_shape: Shape = (1, 28, 28), classes: int = 10) -> nn.Module:
    """Build a network by name.

    Args:
        name: one of `names`; ``mlp-1024-512`` for a multi-layer perceptron of any widths;
            ``lenet-k3-4-8-32`` for a LeNet with kernels of 3x3, 4 and 8 channels and a hidden layer
            of 32 units (``lenet-4-8`` has kernels of 5x5 and no hidden layer);
            ``separable-8-16-16`` for a convolution of 8 channels and two separable ones of 16,
            ``separable-ln-8-16-16`` for one with layer normalisation after each of these; or
            ``package.module:function`` for a function (or class) of your own, which gets
            ``input_shape`` and ``classes`` if it has parameters of these names.
        input_shape: channels, height and width of one image.
        classes: number of outputs.

    Returns:
        A network from images (N, C, H, W) to logits (N, classes).

    Raises:
        SubspanError: the name is unknown, the image is too small for the architecture, or the
            user's function cannot be found, called, or returns no ``nn.Module``.
    """
    if len(input_shape) != 3 or min(*input_shape, classes) < 1:
        raise SubspanError(
            "a net needs an input shape of three positive integers (channels, height, width) and "
            f"at least one class, got input_shape={input_shape} and classes={classes}"
        )
    if ":" in name:
        net = own.call("net", name, {"input_shape": input_shape, "classes": classes})
        if not isinstance(net, nn.Module):
            raise SubspanError(
                f"net {name!r} must return a torch.nn.Module, got {type(net).__name__}"
            )
        return net
    entry = _entry(name)
    _, height, width = input_shape
    if min(height, width) < entry.smallest:
        raise SubspanError(
            f"net {name!r} takes images of at least {entry.smallest}x{entry.smallest} pixels, "
            f"got {height}x{width}: use larger images (--resize {entry.smallest} makes them so), "
            "or the net 'mlp', which takes any size"
        )
    try:
        return entry.build(input_shape, classes)
    except (MemoryError, RuntimeError, TypeError) as error:  # TypeError: of more than 63 bits
        raise SubspanError(
            f"net {name!r} is larger than the memory of this machine: make it smaller"
        ) from error


def weights(name: str, input_shape: Shape = (1, 28, 28), classes: int = 10) -> int:
    """Count the weights of the network of that name."""
    return sum(p.numel() for p in build(name, input_shape, classes).parameters())


def _entry(name: str) -> _Entry:
    if chosen := widths(name):
        return _with_widths(chosen)
    if match := _SEPARABLE.fullmatch(name):
        stem, *stack = _numbers(match[2])
        made = partial(_separable, stem=stem, stack=stack, norm=bool(match[1]))
        return _Entry(made, 4 + 4 * len(stack))
    if name not in _NETS:
        raise unknown("net", name, [*names(), *_FORMS, "package.module:function"])
    return _NETS[name]


class _Conv(NamedTuple):
    channels: int
    kernel: int
    padding: int = 0
    pool: bool = True


def _feedforward(
    shape: Shape, classes: int, convs: tuple[_Conv, ...] = (), dense: tuple[int, ...] = ()
) -> nn.Sequential:
    """Convolutions (each ReLU, then max-pool 2), flattened into dense layers (ReLU between)."""
    channels, height, width = shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, conv in enumerate(convs, start=1):
        layers[f"conv{i}"] = nn.Conv2d(channels, conv.channels, conv.kernel, padding=conv.padding)
        layers[f"conv{i}_relu"] = nn.ReLU()
        channels = conv.channels
        height, width = (side + 2 * conv.padding - conv.kernel + 1 for side in (height, width))
        if conv.pool:
            layers[f"conv{i}_pool"] = nn.MaxPool2d(2)
            height, width = height // 2, width // 2
    layers["flatten"] = nn.Flatten()
    features = channels * height * width
    for i, units in enumerate(dense, start=1):
        layers[f"fc{i}"] = nn.Linear(features, units)
        layers[f"fc{i}_relu"] = nn.ReLU()
        features = units
    layers[f"fc{len(dense) + 1}"] = nn.Linear(features, classes)
    return nn.Sequential(layers)


def _with_widths(chosen: Widths) -> _Entry:
    """Return a perceptron, 159,010 weights with 200 units at 28x28x1; or a LeNet-5 (LeCun 1998).

    LeNet's images below 32 pixels are padded by 2, as 28x28 digits are there (with kernels of
    another size by half of it): 61,706 weights at 28x28x1; 62,006 at 28x28x3 and at 32x32x3.
    """

    def build(shape: Shape, classes: int) -> nn.Module:
        seen = (shape[0], 28, 28) if chosen.crop else shape
        convs = [_Conv(channels, chosen.kernel) for channels in chosen.channels]
        if convs and min(seen[1:]) < 32:
            convs[0] = convs[0]._replace(padding=chosen.kernel // 2)
        net = _feedforward(seen, classes, tuple(convs), chosen.dense)
        if not chosen.crop:
            return net
        return nn.Sequential(OrderedDict([("crop", _Crop(28)), *net.named_children()]))

    # Even kernels leave a padded image a pixel larger.
    smallest = 2 * chosen.kernel + 1 + chosen.kernel % 2 if chosen.channels else 1
    return _Entry(build, 28 if chosen.crop else smallest)


def _classifying(layers: dict[str, nn.Module], features: int, classes: int) -> nn.Sequential:
    """Add an average over the image, and a linear classifier of it."""
    head = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict(layers | head, fc1=nn.Linear(features, classes)))


def _separable(
    shape: Shape, classes: int, stem: int, stack: Sequence[int], norm: bool
) -> nn.Sequential:
    """Separable convolutions (Sifre 2014) at one resolution, then an average over the image.

    The form of the smallest networks that people have published for MNIST: little of it depends on
    the size of the image, and without padding a pixel's distance from the border is seen. Photos
    take normalisation: without weights, over all channels and pixels of an image.
    """
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(shape[0], stem, 3), conv1_relu=nn.LeakyReLU(0.1), conv1_pool=nn.MaxPool2d(2)
    )
    for i, (before, after) in enumerate(pairwise([stem, *stack]), start=2):
        layers[f"conv{i}_depthwise"] = nn.Conv2d(before, before, 3, groups=before, bias=False)
        layers[f"conv{i}"] = nn.Conv2d(before, after, 1)
        layers[f"conv{i}_relu"] = nn.LeakyReLU(0.1)
        if norm:
            layers[f"conv{i}_norm"] = nn.GroupNorm(1, after, affine=False)
    return _classifying(layers, stack[-1], classes)


def _spectral(shape: Shape, classes: int) -> nn.Module:
    """No convolutions (Wu 2018, section 6): two banks in the cosine spectrum, 2,048 units.

    8 filters of 100 coefficients each, 16 of 200, which halve the sides: 6,449,090 weights at
    28x28x1, most of them in the dense layer. As many coefficients as smooth diagonals have numbers
    (10 × 10, and 5 × 5 of 8 channels): filters may have any shape, but no width of their own.
    """
    channels, height, width = shape
    half = height // 2, width // 2
    layers = OrderedDict[str, nn.Module](
        filters1=SpectralFilters(channels, 8, (height, width), 100, support=10, stream=1),
        filters1_relu=nn.ReLU(),
        filters2=SpectralFilters(8, 16, (height, width), 200, half, support=5, stream=2),
        filters2_relu=nn.ReLU(),
        flatten=nn.Flatten(),
        fc1=nn.Linear(16 * math.prod(half), 2048),
        fc1_relu=nn.ReLU(),
        dropout=nn.Dropout(0.5),
        fc2=nn.Linear(2048, classes),
    )
    return nn.Sequential(layers)


def _keras(shape: Shape, classes: int, **layers: Any) -> nn.Module:
    """Return a network with initial weights as Keras draws them: Glorot's, biases 0."""
    net = _feedforward(shape, classes, **layers)
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.xavier_uniform_(parameter)
    return net


class _Crop(nn.Module):
    """The middle of an image, as high and wide as ``size``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        top, left = ((side - self.size) // 2 for side in x.shape[-2:])
        return x[..., top : top + self.size, left : left + self.size]


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is a 1x1 convolution if the shape changes."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.shortcut = (
            nn.Identity()
            if stride == 1 and channels == out
            else nn.Conv2d(channels, out, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def _resnet(shape: Shape, classes: int, blocks: int) -> nn.Module:
    """ResNet for CIFAR (He 2016, section 4.2) with ``blocks`` blocks in each of three stages.

    At 32x32x3 one block (resnet8) has 77,850 weights and 480 running statistics, which Gressmann
    2020 counts together as 78,330; three blocks (resnet20) have 272,282 and 1,376.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)
    layers["bn1"] = nn.BatchNorm2d(16)
    layers["relu1"] = nn.ReLU()
    channels = 16
    for stage, out in enumerate((16, 32, 64), start=1):
        for block in range(1, blocks + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            layers[f"stage{stage}_block{block}"] = _ResidualBlock(channels, out, stride)
            channels = out
    return _classifying(layers, channels, classes)


# Channels of 3x3 convolutions; a list ends where the image is halved.
_VGG = {
    11: ([64], [128], [256] * 2, [512] * 2, [512] * 2),
    16: ([64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3),
}


def _vgg(shape: Shape, classes: int, depth: int) -> nn.Module:
    """VGG (Simonyan 2015) with batch normalisation and one dense layer, as is usual for CIFAR-10.

    At 32x32x3: vgg11 has 9,228,362 weights, vgg16 14,724,042.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = shape[0]
    for stage, widths in enumerate(_VGG[depth], start=1):
        for i, out in enumerate(widths, start=1):
            layers[f"conv{stage}_{i}"] = nn.Conv2d(channels, out, 3, padding=1, bias=False)
            layers[f"bn{stage}_{i}"] = nn.BatchNorm2d(out)
            layers[f"relu{stage}_{i}"] = nn.ReLU()
            channels = out
        layers[f"pool{stage}"] = nn.MaxPool2d(2, ceil_mode=True)  # of images of any size
    return _classifying(layers, channels, classes)


_FORMS = (
    "mlp-WIDTH-WIDTH",
    "lenet-kKERNEL-CHANNELS-CHANNELS-WIDTH",
    "separable-CHANNELS-CHANNELS",
    "separable-ln-CHANNELS-CHANNELS",
)
_WITH_WIDTHS = ("mlp", "lenet", "minut-mlp", "minut-lenet")
_VALID = partial(_feedforward, convs=(_Conv(6, 5), _Conv(16, 5)), dense=(120, 84))
_CAFFE = partial(_feedforward, convs=(_Conv(20, 5), _Conv(50, 5)), dense=(500,))
_TF = partial(_feedforward, convs=(_Conv(32, 5, 2), _Conv(64, 5, 2)), dense=(1024,))
_CNN = partial(_keras, convs=(_Conv(32, 3), _Conv(64, 3), _Conv(64, 3, pool=False)), dense=(64,))
_NETS: dict[str, _Entry] = {  # with weights at 28x28x1, and perhaps at 32x32x3
    "linear": _Entry(_feedforward, 1),  # 7,850
    "lenet-valid": _Entry(_VALID, 16),  # LeNet-5 without padding (Li 2018): 44,426, 62,006
    "lenet5-caffe": _Entry(_CAFFE, 16),  # (Schotthöfer 2022): 431,080, 430,500 without biases
    "lenet-tf": _Entry(_TF, 4),  # of TensorFlow's tutorial (Wu 2018): 3,274,634
    "spectral": _Entry(_spectral, 10),
    "gressmann-fc": _Entry(partial(_keras, dense=(128,)), 1),  # (Gressmann 2020): 101,770, 394,634
    "gressmann-cnn": _Entry(_CNN, 18),  # (Gressmann 2020): 93,322, 122,570
    "resnet8": _Entry(partial(_resnet, blocks=1), 1),
    "resnet20": _Entry(partial(_resnet, blocks=3), 1),
    "vgg11": _Entry(partial(_vgg, depth=11), 1),
    "vgg16": _Entry(partial(_vgg, depth=16), 1),
}
