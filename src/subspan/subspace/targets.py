"""Presets: weights that people choose by name, found by the structure of a network.

    attention         the projections of queries, keys and values, and of the output
    mlp               the linear layers of a block outside of its attention, and experts
    norms-and-biases  parameters with at most one dimension, and scales of norms; the head's not
    all-linear        linear layers, and all of the two first; not the output layer or the head
    head              what makes the output from the features of a pretrained network; or the last
                      linear layer

A preset stands wherever patterns do, also beside them in a list. It means linear layers with their
biases. If its name matches parameters by the rules of patterns, too (those of a module ``head``),
it is refused where both would choose differently; "preset:head" is the preset in any case.

A file has the names of presets in its recipe, and a digest of what they chose. Which tensors a
preset chooses is part of the format: another choice is another name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from subspan.errors import SubspanError, unknown
from subspan.subspace.adapted import FACTORS
from subspan.subspace.compartments import EXPLICIT, Aliases, Patterns, select
from subspan.subspace.structure import Choice, Structure, is_conv1d

PRESETS = ("attention", "mlp", "norms-and-biases", "all-linear", "head")

# Rates of Adam that work on pretrained networks with 1,000 coordinates of "hash", by what these
# move; "" is any other choice, and several presets together. HEAD_RATE is that of a new head.
# All but that of a subspace of the head, a guess, are measured on MPQA with MiniLM: the best in
# validation of three rates, each twice the one before (results/few-numbers-minilm).
RATES = {
    "attention": 0.06,
    "mlp": 0.06,
    "norms-and-biases": 0.06,
    "all-linear": 0.06,
    "head": 0.03,
    "factors": 0.04,
    "": 0.06,
}
HEAD_RATE = 1e-3

_LACKS = {
    "attention": "no module that is called attention and holds linear layers",
    "mlp": "no block with an attention and other linear layers",
    "norms-and-biases": "no parameter of one dimension outside of its head",
    "all-linear": "no linear layer before its output",
}
_NORMS = (nn.LayerNorm, nn.RMSNorm)


def default_rate(targets: Patterns, dim: int) -> float:
    """Return a learning rate of coordinates for Adam: that of RATES, scaled by √(1000 / d).

    A first step of Adam changes every coordinate by the rate, and θ by the rate times √d.
    """
    chosen = [targets] if isinstance(targets, str) else list(targets or ())
    preset = chosen[0].removeprefix(EXPLICIT) if len(chosen) == 1 else ""
    preset = "factors" if chosen == list(FACTORS) else preset
    return float(f"{RATES.get(preset, RATES['']) * math.sqrt(1000 / dim):.2g}")


class Presets:
    """The presets of one network.

    Shapes are those of the dense weights, where these are quantised.
    """

    names = PRESETS

    def __init__(self, net: nn.Module, paths: Aliases, shapes: Mapping[str, torch.Size]) -> None:
        self._net, self._paths, self._shapes = net, paths, shapes

    @functools.cached_property
    def _structure(self) -> Structure:
        return Structure(self._net)

    @functools.cached_property
    def _head(self) -> tuple[Choice, str]:
        """The head, and why there is none."""
        try:
            return self._structure.head(), ""
        except SubspanError as error:
            return Choice(), f": {error}"

    def tensors(self, preset: str) -> set[str]:
        """Return the names of the tensors that a preset chooses; none if the network lacks it.

        A tied tensor is chosen by any of its paths, and is the head's only if all of them are.
        """
        head = {t for t, paths in self._paths.items() if all(map(self._head[0].holds, paths))}
        if preset == "head":
            return head
        if preset == "norms-and-biases":
            flat = {tensor for tensor, shape in self._shapes.items() if len(shape) <= 1}
            modules = self._structure.modules.items()
            norms = Choice(holders=frozenset(p for p, m in modules if isinstance(m, _NORMS)))
            return (flat | self._chosen(norms)) - head
        structure = self._structure
        parts = {"attention": structure.attention, "mlp": structure.mlp}
        if preset in parts:
            return self._chosen(parts[preset]())
        output = structure.output_layers()
        linears = Choice(frozenset(path for path in structure.linears if path not in output))
        return self._chosen(linears | structure.attention() | structure.mlp()) - head

    def _chosen(self, choice: Choice) -> set[str]:
        return {tensor for tensor, paths in self._paths.items() if any(map(choice.holds, paths))}

    # ---- among patterns ----------------------------------------------------------------------

    def choose(self, pattern: str, matching: set[str], option: str) -> set[str]:
        """Return the tensors that a pattern means, which matches some by their names.

        Raises:
            SubspanError: if it names a preset that the network lacks, or might mean two things.
        """
        preset = pattern.removeprefix(EXPLICIT)
        if preset not in PRESETS:
            if preset != pattern:
                raise unknown(f"preset in {option}", preset, PRESETS)
            return matching
        if preset == pattern and matching:
            if (found := self.tensors(preset)) and found != matching:
                raise SubspanError(
                    f"{preset!r} in {option} is a preset, which chooses {len(found)} parameters of "
                    f"this network, and the name of a module that holds {len(matching)}: give "
                    f"'{EXPLICIT}{preset}' for the preset, or {sorted(matching)[0]!r} and the like"
                )
            return matching
        found = self.tensors(preset)
        if not found:
            lack = _LACKS.get(preset, f"no head of its own{self._head[1]}")
            raise SubspanError(
                f"{type(self._net).__name__} has {lack}, which {preset!r} in {option} asks for: "
                f"{self.describe()}; patterns choose parameters by their names"
            )
        return found

    def describe(self) -> str:
        """Say which presets the network has, and how many numbers they choose."""
        there = []
        for preset in PRESETS:
            if found := self.tensors(preset):
                numbers = sum(self._shapes[t].numel() for t in found if t in self._shapes)
                parameters = "parameter" + "s" * (len(found) > 1)
                there.append(f"{preset} ({numbers:,} numbers in {len(found)} {parameters})")
        return f"its presets are {', '.join(there)}" if there else "it has no presets"


def find_presets(recipe: Mapping[str, Any]) -> list[str]:
    """Return the presets, or patterns of their names, in the recipe of a model."""
    rules = recipe.get("compartments")
    patterns = [rule[0] for rule in rules] if isinstance(rules, list) else []
    for option in ("targets", "exclude", "train_fully"):
        given = recipe.get(option) or []
        patterns += [given] if isinstance(given, str) else given
    return [pattern for pattern in patterns if pattern.removeprefix(EXPLICIT) in PRESETS]


def find_linears(
    net: nn.Module, targets: Patterns = "all-linear", option: str = "targets"
) -> list[str]:
    """Find the linear layers that patterns or presets choose: those that LoRA can be added to.

    These are ``nn.Linear``, also quantised by bitsandbytes or torchao, and the ``Conv1D`` of GPT-2.
    The output projection of an ``nn.MultiheadAttention`` is none of them, since its weight is read
    and the layer is not called. A pattern that matches a module's name chooses that module.

    Returns:
        The names of the modules, in the order of ``named_modules``; a module that has several
        names has its first.

    Raises:
        SubspanError: for a pattern or a preset that chooses no linear layer.
    """
    modules = dict(net.named_modules())
    unused = {
        id(module.out_proj)
        for module in modules.values()
        if isinstance(module, nn.MultiheadAttention)
    }
    layers = {
        path: module
        for path, module in modules.items()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and id(module) not in unused
    }
    weights = {path: [f"{path}.weight" if path else "weight"] for path in layers}
    presets = Presets(net, weights, {path: layer.weight.shape for path, layer in layers.items()})
    aliases = {path: [path, *names] for path, names in weights.items()}
    chosen = select(aliases, targets, option, "linear layer", presets)
    return [path for path in layers if path in chosen]
