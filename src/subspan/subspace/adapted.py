"""LoRA factors beside a weight: a layer whose weight is W + s B A, with A and B at θ = θ₀ + P w.

Source: Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022; a subspace of
the factors of all layers: Li et al., "Uni-LoRA: one vector is all you need", NeurIPS 2025.

A layer has factors as long as its network is in a subspace: :mod:`subspan.adapters` puts them there
just before it is wrapped, and :func:`subspan.subspace.attach.detach` takes them out. They are
trained tensors as any other. Whoever reads the layer's weight gets W + s B A; the layer itself
multiplies by W, A and B in turn, in the order and the dtypes of PEFT (``peft/tuners/lora``), so
that what it returns has the bits of PEFT's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from subspan.precision import full_precision
from subspan.subspace.links import LINK, PREFIX, Behaviour
from subspan.subspace.variant import split_by_row

ADAPTER = "_subspan_adapter"  # in a module's __dict__: its Adapter
FACTORS = (PREFIX + "A", PREFIX + "B")  # of its parameters


@dataclass(frozen=True)
class Adapter:
    """The factors of one layer: A is (rank, m) and B (n, rank) of a weight (n, m)."""

    layer: str  # its name in the network
    scaling: float  # s
    transposed: bool  # whether the weight is stored as (m, n), as in transformers' Conv1D
    rounded: bool = False  # s B (A x), before it is added to W x, as PEFT does for bitsandbytes

    @property
    def weight(self) -> str:
        """The name of the weight."""
        return f"{self.layer}.weight"

    @property
    def factors(self) -> tuple[str, str]:
        """The names of A and B."""
        return f"{self.layer}.{FACTORS[0]}", f"{self.layer}.{FACTORS[1]}"

    def change(self, a: Tensor, b: Tensor) -> Tensor:
        """Return s B A in the shape of the stored weight, as PEFT's ``get_delta_weight`` does."""
        on_cpu = a.device.type == "cpu" and a.dtype in (torch.float16, torch.bfloat16)
        with full_precision(a.device):
            product = b.float() @ a.float() if on_cpu else b @ a
        product = (product.T if self.transposed else product) * self.scaling
        return product.to(a.dtype) if on_cpu else product

    def merge(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return W + s B A in the dtype of W, as PEFT's ``merge`` does."""
        return (weight + self.change(a, b)).to(weight.dtype)

    def add(self, result: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return W x + s B (A x) in the dtype of ``result``, W x, as PEFT's ``forward`` does."""
        update = functional.linear(functional.linear(x.to(a.dtype), a), b) * self.scaling
        if self.rounded:
            return result + (update if torch.is_autocast_enabled() else update.to(result.dtype))
        return (result + update).to(result.dtype)

    def add_by_row(self, result: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return W x + s B (A x) where each row has its own factors, by batched products.

        ``result`` is W x, (rows, …, n); x is (rows, k, m), a (rows, rank, m) and b (rows, n, rank).
        """
        inner = torch.bmm(x.to(a.dtype), a.mT)
        if inner.dtype == b.dtype == result.dtype and not self.rounded:
            flat = result.reshape(len(x), -1, result.shape[-1])
            return torch.baddbmm(flat, inner, b.mT, alpha=self.scaling).view(result.shape)
        update = (torch.bmm(inner, b.mT) * self.scaling).view(result.shape)
        return (result + update).to(result.dtype)


def find_adapters(net: nn.Module) -> dict[str, Adapter]:
    """Find the layers with factors: their adapters, by the name of the weight."""
    adapters = (vars(module).get(ADAPTER) for module in net.modules())
    return {adapter.weight: adapter for adapter in adapters if adapter is not None}


def remove_factors(net: nn.Module) -> None:
    """Take all factors out of a network, whose layers are then ordinary ones."""
    for module in net.modules():
        if vars(module).pop(ADAPTER, None) is not None:
            for name in FACTORS:
                module._parameters.pop(name, None)


class Adapted(Behaviour):
    """The behaviour of a layer with factors."""

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Return W x + s B (A x) + bias of the one input, whatever the layer calls it."""
        (x,) = (*inputs, *named.values())
        link, adapter, given = vars(self)[LINK], vars(self)[ADAPTER], False
        if not torch.compiler.is_compiling():
            link.weights.reads.note_call(adapter.weight)
        if "weight" in link.tensors:
            weight, given = link.weights.base_or_given(link.tensors["weight"])
            result = _multiply(x, weight, self.bias, adapter.transposed)
        else:  # a quantised one, which stays as its library has made it
            result = super().forward(x)
        if given:  # by a functional call, in place of W + s B A
            return result
        a, b = (getattr(self, name) for name in FACTORS)
        if a.dim() == 3:  # in a batch of several variants
            return adapter.add_by_row(result, split_by_row(link.weights, x, adapter.layer), a, b)
        return adapter.add(result, x, a, b)


def _multiply(x: Tensor, weight: Tensor, bias: Any, transposed: bool) -> Tensor:
    """Multiply as the forward of ``nn.Linear`` does, or that of transformers' Conv1D."""
    if not transposed:
        return functional.linear(x, weight, bias)
    shape = (*x.shape[:-1], weight.shape[1])
    return torch.addmm(bias, x.view(-1, x.size(-1)), weight).view(shape)
