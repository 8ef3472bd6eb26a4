"""Networks by name: those of the published experiments, and a user's own.

A name is one string that says everything, so that a record can rebuild its network:
``build("lenet")``, ``build("mlp-1024-512")``, ``build("package.module:function")``. The weights
are PyTorch's defaults (those of ``gressmann-…`` Keras's, as published); whoever needs a θ₀ that
every version of PyTorch reproduces overwrites them.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from subspan.errors import SubspanError, unknown
from subspan.layers import SpectralFilters

Shape = tuple[int, int, int]  # channels, height, width
Builder = Callable[[Shape, int], nn.Module]

_MLP = re.compile(r"mlp((?:-[1-9]\d*)*)")
_MLP_WIDTHS = (200,)  # of plain "mlp": the 784-200-10 of Minut 2023


class _Entry(NamedTuple):
    build: Builder
    smallest: int  # the least height and width that leaves every layer a pixel


def names() -> list[str]:
    """Names that `build` knows; it takes ``mlp-WIDTH-WIDTH…`` and ``module:function`` besides."""
    return sorted(["mlp", *_NETS])


def is_builtin(name: str) -> bool:
    """Whether `build` makes ``name`` itself, without importing a user's module."""
    return name in _NETS or _MLP.fullmatch(name) is not None


def build(name: str, input_shape: Shape = (1, 28, 28), classes: int = 10) -> nn.Module:
    """Build a network by name.

    Args:
        name: one of `names`; ``mlp-1024-512`` for a multi-layer perceptron of any widths; or
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
        return _build_users_own(name, input_shape, classes)
    if match := _MLP.fullmatch(name):
        widths = tuple(int(width) for width in match[1].split("-")[1:])
        return _feedforward(input_shape, classes, dense=widths or _MLP_WIDTHS)
    if name not in _NETS:
        raise unknown("net", name, [*names(), "mlp-WIDTH-WIDTH", "package.module:function"])
    entry = _NETS[name]
    _, height, width = input_shape
    if min(height, width) < entry.smallest:
        raise SubspanError(
            f"net {name!r} takes images of at least {entry.smallest}x{entry.smallest} pixels, "
            f"got {height}x{width}: use larger images (--resize {entry.smallest} makes them so), "
            "or the net 'mlp', which takes any size"
        )
    return entry.build(input_shape, classes)


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


def _linear(shape: Shape, classes: int) -> nn.Module:
    """A linear classifier: 7,850 weights at 28x28x1."""
    return _feedforward(shape, classes)


def _lenet(shape: Shape, classes: int) -> nn.Module:
    """LeNet-5 (LeCun 1998): images below 32 pixels are padded by 2, as 28x28 digits are there.

    61,706 weights at 28x28x1; 62,006 at 28x28x3 and at 32x32x3.
    """
    padding = 2 if min(shape[1:]) < 32 else 0
    return _feedforward(shape, classes, (_Conv(6, 5, padding), _Conv(16, 5)), (120, 84))


def _lenet_valid(shape: Shape, classes: int) -> nn.Module:
    """LeNet-5 without padding (Li 2018): 44,426 weights at 28x28x1, 62,006 at 32x32x3."""
    return _feedforward(shape, classes, (_Conv(6, 5), _Conv(16, 5)), (120, 84))


def _lenet5_caffe(shape: Shape, classes: int) -> nn.Module:
    """LeNet-5 of Caffe (Schotthöfer 2022): 431,080 weights at 28x28x1, 430,500 without biases."""
    return _feedforward(shape, classes, (_Conv(20, 5), _Conv(50, 5)), (500,))


def _lenet_tf(shape: Shape, classes: int) -> nn.Module:
    """LeNet of the TensorFlow tutorial (Wu 2018): 3,274,634 weights at 28x28x1."""
    return _feedforward(shape, classes, (_Conv(32, 5, 2), _Conv(64, 5, 2)), (1024,))


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


def _keras(net: nn.Module) -> nn.Module:
    """The network with initial weights as Keras draws them: Glorot's, biases 0."""
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.xavier_uniform_(parameter)
    return net


def _gressmann_fc(shape: Shape, classes: int) -> nn.Module:
    """FC of Gressmann 2020: 101,770 weights at 28x28x1, 394,634 at 32x32x3."""
    return _keras(_feedforward(shape, classes, dense=(128,)))


def _gressmann_cnn(shape: Shape, classes: int) -> nn.Module:
    """CNN of Gressmann 2020: 93,322 weights at 28x28x1, 122,570 at 32x32x3."""
    convs = (_Conv(32, 3), _Conv(64, 3), _Conv(64, 3, pool=False))
    return _keras(_feedforward(shape, classes, convs, (64,)))


class _Crop(nn.Module):
    """The middle of an image, as high and wide as ``size``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        top, left = ((side - self.size) // 2 for side in x.shape[-2:])
        return x[..., top : top + self.size, left : left + self.size]


def _minut_mlp(shape: Shape, classes: int) -> nn.Module:
    """MLP with 200 hidden units on the middle 28x28 pixels (Minut 2023): 472,610 for CIFAR-10."""
    return nn.Sequential(_Crop(28), *_feedforward((shape[0], 28, 28), classes, dense=(200,)))


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
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(channels, classes)
    return nn.Sequential(layers)


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
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(channels, classes)
    return nn.Sequential(layers)


_NETS: dict[str, _Entry] = {
    "linear": _Entry(_linear, 1),
    "lenet": _Entry(_lenet, 12),
    "lenet-valid": _Entry(_lenet_valid, 16),
    "lenet5-caffe": _Entry(_lenet5_caffe, 16),
    "lenet-tf": _Entry(_lenet_tf, 4),
    "spectral": _Entry(_spectral, 10),
    "gressmann-fc": _Entry(_gressmann_fc, 1),
    "gressmann-cnn": _Entry(_gressmann_cnn, 18),
    "minut-mlp": _Entry(_minut_mlp, 28),
    "resnet8": _Entry(partial(_resnet, blocks=1), 1),
    "resnet20": _Entry(partial(_resnet, blocks=3), 1),
    "vgg11": _Entry(partial(_vgg, depth=11), 1),
    "vgg16": _Entry(partial(_vgg, depth=16), 1),
}


def _build_users_own(name: str, input_shape: Shape, classes: int) -> nn.Module:
    """Import ``package.module`` and call ``function`` with what it asks for by name."""
    match = re.fullmatch(r"(\w+(?:\.\w+)*):(\w+)", name)
    if match is None:
        raise SubspanError(f"expected a net of your own as 'package.module:function', got {name!r}")
    module_name, attribute = match.groups()
    # An installed command has its own folder first on sys.path, not the user's.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # An import that fails inside the user's module is the user's to see in full.
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise SubspanError(
            f"net {name!r}: there is no module {error.name!r} in {os.getcwd()} or among the "
            "installed packages: run from the folder that holds it, or install it"
        ) from error
    if not hasattr(module, attribute):
        public = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise unknown(f"function of {module_name}", attribute, public)
    function = getattr(module, attribute)
    if not callable(function) or isinstance(function, nn.Module):
        raise SubspanError(
            f"net {name!r}: expected a function or class that makes a network, "
            f"got {type(function).__name__}"
        )
    signature = inspect.signature(function)
    offered = {"input_shape": input_shape, "classes": classes}
    arguments = {key: value for key, value in offered.items() if key in signature.parameters}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise SubspanError(
            f"net {name!r} is called with input_shape and classes if it has them, and with nothing "
            f"else, but its signature is {signature}: give the other arguments defaults"
        ) from error
    net = function(**arguments)
    if not isinstance(net, nn.Module):
        raise SubspanError(f"net {name!r} must return a torch.nn.Module, got {type(net).__name__}")
    return net
