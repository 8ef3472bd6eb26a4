"""Weights that a network reads from layers which it does not call.

``linear(x, self.layer.weight)`` in a forward is right in a subspace, since whoever reads a weight
gets θ. But a LoRA is part of the call of its layer: a library that puts one beside the layer would
leave it out there.
"""

from __future__ import annotations

import functools
from types import FrameType

import torch
from torch import Tensor, nn

from subspan.subspace.links import find_link


class Reads:
    """Notices who reads weights, by the names of the weights."""

    def __init__(self) -> None:
        self._by_layers, self._by_others, self._used = set[str](), set[str](), set[str]()

    def apart(self) -> set[str]:
        """Return the weights that are used by others than their layers.

        Those are read by others alone, or a gradient has come to what others have read.
        """
        return (self._by_others - self._by_layers) | self._used

    def add(self, *tensors: str) -> None:
        """Take weights for such."""
        self._used.update(tensors)

    def note(self, tensor: str, reader: FrameType) -> None:
        """Note a read by a function, which may be a method of a layer that has the weight."""
        first = reader.f_code.co_varnames[:1]
        owner = reader.f_locals.get(first[0]) if first else None
        link = find_link(owner) if isinstance(owner, nn.Module) else None
        if link is not None and tensor in link.tensors.values():
            self.note_call(tensor)
        else:
            self._by_others.add(tensor)

    def note_call(self, tensor: str) -> None:
        """Note that the layer of a weight was called."""
        self._by_layers.add(tensor)

    def watch(self, tensor: str, product: Tensor, inside: bool) -> None:
        """Note that W + s B A is used, which a layer with factors does not read itself.

        Outside of calls that may be a part of a loss, but for a part of the network that is run
        again in the backward pass.
        """
        if product.requires_grad and (inside or torch._C._current_autograd_node() is not None):
            product.register_hook(functools.partial(self._use, tensor))

    def _use(self, tensor: str, gradient: Tensor) -> None:
        self._used.add(tensor)
