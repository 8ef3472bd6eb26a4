"""Growing d while θ stays where it is: subspaces of ``hash`` that lie inside one another.

With d | d', every bucket b of d is divided into the buckets b' ≡ b (mod d) of d'
(:mod:`subspan.families.hash`). Hence P = P' A with A_{b'b} = √(n'_{b'}/n_b) for b' ≡ b, else 0. Its
columns have norm 1 and are orthogonal, and θ₀ + P w = θ₀ + P' w' for w' = A w.

What an optimizer remembers follows from P = P' A, too. Gradients are g = Aᵀ g', so that a running
mean of them, m = Aᵀ m', has the least-norm solution m' = A m. Squares are not linear. But the signs
of P are random and independent: E[g_b²] = Σ_{i∈b} (∂L/∂θ_i)²/n_b, the mean over a bucket, is the
same for a bucket and, on average, for its parts. So v' repeats v. With both, the step that Adam
would make next, P m/√v, is made in the larger subspace as well: P' A m/√v.

A rate that suits d is √(d'/d) times that which suits d', since every coordinate moves by about the
rate, and θ by √d times that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from subspan.errors import SubspanError
from subspan.families import Projection
from subspan.families.hash import Hash
from subspan.subspace.blocks import digest_layout
from subspan.subspace.changes import outgrow
from subspan.subspace.compartments import check_dim
from subspan.subspace.model import SubspaceModel
from subspan.subspace.sharded import refuse_whole
from subspan.subspace.variant import refuse_in_use

MEANS = ("exp_avg", "momentum_buffer", "grad_avg")  # of gradients, in the optimizers of PyTorch
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf")  # or sizes, of them
FIXED = "quantiser_fixed"  # in the first group of an optimizer that subspan.optim.Quantiser rounds


@torch.inference_mode(False)  # what is made in it could not be trained
@torch.no_grad()
def grow(model: nn.Module, dim: int | Sequence[int], optimizer: Optimizer | None = None) -> None:
    """Give a model in a subspace more coordinates, in place, while all of its weights stay.

    The new subspace contains the old one. θ is the same to rounding, of one unit in the last place
    of P w. The coordinates become other parameters, of the old names, without a gradient, so that
    DDP must be given the model anew.

    Args:
        model: a :class:`SubspaceModel` with the projection ``hash``, or its network.
        dim: d from now on, a multiple of d now; of several compartments those of each, in order,
            or their sum, which multiplies all alike.
        optimizer: one that trains the coordinates; it goes on with the new ones and with what it
            remembers of gradients. Its rates stay: one that suits d' is √(d/d') times that for d.
            None if there is none yet; one that is left out refuses its next step.

    Raises:
        SubspanError: if the subspaces would not be nested, the network is sharded or has variants,
            coordinates have hooks, or the optimizer holds something that cannot be carried over;
            nothing is changed then.
    """
    found = SubspaceModel.of(model)
    if found is None:
        raise SubspanError(
            f"only a SubspaceModel, or its network, can grow, got {type(model).__name__}: wrap the "
            "network, or give what DDP or torch.compile has wrapped itself"
        )
    weights, root = found.subspace, found.subspace.network()
    refuse_whole(weights, "grown", "grow before fully_shard")
    refuse_in_use(weights, "grown")
    if weights.key:
        raise SubspanError("a network that has variants cannot grow: make Variants afterwards")
    before = weights.projections
    after = nest(before, dim, [part.name for part in weights.compartments])
    own = [root._parameters[name] for name in weights.coordinate_names]
    for w, projection in zip(own, before, strict=True):
        _refuse_hooks(w)  # type: ignore[arg-type]
        projection.check_coordinates(w)  # type: ignore[arg-type]
    states = [_carry(optimizer, w, p, q) for w, p, q in zip(own, before, after, strict=True)]  # type: ignore[arg-type]
    new = [
        nn.Parameter(refine(w, p, q), w.requires_grad)  # type: ignore[union-attr,arg-type]
        for w, p, q in zip(own, before, after, strict=True)
    ]

    dims = [projection.in_dim for projection in after]
    weights.lay_out(
        [replace(part, dim=d) for part, d in zip(weights.compartments, dims, strict=True)], after
    )
    recipe = weights.recipe
    _describe(recipe, dims)
    meaning = recipe["projection"], recipe["seed"], weights.meaning
    weights.take_fingerprint(layout=digest_layout(weights.compartments, *meaning))
    for name, old, now, state in zip(weights.coordinate_names, own, new, states, strict=True):
        assert old is not None
        weights.root._parameters[name] = now
        outgrow(old, "in whose place grow() has put others")
        if optimizer is None:
            continue
        for group in optimizer.param_groups:  # in place: LBFGS holds on to the list
            group["params"][:] = [now if p is old else p for p in group["params"]]
        if optimizer.state.pop(old, None) is not None:
            optimizer.state[now] = state
    weights.note()


def nest(
    projections: Sequence[Projection], dim: int | Sequence[int], names: Sequence[str]
) -> tuple[Projection, ...]:
    """Return the projections of more coordinates whose subspaces contain those of fewer.

    ``dim`` are the coordinates of each compartment from now on, or their sum.
    """
    now = [projection.in_dim for projection in projections]
    if isinstance(dim, Sequence):
        dims = [check_dim(d) for d in dim]
        if len(dims) != len(now):
            raise SubspanError(f"dim lists {len(dims)} dimensions for {len(now)} compartments")
    else:
        factor, rest = divmod(check_dim(dim), sum(now))
        if rest or not factor:
            raise SubspanError(_apart(sum(now), dim, ""))
        dims = [factor * d for d in now]
    if dims == now:
        raise SubspanError(_apart(sum(now), sum(now), ""))
    for projection, name, d in zip(projections, names, dims, strict=True):
        if not isinstance(projection, Hash):
            raise SubspanError(
                f"projection {projection.family!r} cannot grow: its subspace of a larger d does "
                "not contain that of a smaller one; use 'hash'"
            )
        at = f" in compartment {name!r}" if len(now) > 1 else ""
        if d % projection.in_dim:
            raise SubspanError(_apart(projection.in_dim, d, at))
        if d > projection.out_dim:
            raise SubspanError(
                f"d cannot grow to {d}{at}: there are {projection.out_dim} weights, use at most "
                "as many coordinates"
            )
    return tuple(replace(p, in_dim=d) for p, d in zip(projections, dims, strict=True))


def _apart(now: int, dim: int, at: str) -> str:
    near = max(round(dim / now), 1) * now
    return (
        f"d cannot grow from {now} to {dim}{at}: subspaces are nested if each d is a multiple of "
        f"the one before, as {near if near > now else 2 * now}"
    )


def refine(w: Tensor, before: Projection, after: Projection) -> Tensor:
    """Return A w, (d',): of the numbers near it, those for which P' w' is nearest to P w."""
    old, new = (
        _scales(projection, w.new_empty(projection.in_dim)) for projection in (before, after)
    )
    target = (w * old).repeat(after.in_dim // before.in_dim)
    exact = target.double() / new.double()
    best = exact.to(w.dtype)
    for towards in (-torch.inf, torch.inf):
        other = torch.nextafter(exact.to(w.dtype), torch.full_like(best, towards))
        nearer = (other * new - target).abs() < (best * new - target).abs()
        best = torch.where(nearer, other, best)
    return best


def _scales(projection: Projection, like: Tensor) -> Tensor:
    assert isinstance(projection, Hash)
    return projection.scale(like)


def _refuse_hooks(w: nn.Parameter) -> None:
    """Refuse to replace coordinates whose hooks would be lost."""
    if w._backward_hooks or w._post_accumulate_grad_hooks:
        raise SubspanError(
            "the coordinates have hooks on their gradient, which those that grow() puts into their "
            "place would not have: remove the hooks, and register them again afterwards"
        )


def _carry(
    optimizer: Optimizer | None, w: nn.Parameter, before: Projection, after: Projection
) -> dict[str, Any]:
    """Return what an optimizer remembers of the coordinates as of the new ones."""
    if optimizer is None:
        return {}
    if not any(p is w for group in optimizer.param_groups for p in group["params"]):
        raise SubspanError(
            "the optimizer does not train these coordinates: give the one that does, or none"
        )
    if FIXED in optimizer.param_groups[0]:
        raise SubspanError(
            "a Quantiser has fixed coordinates on its grid, which those of a larger subspace would "
            "leave: grow before it begins, or remove() it first"
        )
    for inner in vars(optimizer).values():
        if isinstance(inner, Optimizer) and inner.param_groups is not optimizer.param_groups:
            raise SubspanError(
                f"{type(optimizer).__name__} divides its parameters among optimizers of its own, "
                "which would keep these coordinates: grow without an optimizer, and make it anew"
            )
    state: Mapping[str, Any] = optimizer.state.get(w, {})
    for key, value in state.items():
        plain = type(value) is Tensor  # and not of few bits, as torchao's optimizers have
        if isinstance(value, Tensor) and value.dim() and not (plain and key in MEANS + SQUARES):
            raise SubspanError(
                f"{type(optimizer).__name__} keeps {key!r} of every coordinate, and how that goes "
                "on in a larger subspace is not known: use Adam, AdamW, SGD or RMSprop, or make a "
                "new optimizer after growing"
            )
    return {key: _spread(key, value, before, after) for key, value in state.items()}


def _spread(key: str, value: Any, before: Projection, after: Projection) -> Any:
    if not isinstance(value, Tensor) or key not in MEANS + SQUARES:
        return value
    times = after.in_dim // before.in_dim
    if key in SQUARES:
        return value.repeat(times)
    old, new = (_scales(p, value.new_empty(p.in_dim)) for p in (before, after))
    return (value * old).repeat(times) / new


def _describe(recipe: dict[str, Any], dims: list[int]) -> None:
    """Let a recipe make the model with its coordinates of today."""
    rules = recipe["compartments"]
    if isinstance(rules, str):
        recipe["dim"] = dims[0] if len(dims) == 1 else dims
        return
    recipe["compartments"] = [[rule[0], d] for rule, d in zip(rules, dims, strict=True)]
    recipe["dim"] = None if recipe["dim"] is None else sum(dims)
