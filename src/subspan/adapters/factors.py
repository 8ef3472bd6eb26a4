"""A subspace over LoRA factors: W + s B A in every chosen layer, and (A, B) = θ₀ + P w.

Sources: Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022; Li et al.,
"Uni-LoRA: one vector is all you need", NeurIPS 2025, whose subspace is that of ``hash``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from subspan.adapters.layers import choose_layers, weight_of
from subspan.errors import SubspanError, is_integer
from subspan.philox import Source
from subspan.subspace import init
from subspan.subspace.adapted import ADAPTER, FACTORS, Adapter, remove_factors
from subspan.subspace.compartments import Patterns, listed
from subspan.subspace.model import SubspaceModel
from subspan.subspace.quantised_layers import multiplies_itself

DOMAIN = 17  # of A's entries


@torch.inference_mode(False)  # what is made in it could not be trained
def lora(
    net: nn.Module | Callable[[], nn.Module],
    dim: int | None = None,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Patterns = "all-linear",
    exclude: Patterns = None,
    train_fully: Patterns = None,
    projection: str = "hash",
    seed: int = 0,
    init_seed: int | None = None,
    **options: Any,
) -> SubspaceModel:
    """Put a network into a subspace of its LoRA factors.

    Each chosen layer with a weight W (n, m) computes W x + b + (alpha / rank) B (A x). A, which is
    (rank, m), begins at uniform numbers in ±1/√m that are drawn from the seed, and B, (n, rank), at
    zeros, so that the network is at first what it was. All A and B together are θ = θ₀ + P w, and w
    is trained. The network keeps its class, its layers and their weights, as in any other subspace;
    reading a layer's weight gives W + (alpha / rank) B A. :func:`subspan.export_lora` writes A and
    B as a LoRA that PEFT loads.

    Args:
        net: any network with linear layers (``nn.Linear``, transformers' Conv1D, or either
            quantised by bitsandbytes or torchao); with ``init_seed`` a function that makes it.
        dim: d, as for :class:`~subspan.subspace.model.SubspaceModel`.
        rank: of every layer's factors.
        alpha: the scale of B A is alpha / rank; by default alpha is the rank.
        targets: which linear layers: a preset's name, or patterns of their names.
        exclude: patterns of layers that stay as they are.
        train_fully: patterns of parameters that are trained directly (a new head); layers whose
            weight is among them get no factors.
        projection: a family of :func:`subspan.projections`.
        seed: of A and of the projection, in [0, 2⁶⁴).
        init_seed: of the network's own weights, as for :meth:`SubspaceModel.from_seed`; then a file
            needs no pretrained network.
        options: further ones of :class:`~subspan.subspace.model.SubspaceModel` (``compartments``)
            and of the family.

    Raises:
        SubspanError: for a rank, an alpha or a layer that LoRA cannot have, and as
            :class:`~subspan.subspace.model.SubspaceModel`; the network is then untouched.
    """
    check_rank(rank)
    scaling = _scaling(rank, alpha)
    targets, exclude, train_fully = listed(targets), listed(exclude), listed(train_fully)
    network: Any = net if init_seed is None else init.build(net, init_seed)
    layers = choose_layers(network, targets, exclude, train_fully, rank)
    draws = Source(seed, DOMAIN)
    try:
        for column, (name, layer) in enumerate(layers.items()):
            _put_factors(name, layer, rank, scaling, draws, column)
        model = SubspaceModel(
            network,
            dim,
            projection=projection,
            targets=list(FACTORS),
            train_fully=train_fully,
            seed=seed,
            **options,
        )
    except BaseException:
        remove_factors(network)
        raise
    model.init_seed = init_seed
    made = {"rank": rank, "alpha": alpha, "targets": targets, "exclude": exclude}
    model.subspace.lora = {name: value for name, value in made.items() if value is not None}
    return model


def rebuild_lora(
    net: nn.Module, recipe: Mapping[str, Any], made: Mapping[str, Any]
) -> SubspaceModel:
    """Make the model of a file's recipe and of its field ``lora``."""
    ours = ("targets", "exclude")  # which name factors there, and layers here
    return lora(net, **{k: v for k, v in recipe.items() if k not in ours}, **made)


def check_rank(rank: Any) -> int:
    """Return a rank; refuse what is no integer from 1 on."""
    if not is_integer(rank, least=1):
        raise SubspanError(f"rank must be an integer of at least 1, got {rank!r}")
    return rank


def _scaling(rank: int, alpha: Any) -> float:
    if alpha is None:
        return 1.0
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not number or not 0 < alpha < math.inf:
        raise SubspanError(f"alpha must be a positive number, got {alpha!r}")
    return float(alpha / rank)


@torch.no_grad()
def _put_factors(
    name: str, layer: nn.Module, rank: int, scaling: float, draws: Source, column: int
) -> None:
    """Give a layer A and B; of 16-bit and quantised weights they are float32, as PEFT's are."""
    (n, m), transposed, like = weight_of(layer)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    u = draws.uniforms(0, rank * m, column=column, device=like.device)
    a: Tensor = (2 * u - 1) * math.sqrt(1 / m)
    factors = (a.view(rank, m).to(dtype), torch.zeros(n, rank, dtype=dtype, device=like.device))
    rounded = multiplies_itself(type(layer))
    layer.__dict__[ADAPTER] = Adapter(name, scaling, transposed, rounded)
    for attribute, factor in zip(FACTORS, factors, strict=True):
        layer._parameters[attribute] = nn.Parameter(factor)
