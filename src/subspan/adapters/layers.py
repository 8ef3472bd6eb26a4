"""The layers that LoRA can be beside: which of a network's, and what is said of the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from subspan.errors import SubspanError
from subspan.subspace.compartments import Patterns, select
from subspan.subspace.parameters import find_aliases, find_slots
from subspan.subspace.quantised import is_class, read_quantised
from subspan.subspace.quantised_layers import multiplies_itself
from subspan.subspace.structure import is_conv1d
from subspan.subspace.targets import Presets, find_linears
from subspan.subspace.wrapping import check_ordinary


def choose_layers(
    net: Any, targets: Patterns, exclude: Patterns, train_fully: Patterns, rank: int
) -> dict[str, nn.Module]:
    """Choose the linear layers of a network that get factors, by name, in the network's order.

    Raises:
        SubspanError: for a pattern that matches none, and a layer that LoRA cannot be beside.
    """
    check_ordinary(net)
    refuse_peft(net)
    tied = find_aliases(find_slots(net))
    presets = Presets(net, tied, {name: net.get_parameter(name).shape for name in tied})
    fully = select(tied, train_fully, "train_fully", presets=presets)
    left_out = find_linears(net, exclude, "exclude") if exclude is not None else []
    modules = dict(net.named_modules())
    first = {id(module): name for name, module in modules.items()}
    layers = {
        name: modules[name]
        for name in find_linears(net, targets)
        if name not in left_out and f"{name}.weight" not in fully
    }
    if not layers:
        raise SubspanError(
            "no layer is left for LoRA: give targets, or take some out of exclude and train_fully"
        )
    paths: dict[str, list[str]] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        paths.setdefault(first[id(module)], []).append(path)
    for name, module in layers.items():
        _check_layer(name, module, rank, tied, paths[name])
    return layers


def refuse_peft(net: nn.Module) -> None:
    """Refuse a network that has layers of PEFT's."""
    for name, module in net.named_modules():
        if is_class(type(module), "peft", "BaseTunerLayer"):
            raise SubspanError(
                f"{name} is a {type(module).__name__} of PEFT: merge its adapter first "
                "(merge_and_unload()), or train it in a subspace by SubspaceModel"
            )


def computes_product(module: nn.Module) -> bool:
    """Return whether a layer computes W x + b and nothing else."""
    cls = getattr(type(module), "_subspan_class", (type(module),))[0]  # of one in a subspace
    if multiplies_itself(cls):
        return True
    if is_conv1d(module):
        return cls.__name__ == "Conv1D"
    return isinstance(module, nn.Linear) and cls.forward is nn.Linear.forward


def weight_of(layer: nn.Module) -> tuple[tuple[int, int], bool, Tensor]:
    """Return n and m of a linear layer, whether its weight is stored (m, n), and a like tensor.

    The like tensor has the device of the weight, and the dtype of its dense form.
    """
    weight = layer._parameters["weight"]
    packed = read_quantised(layer, "weight")
    n, m = weight.shape if packed is None else packed.shape  # type: ignore[union-attr]
    like = weight if packed is None else torch.empty(0, dtype=packed.dtype, device=packed.device)
    transposed = is_conv1d(layer)
    return ((m, n) if transposed else (n, m)), transposed, like  # type: ignore[return-value]


def _check_layer(
    name: str, layer: nn.Module, rank: int, tied: dict[str, list[str]], paths: Iterable[str]
) -> None:
    """Refuse a layer that LoRA cannot be beside, or that PEFT would not see."""
    kind = type(layer).__name__
    if not name:
        raise SubspanError(
            f"the network itself is a {kind}, and LoRA is beside the layers of a network: put it "
            "into an nn.Sequential, or use SubspaceModel"
        )
    if layer._parameters.get("weight") is None:
        raise SubspanError(f"{name} is a {kind} without a weight of its own: exclude it")
    same = next(paths for paths in tied.values() if f"{name}.weight" in paths)
    if others := [path for path in same if path != f"{name}.weight"]:
        raise SubspanError(
            f"{name}.weight is tied to {others[0]}, which would not have its LoRA: exclude it"
        )
    if len({path.rpartition(".")[0] for path in paths}) > 1:
        raise SubspanError(
            f"{name} is one layer under several names ({', '.join(paths)}), and PEFT would put a "
            "LoRA into the first alone: exclude it"
        )
    packed = read_quantised(layer, "weight")
    if packed is not None and packed.refusal:
        raise SubspanError(f"{name}.weight {packed.refusal}")
    if not computes_product(layer):
        raise SubspanError(
            f"{name} is a {kind} with a forward of its own, of which a LoRA cannot know what it "
            "does with the weight: exclude it"
        )
    if packed is not None and "forward" in vars(layer):
        raise SubspanError(
            f"the forward of {name} was replaced (by hooks of accelerate, say), and its quantised "
            "weight cannot be read by others: load the network without device_map, or exclude it"
        )
    (n, m), _, like = weight_of(layer)
    if not like.dtype.is_floating_point:
        raise SubspanError(f"{name}.weight is {like.dtype}, and LoRA is real: exclude it")
    if rank > min(n, m):
        raise SubspanError(
            f"rank {rank} is more than {name} can have, whose weight is {n} × {m}: give a rank of "
            f"at most {min(n, m)}, or exclude it"
        )
