"""Factored layers in place of a network's ordinary ones, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from subspan.compartments import Patterns, matches
from subspan.errors import SubspanError, unknown
from subspan.layers.attention import PROJECTIONS, Attention
from subspan.layers.lowrank import LowRank, LowRankConv2d, LowRankLinear
from subspan.layers.places import chosen, places, put, replaced
from subspan.layers.product_of_sums import ProductOfSums
from subspan.linalg import rank_of, svd

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

    found = places(net)
    factored = {}
    for name in chosen(net, found, targets, exclude):
        layer = found[name].layer
        W = layer.weight.detach().flatten(1)
        wide = W if W.dtype == torch.float64 else W.float()
        best = svd(wide) if init == "svd" else None
        factored[name] = _factored(layer, _rank(name, W.shape, rank, ratio, energy, best), best)
    return put(net, found, factored)


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
    found, factored = places(net), {}
    modules = dict(net.named_modules())
    for name, r in ranks.items():
        if isinstance(modules.get(name), LowRank):
            continue
        if name not in found:
            raise SubspanError(f"the network has no layer {name!r} that could have factors")
        factored[name] = _factored(found[name].layer, r, None)
    net = put(net, found, factored)
    for name, r in ranks.items():
        layer = net.get_submodule(name)
        assert isinstance(layer, LowRank)
        if layer.rank != r:
            n, m = layer.shape
            empty = layer.S.new_empty
            layer.set_factors(empty(n, r), empty(r, r), empty(m, r))
    return net


def merge(net: nn.Module, *, factors: bool = False) -> nn.Module:
    """Put ordinary layers in place of a network's factored ones, and of its products of sums.

    Nothing of subspan is left in the network; but of an ``nn.MultiheadAttention`` whose projections
    are to be two layers each, :class:`~subspan.layers.attention.Attention` stays. A program of
    ``torch.export`` is free of that, too.

    Args:
        net: changed in place.
        factors: whether a layer becomes two plain ones, of Vᵀ and of U S, which keeps r (n + m)
            numbers and products; otherwise one with the dense weight, as a product of sums does.

    Returns:
        ``net``; or the ordinary layer, if ``net`` itself is a factored one.

    Raises:
        SubspanError: if there is no factored layer.
    """
    new = {
        id(layer): layer.two_factors() if factors and isinstance(layer, LowRank) else layer.dense()
        for layer in net.modules()
        if isinstance(layer, LowRank | ProductOfSums)
    }
    if not new:
        raise SubspanError("the network has no factored layer to merge")
    for module in net.modules():
        if id(module) in new:
            new[id(module)].train(module.training)
    net = replaced(net, new)
    whole = {
        id(module): module.original()
        for module in net.modules()
        if isinstance(module, Attention)
        and all(type(getattr(module, name)) is nn.Linear for name in PROJECTIONS)
    }
    return replaced(net, whole)


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
