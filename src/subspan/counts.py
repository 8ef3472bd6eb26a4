"""Counts of a network's numbers: to store, to run, to train, and with every layer dense."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.optim import Optimizer

from subspan.layers.protocol import Compressed, compressed_layers, layer_type
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
    layers = compressed_layers(net).values()
    inside = {id(p) for layer in layers for p in layer.parameters()}
    matrices = sum(p.numel() for p in net.parameters() if id(p) not in inside and p.dim() > 1)
    types: dict[type[Compressed], list[Compressed]] = {}
    for layer in layers:
        types.setdefault(layer_type(layer.type_name), []).append(layer)
    published: dict[str, int] = {}
    for kind, of_kind in types.items():
        published |= kind.published_counts(of_kind, matrices)
    return Counts(
        dense=numbers + sum(layer.dense_numbers - layer.own_numbers for layer in layers),
        inference=numbers + sum(layer.inference_numbers - layer.own_numbers for layer in layers),
        stored=numbers + buffers,
        training=training,
        published=published,
    )
