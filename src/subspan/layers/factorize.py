"""Factored layers in place of a network's ordinary ones, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from subspan.compartments import Patterns, matches, select
from subspan.errors import SubspanError, unknown
from subspan.layers.attention import PROJECTIONS, Attention
from subspan.layers.lowrank import LowRank, LowRankConv2d, LowRankLinear
from subspan.linalg import rank_of, svd
from subspan.slots import slots

# The second is what nn.MultiheadAttention has for its output: a Linear in all but name.
LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
Init = Literal["svd", "random"]


def factorize(
    net: nn.Module, *, rank: int | Mapping[str, int] | None = None, ratio: float | None = None,
    energy: float | None = None, targets: Patterns = None, exclude: Patterns = None,
    init: Init = "svd",
) -> nn.Module:  # fmt: skip
    """Put :class:`LowRankLinear` and :class:`LowRankConv2d` in place of a network's layers.

    Exactly one of ``rank``, ``ratio`` and ``energy`` says how many numbers stay. The projections
    of an ``nn.MultiheadAttention`` become four layers (``q_proj``, …, ``out_proj``).

    Args:
        net: changed in place, pretrained or not.
        rank: r of every layer, or {pattern: r}.
        ratio: share in (0, 1] of each weight's numbers: r (n + m) ≤ ratio · n m, at least r = 1.
        energy: share in (0, 1] of each weight's squared norm to keep (``init="svd"`` only).
        targets: which layers, by patterns as of :class:`~subspan.SubspaceModel`. By default every
            ``nn.Linear`` and ``nn.Conv2d`` without groups that shares its weight with no other.
        exclude: layers to leave as they are.
        init: "svd" takes the best approximation of the weight; "random" random orthonormal bases
            and S = c·1, at the norm of the weight.

    Returns:
        ``net``; or the new layer, if ``net`` itself is one that was replaced.

    Raises:
        SubspanError: for a rank that a layer cannot have, and if there is nothing to factorise. The
            network is then untouched.
    """
    given = [
        name for name, v in (("rank", rank), ("ratio", ratio), ("energy", energy)) if v is not None
    ]
    if len(given) != 1:
        raise SubspanError(
            f"give one of rank, ratio and energy, got {' and '.join(given) or 'none'}"
        )
    for name, share in (("ratio", ratio), ("energy", energy)):
        if share is not None and not 0 < share <= 1:
            raise SubspanError(f"{name} must be a share in (0, 1], got {share}")
    if init not in ("svd", "random"):
        raise unknown("init", init, ("svd", "random"))
    if energy is not None and init == "random":
        raise SubspanError(
            "energy is read off the weight, so it needs init='svd'; or give rank or ratio"
        )

    found = _candidates(net)
    factored = {}
    for name in _chosen(net, found, targets, exclude):
        layer = found[name].layer
        W = layer.weight.detach().flatten(1)
        wide = W if W.dtype == torch.float64 else W.float()
        best = svd(wide) if init == "svd" else None
        factored[name] = _factored(layer, _rank(name, W.shape, rank, ratio, energy, best), best)
    return _put(net, found, factored)


def factorize_like(net: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """Give exactly these layers these ranks, with any values: to be filled from a checkpoint.

    Args:
        net: changed in place; its layers are ordinary, or factored at any rank.
        ranks: by the layers' full names.

    Returns:
        As :func:`factorize`.

    Raises:
        SubspanError: if the network is another one. It is then untouched.
    """
    found, factored = _candidates(net), {}
    modules = dict(net.named_modules())
    for name, r in ranks.items():
        if isinstance(modules.get(name), LowRank):
            continue
        if name not in found:
            raise SubspanError(f"the network has no layer {name!r} that could have factors")
        factored[name] = _factored(found[name].layer, r, None)
    net = _put(net, found, factored)
    for name, r in ranks.items():
        layer = net.get_submodule(name)
        assert isinstance(layer, LowRank)
        if layer.rank != r:
            n, m = layer.shape
            empty = layer.S.new_empty
            layer.set_factors(empty(n, r), empty(r, r), empty(m, r))
    return net


def merge(net: nn.Module, *, factors: bool = False) -> nn.Module:
    """Put ordinary layers in place of a network's factored ones.

    Nothing of subspan is left in the network; but of an ``nn.MultiheadAttention`` whose projections
    are to be two layers each, :class:`~subspan.layers.attention.Attention` stays. A program of
    ``torch.export`` is free of that, too.

    Args:
        net: changed in place.
        factors: whether a layer becomes two plain ones, of Vᵀ and of U S, which keeps r (n + m)
            numbers and products; otherwise one with the dense weight.

    Returns:
        ``net``; or the ordinary layer, if ``net`` itself is a factored one.

    Raises:
        SubspanError: if there is no factored layer.
    """
    new = {
        id(layer): layer.two_factors() if factors else layer.dense()
        for layer in net.modules()
        if isinstance(layer, LowRank)
    }
    if not new:
        raise SubspanError("the network has no factored layer to merge")
    for module in net.modules():
        if id(module) in new:
            new[id(module)].train(module.training)
    net = _replaced(net, new)
    whole = {
        id(module): module.original()
        for module in net.modules()
        if isinstance(module, Attention)
        and all(type(getattr(module, name)) is nn.Linear for name in PROJECTIONS)
    }
    return _replaced(net, whole)


def _put(net: nn.Module, found: Mapping[str, _Place], factored: Mapping[str, LowRank]) -> nn.Module:
    """The network with factored layers in their places."""
    new: dict[int, nn.Module] = {}
    for name, layer in factored.items():
        place = found[name]
        if place.attention is None:
            new[id(place.layer)] = layer
        else:
            setattr(place.attention, place.projection, layer)
            new[id(place.original)] = place.attention
    for module in net.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            id(m) in new for m in module.modules()
        ):
            module.use_nested_tensor = False  # a fused path that reads weights around `forward`
    return _replaced(net, new)


@dataclass(frozen=True)
class _Place:
    """A layer that can be factored, and the attention that it would be part of."""

    layer: nn.Linear | nn.Conv2d
    attention: Attention | None = None
    projection: str = ""
    original: nn.MultiheadAttention | None = None


def _candidates(net: nn.Module) -> dict[str, _Place]:
    """Every layer that can be factored, by its first name."""
    found: dict[str, _Place] = {}
    inside: set[int] = set()
    for name, module in net.named_modules():
        dot = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            inside.add(id(module.out_proj))
            if module.bias_k is None and not module.add_zero_attn:
                split = Attention(module)
                for part in PROJECTIONS:
                    found[dot + part] = _Place(getattr(split, part), split, part, module)
        elif id(module) not in inside and (
            type(module) in LINEAR or (type(module) is nn.Conv2d and module.groups == 1)
        ):
            found[name] = _Place(module)
    return found


def _chosen(
    net: nn.Module, found: Mapping[str, _Place], targets: Patterns, exclude: Patterns
) -> list[str]:
    """Names of the layers to factor."""
    paths: dict[int, list[str]] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    names = {name: paths.get(id(place.layer), [name]) for name, place in found.items()}
    tied = _tied(net)
    if targets is None:
        chosen = {name for name, place in found.items() if id(place.layer.weight) not in tied}
    else:
        chosen = select(names, targets, "targets", "layer")
        for name in sorted(chosen):
            if id(found[name].layer.weight) in tied:
                raise SubspanError(f"{name} shares its weight with another module: leave it out")
    chosen -= select(names, exclude, "exclude", "layer")
    if not chosen:
        raise SubspanError(
            "there is no layer to factorise: expected an nn.Linear, an nn.Conv2d without groups or "
            f"an nn.MultiheadAttention, the network has {', '.join(found) or 'none'}"
        )
    return [name for name in found if name in chosen]


def _tied(net: nn.Module) -> set[int]:
    """Parameters that lie in more than one place."""
    seen: dict[int, int] = {}
    for slot in slots(net):
        module, attribute = slot.find(net)
        seen[id(module._parameters[attribute])] = seen.get(id(module._parameters[attribute]), 0) + 1
    return {key for key, times in seen.items() if times > 1}


def _rank(
    name: str, shape: tuple[int, ...], rank: int | Mapping[str, int] | None, ratio: float | None,
    energy: float | None, best: tuple[Tensor, ...] | None,
) -> int:  # fmt: skip
    """The rank of one layer."""
    n, m = shape
    if ratio is not None:
        return max(1, min(n, m, int(ratio * n * m / (n + m))))
    if energy is not None:
        assert best is not None
        return max(1, rank_of(best[1], math.sqrt(1 - energy)))
    if isinstance(rank, Mapping):
        found = [r for pattern, r in rank.items() if matches(pattern, name)]
        if not found:
            raise SubspanError(f"rank says nothing of layer {name!r}: name it, or exclude it")
        r: object = found[0]
    else:
        r = rank
    if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= min(n, m):
        raise SubspanError(
            f"layer {name!r} is {n} × {m}: its rank must be an integer in [1, {min(n, m)}], got "
            f"{r!r}; {{pattern: rank}} gives each layer its own, exclude leaves one as it is"
        )
    return r


def _factored(layer: nn.Linear | nn.Conv2d, r: int, best: tuple[Tensor, ...] | None) -> LowRank:
    """The layer with factors: of its weight, or random ones of its norm."""
    like = {
        "bias": layer.bias is not None,
        "device": layer.weight.device,
        "dtype": layer.weight.dtype,
    }
    new: LowRank
    if isinstance(layer, nn.Conv2d):
        new = LowRankConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, r, layer.stride,  # type: ignore[arg-type]
            layer.padding, layer.dilation, padding_mode=layer.padding_mode, **like,  # type: ignore[arg-type]
        )  # fmt: skip
    else:
        new = LowRankLinear(layer.in_features, layer.out_features, r, **like)  # type: ignore[arg-type]
    with torch.no_grad():
        if best is not None:
            U, sigma, V = best
            new.set_factors(U[:, :r], sigma[:r].diag(), V[:, :r])
        else:
            new.S.mul_(layer.weight.norm() / new.S.norm())
        if layer.bias is not None:
            new.bias.copy_(layer.bias)  # type: ignore[union-attr]
    for name in "USV":
        getattr(new, name).requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None:
        new.bias.requires_grad_(layer.bias.requires_grad)  # type: ignore[union-attr]
    return new.train(layer.training)


def _replaced(net: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
    """The network with some modules exchanged, wherever they are used."""
    for parent in list(net.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in new:
                parent._modules[name] = new[id(child)]
    return new.get(id(net), net)
