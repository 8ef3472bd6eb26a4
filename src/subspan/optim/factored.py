"""Factored layers as an optimizer trains them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from subspan.errors import SubspanError
from subspan.layers.lowrank import LowRank
from subspan.optim.integrators import USV
from subspan.subspace.functions import ordinary_tensors
from subspan.subspace.links import check_network


def find_layers(net: nn.Module, min_rank: int) -> dict[str, LowRank]:
    """Return the factored layers of a network that are not frozen, by name.

    There must be some, each with ``min_rank`` and with factors of its own that nothing computes.
    """
    check_network(net)
    factored = {n: m for n, m in net.named_modules() if isinstance(m, LowRank)}
    if not factored:
        raise SubspanError(
            "the network has no factored layer: call subspan.layers.factorize(net, …) first"
        )
    for name, layer in factored.items():
        if any(layer._parameters.get(factor) is not getattr(layer, factor) for factor in "USV"):
            raise SubspanError(
                f"factors of layer {name!r} are computed (from coordinates of a subspace, by "
                "pruning or by a parametrization), and no step of DLRT can move them: train what "
                "they are computed from with another optimizer, or take that away first"
            )
    layers = {n: m for n, m in factored.items() if is_trained(n, m)}
    if not layers:
        raise SubspanError("every factored layer of the network is frozen: unfreeze some")
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        for p in parameters(layer):
            if (owner := owners.setdefault(id(p), name)) != name:
                raise SubspanError(
                    f"layers {owner!r} and {name!r} share a factor, and each would move it: put "
                    "one layer into both places"
                )
        least = min(layer.shape)
        if min_rank > least:
            raise SubspanError(f"layer {name!r} has no rank {min_rank}, at most {least}")
    return layers


def is_trained(name: str, layer: LowRank) -> bool:
    """Return whether a layer is trained, and not frozen; refuse one that is neither."""
    trained = [p.requires_grad for p in parameters(layer)]
    if any(trained) and not all(trained):
        raise SubspanError(
            f"some factors of layer {name!r} are frozen, and no step can move the others alone: "
            "freeze or unfreeze all three"
        )
    return all(trained)


def read(layers: Mapping[str, LowRank], factors: Iterable[Tensor], copy: bool) -> dict[str, USV]:
    """Return the factors of the layers that are not frozen, precise enough for orthonormal bases.

    They are copied in any case (``copy``) where evaluations are to change the layers. A layer that
    is frozen in part, or has others than the ``factors`` that the optimizer was given, is refused.
    """
    given = set(map(id, factors))
    for name, layer in layers.items():
        if not given.issuperset(map(id, parameters(layer))):
            raise SubspanError(
                f"layer {name!r} has other factors than the optimizer was given, since they were "
                "exchanged (by load_state_dict(assign=True), say): make a new optimizer"
            )
    with ordinary_tensors():
        return {n: wide_factors(layer, copy) for n, layer in layers.items() if is_trained(n, layer)}


def wide_factors(layer: LowRank, copy: bool) -> USV:
    """Return the factors of a layer as :func:`read` does."""
    return USV(*(p.detach().to(wide(layer.S), copy=copy) for p in parameters(layer)))


def wide(of: Tensor) -> torch.dtype:
    """Return the type in which a parameter's step is computed, and its moments are kept."""
    return torch.promote_types(of.dtype, torch.float32)


def write(layers: Mapping[str, LowRank], factors: Mapping[str, USV]) -> None:
    """Put factors into layers, by name."""
    for name, at in factors.items():
        layers[name].set_factors(at.U, at.S, at.V)


def parameters(layer: LowRank) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """Return U, S and V."""
    return layer.U, layer.S, layer.V


def all_finite(groups: Iterable[Iterable[Tensor]]) -> list[bool]:
    """Return whether all numbers of each group are finite, in one message to the host."""
    norms = [
        torch.stack([torch.linalg.vector_norm(t, dtype=wide(t)) for t in tensors]).sum()
        for tensors in groups
    ]
    return torch.stack([t.to(norms[0].device) for t in norms]).isfinite().tolist() if norms else []


def tensors(at: USV, core: bool = False) -> list[Tensor]:
    """Return all three, or S alone."""
    return [at.S] if core else [at.U, at.S, at.V]


def dense(grad: Tensor) -> Tensor:
    """Return a gradient as a dense tensor; that of a sparse embedding is none."""
    return grad.to_dense() if grad.is_sparse else grad
