"""Factored layers in place of a network's ordinary ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from subspan.errors import SubspanError, is_integer, unknown
from subspan.layers.lowrank import LowRank
from subspan.layers.replace import replace_layers
from subspan.linalg import rank_of, svd
from subspan.subspace.compartments import Patterns, matches

Init = Literal["svd", "random"]


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
        targets: which layers, by patterns as of :class:`~subspan.SubspaceModel`; by default all
            that can be replaced, see :func:`~subspan.layers.replace_layers`.
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
    sizes = [
        name for name, v in (("rank", rank), ("ratio", ratio), ("energy", energy)) if v is not None
    ]
    if len(sizes) != 1:
        raise SubspanError(
            f"give one of rank, ratio and energy, got {' and '.join(sizes) or 'none'}"
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

    def make(name: str, layer: nn.Linear | nn.Conv2d) -> LowRank:
        W = layer.weight.detach().flatten(1)
        wide = W if W.dtype == torch.float64 else W.float()
        if not bool(torch.isfinite(wide).all()):
            raise SubspanError(f"the weight of layer {name!r} is not finite: leave it out")
        best = svd(wide) if init == "svd" else None
        return _factored(layer, _rank(name, W.shape, rank, ratio, energy, best), best)

    return replace_layers(net, make, targets=targets, exclude=exclude)


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
        ranks = [r for pattern, r in rank.items() if matches(pattern, name)]
        if not ranks:
            raise SubspanError(f"rank says nothing of layer {name!r}: name it, or exclude it")
        r: object = ranks[0]
    else:
        r = rank
    if not is_integer(r, 1, min(n, m)):
        raise SubspanError(
            f"layer {name!r} is {n} × {m}: its rank must be an integer in [1, {min(n, m)}], got "
            f"{r!r}; {{pattern: rank}} gives each layer its own, exclude leaves one as it is"
        )
    return r


def _factored(layer: nn.Linear | nn.Conv2d, r: int, best: tuple[Tensor, ...] | None) -> LowRank:
    """Make the layer with factors of its weight, or with random ones of its norm."""
    new = LowRank.rebuild(layer, r)
    assert isinstance(new, LowRank)
    with torch.no_grad():
        if best is not None:
            U, sigma, V = best
            new.set_factors(U[:, :r], sigma[:r].diag(), V[:, :r])
        else:
            new.S.mul_(layer.weight.norm() / new.S.norm())
        if new.bias is not None and layer.bias is not None:
            new.bias.copy_(layer.bias)
    return new
