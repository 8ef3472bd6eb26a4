"""Factored layers in place of a network's ordinary ones, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from subspan.errors import SubspanError, unknown
from subspan.layers.attention import PROJECTIONS, Attention
from subspan.layers.handover import hand_over, obstacle, refuse_hooks, used_elsewhere
from subspan.layers.lowrank import LowRank, LowRankConv2d, LowRankLinear
from subspan.layers.places import MADE, check, chosen, fresh, named, places, put, replaced
from subspan.layers.product_of_sums import (
    ProductOfSums,
    ProductOfSumsConv2d,
    ProductOfSumsLinear,
    registry,
)
from subspan.linalg import rank_of, svd
from subspan.subspace.compartments import Patterns, matches

Init = Literal["svd", "random"]

FACTORS = ["U", "S", "V", "bias"]
OURS: dict[type[nn.Module], Callable[[], nn.Module]] = {
    LowRankLinear: lambda: LowRankLinear(1, 1, 1),
    LowRankConv2d: lambda: LowRankConv2d(1, 1, 1, 1),
    ProductOfSumsLinear: lambda: ProductOfSumsLinear(1, 1, ["free"]),
    ProductOfSumsConv2d: lambda: ProductOfSumsConv2d(1, 1, 1, ["free"]),
    Attention: lambda: Attention(nn.MultiheadAttention(1, 1)),
}
MADE.update(OURS)


def factorize(
    net: nn.Module, *, rank: int | Mapping[str, int] | None = None, ratio: float | None = None,
    energy: float | None = None, targets: Patterns = None, exclude: Patterns = None,
    init: Init = "svd",
) -> nn.Module:  # fmt: skip
    """Put :class:`LowRankLinear` and :class:`LowRankConv2d` in place of a network's layers.

    Exactly one of ``rank``, ``ratio`` and ``energy`` says how many numbers stay. The projections
    of an ``nn.MultiheadAttention`` become four layers (``q_proj``, …, ``out_proj``). A new layer
    has the hooks, the attributes, ``training`` and ``requires_grad`` of the old one.

    Args:
        net: changed in place, pretrained or not.
        rank: r of every layer, or {pattern: r}.
        ratio: share in (0, 1] of each weight's numbers: r (n + m) ≤ ratio · n m, at least r = 1.
        energy: share in (0, 1] of each weight's squared norm to keep (``init="svd"`` only).
        targets: which layers, by patterns as of :class:`~subspan.SubspaceModel`. By default every
            ``nn.Linear`` and ``nn.Conv2d`` without groups, of exactly these classes, that shares
            its parameters with no other module and whose weight nothing else computes
            (``weight_norm``, ``spectral_norm``, ``prune``, a parametrization). Others are left as
            they are by default, and refused where a pattern names them.
        exclude: layers to leave as they are.
        init: "svd" takes the best approximation of the weight; "random" random orthonormal bases
            and S = c·1, at the norm of the weight.

    Returns:
        ``net``; or the new layer, if ``net`` itself is one that was replaced.

    Raises:
        SubspanError: for a rank that a layer cannot have; for a layer that cannot be replaced, or
            has a hook on a weight or a ``state_dict``, which would be lost; and if there is nothing
            to factorise. The network is then untouched.
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
        layer = found[name].plain
        W = layer.weight.detach().flatten(1)
        wide = W if W.dtype == torch.float64 else W.float()
        if not bool(torch.isfinite(wide).all()):
            raise SubspanError(f"the weight of layer {name!r} is not finite: leave it out")
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
    there = {name: m for name in ranks if isinstance(m := modules.get(name), LowRank)}
    for name in ranks:
        if name not in there and name not in found:
            raise SubspanError(f"the network has no layer {name!r} that could have factors")
    check(found, [name for name in ranks if name not in there])
    for name, r in ranks.items():
        shape = there[name].shape if name in there else found[name].plain.weight.flatten(1).shape
        _rank(name, tuple(shape), r, None, None, None)
        if name not in there:
            factored[name] = _factored(found[name].plain, r, None)
    net = put(net, found, factored)
    for name, layer in there.items():
        if layer.rank != ranks[name]:
            (n, m), r, empty = layer.shape, ranks[name], layer.S.new_empty
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
        SubspanError: if there is no factored layer, or one that has what an ordinary layer could
            not have, as for :func:`factorize`. The network is then untouched.
    """
    used = used_elsewhere(net)
    new: dict[int, nn.Module] = {}
    for name, layer in net.named_modules():
        if not isinstance(layer, LowRank | ProductOfSums):
            continue
        if type(layer) not in OURS:
            raise SubspanError(
                f"layer {name!r} cannot be merged, since its class, {named(layer)}, is none of "
                "subspan's and may compute anything: merge the SubspaceModel first, if it is one"
            )
        parameters, buffers = registry(layer) if isinstance(layer, ProductOfSums) else (FACTORS, [])
        kinds = {type(p) for p in fresh(type(layer)).parameters()}
        if why := obstacle(layer, parameters, buffers, kinds=kinds) or used.get(id(layer)):
            raise SubspanError(f"layer {name!r} cannot be merged, since {why}")
        refuse_hooks(name, layer)
        plain = layer.two_factors() if factors and isinstance(layer, LowRank) else layer.dense()
        new[id(layer)] = hand_over(name, layer, plain, fresh(type(layer)))
    if not new:
        raise SubspanError("the network has no factored layer to merge")
    for name, module in net.named_modules():
        if type(module) is Attention:
            layers = [getattr(module, part) for part in PROJECTIONS]
            plain_layers = [new.get(id(layer), layer) for layer in layers]
            if all(type(layer) is nn.Linear for layer in plain_layers):
                new[id(module)] = _whole(name, module, plain_layers, used)
    return replaced(net, new)


def _whole(
    name: str, module: Attention, layers: list[nn.Linear], used: Mapping[int, str]
) -> nn.MultiheadAttention:
    """Make the ordinary attention with these four projections.

    Raises:
        SubspanError: for what it could not have.
    """
    why = obstacle(module, (), modules=PROJECTIONS) or used.get(id(module))
    for part, layer in zip(PROJECTIONS, layers, strict=True):
        why = why or obstacle(layer, ("weight", "bias")) or used.get(id(layer))
        if part != "out_proj" and (extra := vars(layer).keys() - vars(fresh(nn.Linear)).keys()):
            why = why or f"nn.MultiheadAttention has no {part} for its attribute {min(extra)!r}"
    if why := why or module.obstacle(layers):
        raise SubspanError(f"layer {name!r} cannot be merged, since {why}")
    refuse_hooks(name, module)
    for part, layer in zip(PROJECTIONS, layers, strict=True):
        refuse_hooks(f"{name}.{part}", layer, called=False)
    whole = module.original(layers)
    hand_over(f"{name}.out_proj", layers[-1], whole.out_proj, fresh(nn.Linear))
    hand_over(name, module, whole, fresh(Attention), parts=True)
    return whole


def _rank(
    name: str, shape: tuple[int, ...], rank: int | Mapping[str, int] | None, ratio: float | None,
    energy: float | None, best: tuple[Tensor, ...] | None,
) -> int:  # fmt: skip
    """Return the rank of one layer."""
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
    """Make the layer with factors of its weight, or with random ones of its norm."""
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
    return new
