"""The structure of a network: its linear layers, attentions, blocks and head.

Nothing here goes by a list of architectures. What counts is which modules lie in which, what they
are called, and the shapes of their parameters. A *path* is a module's name in the network.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from subspan.errors import SubspanError

_CALLED = re.compile("attention|attn", re.IGNORECASE)
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_BLOCKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def lies_in(path: str, outer: Collection[str]) -> bool:
    """Return whether a path, or one that leads to it, is among others."""
    while path and path not in outer:
        path = path.rpartition(".")[0]
    return path in outer


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is a linear layer of GPT-2, which transformers calls Conv1D."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")
        for cls in type(module).__mro__
    )


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer: dense, quantised, compressed, or with an adapter.

    A layer of a kind of its own counts if it has ``in_features`` and ``out_features`` and holds
    numbers itself.
    """
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return True
    if isinstance(inside := module._modules.get("base_layer"), nn.Module):  # an adapter of PEFT
        return is_linear(inside)
    own = any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))
    return own and hasattr(module, "in_features") and hasattr(module, "out_features")


@dataclass(frozen=True)
class Choice:
    """A choice of parameters by where they lie."""

    layers: frozenset[str] = frozenset()  # paths of modules: all parameters, those of parts, too
    holders: frozenset[str] = frozenset()  # paths of modules: their own parameters

    def holds(self, parameter: str) -> bool:
        """Return whether the parameter of a path is chosen."""
        holder = parameter.rpartition(".")[0]
        return holder in self.holders or lies_in(holder, self.layers)

    def __or__(self, other: Choice) -> Choice:
        return Choice(self.layers | other.layers, self.holders | other.holders)


class Structure:
    """The parts of a network that presets choose from."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.modules: dict[str, nn.Module] = dict(net.named_modules())
        self.linears: dict[str, nn.Module] = {}
        for path, module in self.modules.items():  # a module comes before its parts
            if is_linear(module) and not lies_in(path, self.linears):
                self.linears[path] = module
        self._listed = {
            f"{path}.{name}" if path else name
            for path, module in self.modules.items()
            if isinstance(module, _LISTS)
            for name in module._modules
        }
        self._attentions = self._find_attentions()
        self._stacks = [
            path
            for path, module in self.modules.items()
            if any(p.dim() > 2 and min(p.shape[-2:]) > 1 for p in _own(module))
            and not isinstance(module, _ConvNd)
            and not lies_in(path, self.linears)
        ]

    # ---- attention ---------------------------------------------------------------------------

    def attention(self) -> Choice:
        """Choose the projections of queries, keys and values, and the output's, also of experts."""
        layers = [path for path in self.linears if lies_in(path, self._attentions)]
        holders = [path for path in self._attentions if self._holds_projections(path)]
        holders += [p for p in self._stacks if lies_in(p.rpartition(".")[0], self._attentions)]
        return Choice(frozenset(layers), frozenset(holders))

    def _find_attentions(self) -> set[str]:
        """Find modules that are called attention and hold linear layers.

        The innermost such module is one. So is the module around it if that is called so, too, and
        adds no more than one linear layer: the output projection. Members of lists are blocks.
        """
        found: set[str] = set()
        for path, module in reversed(self.modules.items()):  # parts come before what holds them
            called = f"{path.rpartition('.')[2]} {type(module).__name__}"
            whole = not path and not isinstance(module, nn.MultiheadAttention)
            if whole or not _CALLED.search(called) or lies_in(path, self.linears):
                continue
            linears = [linear for linear in self.linears if lies_in(linear, [path])]
            if any(lies_in(part, [path]) for part in found):
                rest = [linear for linear in linears if not lies_in(linear, found)]
                if len(rest) <= 1 and path not in self._listed:
                    found.add(path)
            elif (linears and not self._holds_blocks(path)) or self._holds_projections(path):
                found.add(path)
        return found

    def _holds_projections(self, path: str) -> bool:
        """Return whether an attention has its projections among its own parameters."""
        module = self.modules[path]
        matrices = sum(p.dim() > 1 for p in _own(module))
        parts = any(lies_in(linear, [path]) for linear in self.linears)
        return isinstance(module, nn.MultiheadAttention) or (matrices > 1 and not parts)

    def _holds_blocks(self, path: str) -> bool:
        """Return whether a module holds a list of layers, so that it is more than an attention.

        An attention that lies in a block may hold a list of heads.
        """
        for name, module in self.modules[path].named_modules():
            inner = f"{path}.{name}" if name else path
            members = [f"{inner}.{member}" for member in module._modules]
            several = sum(any(lies_in(x, [m]) for x in self.linears) for m in members) > 1
            heads = isinstance(module, nn.ModuleList) and lies_in(path, self._listed)
            if isinstance(module, _LISTS) and several and not heads:
                return True
        return False

    # ---- the rest of a block -----------------------------------------------------------------

    def mlp(self) -> Choice:
        """Choose the linear layers of blocks outside of their attentions, and stacks of experts.

        The block of an attention is the nearest member of a list around it, or layer of PyTorch's
        Transformer, that has other linear layers, too. In members of that list without an attention
        (a hybrid network's, which have a recurrence or a convolution instead) it is the parts that
        are called as those of the block.
        """
        layers = [path for path in self.linears if not lies_in(path, self._attentions)]
        experts = [path for path in self._stacks if not lies_in(path, self._attentions)]
        names = (path.split(".") for path in layers + experts)
        holding = {"", *(p for parts in names for p in accumulate(parts, "{}.{}".format))}
        blocks: set[str] = set()
        for path in self._attentions:
            while not (self._is_block(path) and path in holding):
                if not path:
                    break
                path = path.rpartition(".")[0]
            else:
                blocks.add(path)
        for block in blocks & self._listed:
            around = block.rpartition(".")[0]
            parts = [p for p in self.modules[block]._modules if f"{block}.{p}" in holding]
            members = self.modules[around]._modules
            blocks |= {f"{around}.{m}.{part}".lstrip(".") for m in members for part in parts}
        return Choice(
            frozenset(path for path in layers if lies_in(path, blocks)),
            frozenset(path for path in experts if lies_in(path, blocks)),
        )

    def _is_block(self, path: str) -> bool:
        return path in self._listed or isinstance(self.modules[path], _BLOCKS)

    # ---- the head ----------------------------------------------------------------------------

    def head(self) -> Choice:
        """Choose the head: what makes the network's output from its features.

        Of a network of transformers it is what lies outside of its base model, else its output
        layer. A network that embeds its input itself is a base model. Of a network around some of
        these, or around parts of a base model, it is what lies outside of them. Of any other it is
        the module that is called head, if it has one, else the last layer, which must be linear.

        Raises:
            SubspanError: in words that follow "…, since": why there is none.
        """
        bases = [path for path, module in self.modules.items() if _is_pretrained(module)]
        if bases[:1] == [""]:
            base = str(self.net.base_model_prefix)
            if isinstance(self.net._modules.get(base), nn.Module) and self._embeds_in(base):
                return self._outside([base])
            output = self._output_layers()
            if output or type(self.net).__name__.endswith(("Model", "Backbone")):
                return Choice(frozenset(output))
            del bases[0]  # it stands around parts of a base model, a CLIP's images, say
        outermost = [path for path in bases if not lies_in(path, set(bases) - {path})]
        if outermost:
            outside = self._outside(outermost)
            if outside != Choice() or len(outermost) > 1:
                return outside
            inner = Structure(self.modules[outermost[0]]).head()
            at = f"{outermost[0]}."
            return Choice(*(frozenset(at + p for p in ps) for ps in (inner.layers, inner.holders)))
        if self.net._modules.get("head") is not None:
            return Choice(frozenset(["head"]))
        return Choice(frozenset([self._last()]))

    def output_layers(self) -> set[str]:
        """Return linear layers that give the network's output though their weights are tied."""
        embeddings = {
            id(module.weight)
            for module in self.modules.values()
            if isinstance(module, nn.Embedding)
        }
        tied = (p for p, m in self.linears.items() if id(m._parameters.get("weight")) in embeddings)
        return {*tied, *self._output_layers()}

    def _embeds_in(self, base: str) -> bool:
        """Return whether a base model embeds the input, or nobody says what does."""
        with contextlib.suppress(AttributeError, NotImplementedError):
            found = self.net.get_input_embeddings()  # type: ignore[operator]
            paths = [path for path, module in self.modules.items() if module is found]
            return not paths or lies_in(paths[0], [base])
        return True

    def _outside(self, bases: Collection[str]) -> Choice:
        full = (path for path, module in self.modules.items() if _own(module))
        # PEFT keeps a head as it was beside the one that it trains.
        kept = {p for p in self.modules if p.endswith(".original_module")}
        return Choice(holders=frozenset(p for p in full if not lies_in(p, {*bases, *kept})))

    def _output_layers(self) -> list[str]:
        found = None
        with contextlib.suppress(AttributeError, NotImplementedError):
            net: Any = self.net
            found = net.get_output_embeddings() if _is_pretrained(net) else None
        return [path for path, module in self.modules.items() if module is found]

    def _last(self) -> str:
        """Return the path of the last layer, which must be linear and stand alone."""
        full = [path for path, module in self.modules.items() if _own(module)]
        last = full[-1] if full else ""
        if last not in self.linears:
            raise SubspanError(f"its last layer, {last or 'itself'}, is not linear")
        if lies_in(last, {*self._attentions, *self.mlp().layers}):
            raise SubspanError(f"its last layer, {last}, is part of a block")
        parent = last.rpartition(".")[0]
        before = [path for path in self.linears if path.rpartition(".")[0] == parent][-2:-1]
        sizes = [getattr(self.modules[path], "in_features", None) for path in (*before, last)]
        feeds = [getattr(self.modules[path], "out_features", None) for path in before]
        if before and full[-2:-1] == before and sizes[0] == sizes[1] != feeds[0]:
            raise SubspanError(f"{before[0]} and {last} end it beside each other")
        return last


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module._parameters.values() if p is not None]


def _is_pretrained(module: nn.Module) -> bool:
    """Return whether a module is a model of transformers, or one that passes for it."""
    prefix = getattr(type(module), "base_model_prefix", None)
    return isinstance(prefix, str) and hasattr(module, "config")
