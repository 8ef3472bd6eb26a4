"""The nearest LoRA of a full-space subspace: the truncated singular value decomposition of θ − θ₀.

Source: Eckart and Young, "The approximation of one matrix by another of lower rank", 1936: of all
matrices of a rank, U_r S_r V_rᵀ is the nearest to U S Vᵀ in the Frobenius norm.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from subspan.adapters.factors import check_rank
from subspan.adapters.layers import computes_product
from subspan.errors import SubspanError
from subspan.linalg import svd
from subspan.subspace.functions import ordinary_tensors
from subspan.subspace.model import SubspaceModel
from subspan.subspace.parameters import find_aliases
from subspan.subspace.structure import is_conv1d

RANK = 8  # where none is given, as in PEFT


@dataclass(frozen=True)
class NearestLora:
    """A LoRA, and how far it is from what it stands for: ‖Δ − s B A‖ / ‖Δ‖, by layer and of all.

    A (rank, m) and B (n, rank) stand by the name of the layer; s is alpha / rank.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    rank: int
    alpha: float
    errors: Mapping[str, float]
    error: float


def find_nearest(model: SubspaceModel, rank: int | None, saved: Collection[str]) -> NearestLora:
    """Find the nearest LoRA of a model without factors; ``saved`` modules are stored beside it.

    Raises:
        SubspanError: naming what has moved and is no linear layer's weight.
    """
    rank = check_rank(RANK if rank is None else rank)
    weights, net = model.subspace, model.body
    modules = dict(net.named_modules())
    paths = find_aliases(weights.slots)
    factors, squares, unsayable = {}, dict[str, tuple[float, float]](), []
    for name in weights.homes:
        layer, _, attribute = name.rpartition(".")
        if any(f"{name}.".startswith(f"{module}.") for module in saved):
            continue
        with ordinary_tensors():
            base = weights.resting(name)
        change = weights.form(name).detach().double() - base.double()
        if not change.any():
            continue
        linear = (
            attribute == "weight" and len(paths[name]) == 1 and computes_product(modules[layer])
        )
        if not (linear and layer):
            unsayable.append(name)
            continue
        change = change.T if is_conv1d(modules[layer]) else change
        a, b = factorise(change, rank)
        rest = change - b.double() @ a.double()
        factors[layer] = a, b
        squares[layer] = float(rest.square().sum()), float(change.square().sum())
    if unsayable:
        raise SubspanError(
            f"{', '.join(unsayable[:3])}{' and others' * (len(unsayable) > 3)} moved, which a LoRA "
            "cannot say: write the network of merge(), or train by subspan.lora, or with "
            'targets="all-linear"'
        )
    if not factors:
        raise SubspanError(
            "no linear layer has moved, so that there is no LoRA to write: train the model first"
        )
    errors = {layer: (rest / whole) ** 0.5 for layer, (rest, whole) in squares.items()}
    rests, wholes = zip(*squares.values(), strict=True)
    return NearestLora(factors, rank, rank, errors, (sum(rests) / sum(wholes)) ** 0.5)


def factorise(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (rank, m) and B (n, rank) in float32 with B A nearest to a matrix (n, m).

    Both share the singular values: A = √S Vᵀ and B = U √S. Where the matrix has fewer than ``rank``
    of them the rest of A and B is zero.
    """
    u, s, v = svd(change.double())
    root, missing = s[:rank].sqrt(), max(0, rank - len(s))
    a = nn.functional.pad(root.unsqueeze(1) * v.T[:rank], (0, 0, 0, missing))
    b = nn.functional.pad(u[:, :rank] * root, (0, missing))
    return a.float(), b.float()
