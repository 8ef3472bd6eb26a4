"""Where a network reads what a variant has beside its coordinates."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from subspan.errors import SubspanError
from subspan.subspace.adapted import ADAPTER
from subspan.subspace.at_base import is_at_base
from subspan.subspace.attach import link_module
from subspan.subspace.links import Behaviour, find_link, link_of
from subspan.subspace.parameters import saved_buffers
from subspan.subspace.variant import BESIDE, BesideDescriptor, split_by_row
from subspan.subspace.weights import Weights

_keys = itertools.count(1)


class Places:
    """The modules with fully trained parameters and buffers, whose reads may give a variant's.

    Raises:
        SubspanError: if a module cannot have another class; the network is then as it was.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        root = weights.network()
        buffers = saved_buffers(root)
        fully = {id(weights.stored(name)): name for name in weights.fully}
        names: dict[str, dict[str, str]] = {}
        for path, module in root.named_modules():
            prefix = f"{path}." if path else ""
            inside = {a: fully[id(p)] for a, p in module._parameters.items() if id(p) in fully}
            inside |= {a: prefix + a for a in module._buffers if prefix + a in buffers}
            if inside:
                names[path] = inside
        self._modules = {path: root.get_submodule(path) for path in names}
        for path, inside in names.items():
            self._describe(self._modules[path], path, inside)
        weights.key = weights.key or next(_keys)

    def _describe(self, module: nn.Module, path: str, names: dict[str, str]) -> None:
        """Let reads of these attributes look for a variant first."""
        if vars(module).get(BESIDE) == names:
            return  # of other Variants of the same model
        try:
            if find_link(module) is None:
                link_module(module, self.weights, {})
            module.__class__ = _make_reading(type(module), tuple(names))  # type: ignore[arg-type]
        except Exception as error:
            raise SubspanError(
                f"module {path or 'the network'} is a {type(module).__name__}, whose tensors "
                f"cannot be those of variants ({error}): leave it out of train_fully"
            ) from None
        module.__dict__[BESIDE] = names

    @property
    def by_row(self) -> bool:
        """Whether a batch of several variants can be one: all that they have is linear layers'."""
        plain = all(
            isinstance(module, LinearByRow) and ADAPTER not in vars(module)
            for module in self._modules.values()
        )
        return plain and self.weights.blocks_of.keys() <= self.weights.factors

    def check(self) -> None:
        """Refuse variants of a network that would not read them, or would change them."""
        root = self.weights.network()
        if root.training or any(module.training for module in self._modules.values()):
            raise SubspanError("variants are for inference: call eval() of the network first")
        if is_at_base(self.weights):
            raise SubspanError(
                "no variant can be used inside of at_base(), which gives θ₀ to all reads: leave it "
                "first"
            )
        modules = dict(root.named_modules()) if self._modules else {}
        for path, module in self._modules.items():
            if modules.get(path) is not module:
                raise SubspanError(
                    f"{path} was replaced after the variants were made, and would not have "
                    "theirs: make the Variants anew"
                )


@functools.cache
def _make_reading(made: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    """Make the class of a module whose attributes of these names are read through descriptors."""
    body: dict[str, Any] = {name: BesideDescriptor(name) for name in attributes}
    body |= {"__module__": made.__module__, "__doc__": made.__doc__}
    body["__qualname__"] = made.__qualname__
    bases: tuple[type, ...] = (made,)
    if made.forward is nn.Linear.forward:
        bases = (LinearByRow, made)
    cls: type[nn.Module] = type.__new__(type(made), made.__name__, bases, body)
    return cls


class LinearByRow(Behaviour):
    """The behaviour of a linear layer of which each row of a batch may have another."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply all rows by one weight, or each by its own."""
        weight: Any = self.weight
        bias: Any = self.bias
        by_row = weight.dim() > 2 or (bias is not None and bias.dim() > 1)
        if torch.compiler.is_compiling() or not by_row:
            return super().forward(x)
        rows = split_by_row(link_of(self).weights, x, min(vars(self)[BESIDE].values()))
        out = rows @ weight.mT
        if bias is not None:
            out = out + (bias if bias.dim() == 1 else bias.unsqueeze(1))
        return out.view(*x.shape[:-1], out.shape[-1])
