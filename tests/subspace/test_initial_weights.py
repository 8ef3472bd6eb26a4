"""Initial weights as docs/format.md defines them, by tests/reference.py."""

import math
import struct

import pytest
import torch
from torch import nn

from subspan.subspace.init import initialize
from tests.reference import Numbers

SEED = (1 << 63) + 12345


def float32(x: float) -> float:
    """Rounded to float32; exact for a product of two float32."""
    return struct.unpack("f", struct.pack("f", x))[0]


class Raw(nn.Module):
    """Parameters outside of any layer, one of them in two slots."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(3, 4))
        self.scale = nn.Parameter(torch.full((5,), 7.0))
        self.again = self.matrix
        self.last = nn.Linear(4, 2)


LAYERS = {  # half-widths in the order of named_parameters; None: left alone
    "linear": (lambda: nn.Linear(6, 4), [math.sqrt(1 / 6), 0]),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), [math.sqrt(1 / 18), 0]),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), [math.sqrt(1 / 18), 0]),
    "embedding": (lambda: nn.Embedding(5, 3), [math.sqrt(3)]),
    "norm": (lambda: nn.BatchNorm2d(3), [None, 0]),
    "lstm": (lambda: nn.LSTM(3, 4), [math.sqrt(6 / 7), math.sqrt(6 / 8), 0, 0]),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2),
        [math.sqrt(6 / 8), 0, math.sqrt(1 / 4), 0],
    ),
    "raw": (Raw, [math.sqrt(6 / 7), None, math.sqrt(1 / 4), 0]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_the_documented_ones(name: str) -> None:
    make, bounds = LAYERS[name]
    net = make()
    before = [tensor.detach().clone() for tensor in net.parameters()]
    initialize(net, SEED)
    numbers = Numbers(SEED, 16)
    for p, (tensor, bound) in enumerate(zip(net.parameters(), bounds, strict=True)):
        if bound is None:
            assert torch.equal(tensor, before[p])
            continue
        draws = [2 * numbers.uniform(n, p) - 1 for n in range(tensor.numel())]
        expected = [float32(draw * float32(bound)) for draw in draws]
        assert tensor.flatten().tolist() == expected
