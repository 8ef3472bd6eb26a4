"""How many numbers a network is: to store, to run, to train, and were it dense."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.optim import Optimizer

from subspan.layers.lowrank import LowRank
from subspan.layers.product_of_sums import ProductOfSums
from subspan.subspace.model import SubspaceModel
from subspan.subspace.parameters import find_quantised, find_slots, saved_buffers


@dataclass(frozen=True)
class Counts:
    """Numbers of a network, tied ones once; ``str`` of it is a table.

    Args:
        dense: parameters of the network with every layer dense.
        inference: parameters that are needed to run it: r (n + m) of a factored layer, as
            ``layers.merge(net, factors=True)`` has them; coefficients of a product of sums;
            coordinates of a SubspaceModel.
        stored: in a checkpoint, with cores of factored layers and buffers that training changed, or
            that a user gave.
        training: parameters, their gradients, and the optimizer's state between two steps.
        published: the same as certain papers count it, by name.
    """

    dense: int
    inference: int
    stored: int
    training: int
    published: dict[str, int] = field(default_factory=dict)

    @property
    def compression(self) -> float:
        """The share of the dense network's numbers that inference does without."""
        return 1 - self.inference / self.dense

    def __str__(self) -> str:
        rows = [
            ("dense network", self.dense),
            ("to run it", self.inference),
            ("in a checkpoint", self.stored),
            ("in training", self.training),
            *self.published.items(),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(
            f"{name:<{width}}  {number:>13,}  {number / self.dense:8.2%}" for name, number in rows
        )


def count(net: nn.Module, optimizer: Optimizer | None = None) -> Counts:
    """Count the numbers of a network.

    Args:
        net: any module; factored layers and a SubspaceModel are counted as what they are.
        optimizer: whose state counts for training, after its first step.
    """
    net = SubspaceModel.of(net) or net
    buffers = sum(b.numel() for b in saved_buffers(net).values())
    trained = [p for p in net.parameters() if p.requires_grad]
    packed = {} if isinstance(net, SubspaceModel) else find_quantised(net, find_slots(net))
    numbers = sum(p.numel() for p in net.parameters())
    numbers += sum(t.numel() - net.get_parameter(name).numel() for name, t in packed.items())
    training = numbers + sum(p.numel() for p in trained)
    if optimizer is not None:
        training += sum(
            t.numel()
            for values in optimizer.state.values()
            for t in values.values()
            if isinstance(t, Tensor) and t.dim() > 0
        )
    if isinstance(net, SubspaceModel):
        summary = net.summary()
        stored = summary.trainable + sum(b.numel() for b in net.changed_buffers().values())
        return Counts(summary.weights, summary.trainable, stored, training + summary.weights)
    factored = [m for m in net.modules() if isinstance(m, LowRank)]
    sums = [m for m in net.modules() if isinstance(m, ProductOfSums)]
    sizes = [(*layer.shape, layer.rank) for layer in factored]
    rest = numbers - sum(r * (n + m) + r * r for n, m, r in sizes)
    published = {}
    if factored:
        inside = {id(p) for layer in factored for p in layer.parameters()}
        matrices = sum(p.numel() for p in net.parameters() if id(p) not in inside and p.dim() > 1)
        published = {
            "'params eval' of Schotthöfer 2022": sum(r * (n + 1) for n, _, r in sizes) + matrices,
            "'params train' of Schotthöfer 2022": sum(
                5 * r * (n + m) + 12 * r * r for n, m, r in sizes
            )
            + 2 * matrices,
        }
    # Their biases are as long as ever, and their coefficients are no weights.
    whole = sum(math.prod(layer.shape) + layer.bias_length for layer in sums)
    whole -= sum(p.numel() for layer in sums for p in layer.parameters())
    return Counts(
        dense=rest + whole + sum(n * m for n, m, _ in sizes),
        inference=rest + sum(r * (n + m) for n, m, r in sizes),
        stored=numbers + buffers,
        training=training,
        published=published,
    )
