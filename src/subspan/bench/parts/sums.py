"""Products of sums against dense layers, and against forming their weights first."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from subspan import checkpoint
from subspan.bench.part import Measurement, Part, Quantity
from subspan.bench.settings import Bench
from subspan.bench.step import SHAPE, random_batch, training_step
from subspan.bench.timing import interleaved
from subspan.layers import ProductOfSums, ProductOfSumsLinear, recipes
from subspan.training import nets
from subspan.training.methods import method

ATOMS = 64  # of rank one
NET = "lenet-tf"


# Factors of LeNet, which the experiment prodsumnet-lenet takes from here. Each sum has p atoms. The
# inner sizes make the layers cheaper, too: 16 filters of which the second convolution's 64 are
# combinations, 64 numbers between the images and the 1024 units.
CONVOLUTIONS: dict[str, list[dict[str, Any]]] = {
    "conv1": [{"kind": "free", "inner": 4}, {"kind": "free"}],
    "conv2": [{"kind": "hash", "p": "p", "inner": 16}, {"kind": "hash", "p": "p"}],
}
DENSE: dict[str, list[dict[str, Any]]] = {
    "fc1": [{"kind": "hash", "p": "p", "inner": 64}, {"kind": "hash", "p": "p"}],
    "fc2": [{"kind": "hash", "p": "p"}],
}
BIAS = 10  # numbers for the biases of each layer


class Expanded(nn.Module):
    """A layer whose weight is formed first, whatever that costs."""

    def __init__(self, layer: ProductOfSumsLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, m) → (B, n)."""
        return F.linear(x, self.layer.weight, self.layer.full_bias())


def _layers(n: int, device: torch.device) -> dict[str, nn.Module]:
    rank1 = [{"kind": "rank1", "p": ATOMS}]
    factors = {
        "low_rank": recipes.low_rank(max(1, ATOMS // 2)),
        "hashed": recipes.hashed(ATOMS),
        "circulant": recipes.circulant(),
        "adaptive_fastfood": recipes.adaptive_fastfood(n),
        "kronecker_fc": recipes.kronecker_fc(n, n, max(1, n // 32), max(1, n // 32)),
    }
    like: dict[str, Any] = {"device": device}
    return {
        "dense": nn.Linear(n, n, **like),
        f"{ATOMS} of rank one, W first": Expanded(ProductOfSumsLinear(n, n, rank1, **like)),
        f"{ATOMS} of rank one": ProductOfSumsLinear(n, n, rank1, **like),
        **{name: ProductOfSumsLinear(n, n, some, **like) for name, some in factors.items()},
    }


def _networks(device: torch.device) -> dict[str, nn.Module]:
    def sums(p: int, factors: dict[str, Any]) -> nn.Module:
        options = {"p": p, "factors": factors, "bias": BIAS}
        return method("prodsum").wrap(nets.build(NET, SHAPE), 0, options)

    once = {"conv1|conv2|fc1|fc2": [{"kind": "hash", "p": "p"}]}
    networks = {
        "dense": nets.build(NET, SHAPE),
        "two sums": sums(656, CONVOLUTIONS | DENSE),
        "one sum": sums(785, once),
    }
    return {name: net.to(device) for name, net in networks.items()}


def _passes(
    layer: nn.Module, width: int, batch_size: int, device: torch.device
) -> Callable[[], object]:
    x = torch.randn(batch_size, width, device=device, requires_grad=True)
    slope = torch.randn(batch_size, width, device=device)
    inputs = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), inputs, slope)


def _bytes_stored(net: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        checkpoint.save(net, file)
        return file.stat().st_size


def _bytes_of_m(net: nn.Module) -> int:
    sums = [s for layer in net.modules() if isinstance(layer, ProductOfSums) for s in layer.sums]
    return sum(4 * max(s.p, 1) * s.n * s.m for s in sums)  # of a fixed factor there is one


def _rows(
    what: str,
    networks: Mapping[str, nn.Module],
    steps: Mapping[str, Callable[[], object]],
    settings: Bench,
) -> list[Measurement]:
    timings = interleaved(steps, settings.seconds, settings.torch_device)
    return [
        {
            "what": what,
            "projection": name,
            "batch_size": settings.batch_size,
            "step": timings[name],
            "numbers": sum(p.numel() for p in net.parameters()),
            "bytes_stored": _bytes_stored(net),
            "bytes_of_m": _bytes_of_m(net),
        }
        for name, net in networks.items()
    ]


class SumsPart(Part):
    """Products of sums: a layer, and LeNet."""

    name = "sums"
    help = "products of sums against dense layers: a layer, and a training step of LeNet"
    shared = ("what",)
    quantities = (Quantity("step", "ms", "a training step"),)
    counts: Mapping[str, str] = {
        "numbers": "numbers",
        "bytes_stored": "bytes stored",
        "bytes_of_m": "bytes of M",
    }
    title = "{what}, batch {batch_size}"
    heading = "{what}, batch of {batch_size}"
    subject, base_name = "made of", "dense"
    unit = "times the dense one"

    def count(self, settings: Bench) -> int:
        """Count the layer and the network."""
        return 2

    def measure(self, settings: Bench, done: Callable[[str], None]) -> list[Measurement]:
        """Time forward and backward pass of one n × n layer, and training steps of LeNet.

        Returns:
            Rows with ``what`` is timed, ``projection`` (what the layers are; first "dense"),
            ``numbers`` that are trained, ``bytes_stored`` in a checkpoint, ``bytes_of_m`` (of the
            matrices Mⱼ, had they to be stored whole), ``batch_size`` and the timing ``step``.
        """
        width, batch_size, device = settings.width, settings.batch_size, settings.torch_device
        layers = _layers(width, device)
        passes = {name: _passes(net, width, batch_size, device) for name, net in layers.items()}
        what = f"a layer {width:,} × {width:,}, forward and backward"
        rows = _rows(what, layers, passes, settings)
        done("layers as products of sums")
        x, y = random_batch(batch_size, device)
        networks = _networks(device)
        steps = {name: training_step(net, x, y) for name, net in networks.items()}
        rows += _rows(f"a training step of {NET}", networks, steps, settings)
        done(f"training steps of {NET}")
        return rows


SumsPart()
