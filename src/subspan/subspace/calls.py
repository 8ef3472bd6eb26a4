"""How the products of a model are grouped into calls, and how a network runs with other weights."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subspan.families.base import (
    Projection,
    add,
    captured,
    from_recipe,
    gather,
    product,
    transformed,
)
from subspan.subspace.compartments import Compartment, Piece

GROUP = 1 << 20  # weights up to which one call of the operator serves several tensors


@dataclass(frozen=True)
class Call:
    """One call of the operator: rows start … stop−1 of a projection, for consecutive pieces."""

    coordinates: str
    recipe: str
    start: int
    stop: int
    pieces: tuple[Piece, ...]
    kept: tuple[range, ...]
    """Entries of each piece that stay at θ₀ whatever the coordinates are; empty for most."""


def plan(
    compartments: Sequence[Compartment],
    projections: Sequence[Projection],
    kept: Mapping[str, range] | None = None,
) -> tuple[Call, ...]:
    """Group products: small tensors share a call; a family that is not local is called once.

    Args:
        compartments: of the weights.
        projections: of the compartments.
        kept: entries of flattened tensors that stay at θ₀, by the tensor's name.
    """
    kept = kept or {}
    calls = []
    for part, projection in zip(compartments, projections, strict=True):
        limit = GROUP if projection.local else part.weights
        start = stop = 0
        group: list[Piece] = []
        for piece in (*part.pieces, None):
            if group and (piece is None or stop - start + len(piece) > limit):
                inside = tuple(_inside(kept.get(p.tensor, range(0)), p) for p in group)
                calls.append(
                    Call(key(part.name), projection.recipe, start, stop, tuple(group), inside)
                )
                start, group = stop, []
            if piece is not None:
                group.append(piece)
                stop += len(piece)
    return tuple(calls)


def _inside(kept: range, piece: Piece) -> range:
    """The entries of a tensor that are kept, counted from the start of a piece of it."""
    start, stop = max(kept.start, piece.start), min(kept.stop, piece.stop)
    return range(start - piece.start, stop - piece.start) if start < stop else range(0)


def theta(
    w: Tensor,
    step: Tensor,
    calls: Sequence[Call],
    bases: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> Sequence[Tensor]:
    """θ₀ + P w of the pieces of calls.

    Args:
        w: (d,) coordinates.
        step: which redraw of P, 0-D int64.
        calls: which rows.
        bases: θ₀ of every piece, in any shape, on any device.
        dtype: of the results, where it is not that of each base.

    Returns:
        Tensors like ``bases``; low precisions are added up in that of ``w``, and rounded once.
    """
    if captured(w) or transformed() or any(base.requires_grad for base in bases):
        # What is recorded runs elsewhere: a frozen base goes there as an ordinary tensor.
        plain = [base if base.requires_grad else base.detach() for base in bases]
        thetas = _each(functools.partial(_theta, w, step), calls, plain)
        return thetas if dtype is None else [theta.to(dtype) for theta in thetas]
    return _Theta.apply(w, step, calls, dtype, *bases)


def _each(
    compute: Callable[[Call, Sequence[Tensor]], list[Tensor]],
    calls: Sequence[Call],
    tensors: Sequence[Tensor],
) -> list[Tensor]:
    """What ``compute`` makes of every call and its share of the tensors, in one list."""
    if len(calls) == 1:
        return compute(calls[0], tensors)
    found, place = [], 0
    for call in calls:
        found += compute(call, tensors[place : place + len(call.pieces)])
        place += len(call.pieces)
    return found


def with_dense_gradient(theta: Tensor) -> Tensor:
    """A weight whose gradient may be sparse, as embeddings have it, where its parts take none."""
    if not theta.requires_grad or captured(theta) or transformed():
        return theta
    return _Dense.apply(theta)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor) -> Tensor:
        return theta.view_as(theta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to_dense() if grad.is_sparse else grad


def _theta(w: Tensor, step: Tensor, call: Call, bases: Sequence[Tensor]) -> list[Tensor]:
    """θ₀ + P w by operators that autograd and compilers see."""
    rows = product(w, step, call.recipe, call.start, call.stop, False)
    parts = rows.split([len(piece) for piece in call.pieces])
    return [
        (base + _without(part, kept).view(base.shape).to(base.device)).to(base.dtype)
        for base, part, kept in zip(bases, parts, call.kept, strict=True)
    ]


def form(
    w: Tensor,
    step: Tensor,
    calls: Sequence[Call],
    bases: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """θ₀ + P w as numbers, without a graph: see :func:`theta`."""
    return _each(functools.partial(_form, w, step, dtype), calls, bases)


def _form(
    w: Tensor, step: Tensor, dtype: torch.dtype | None, call: Call, bases: Sequence[Tensor]
) -> list[Tensor]:
    thetas = add(from_recipe(call.recipe), bases, w, step, call.start, dtype=dtype)
    for theta, base, kept in zip(thetas, bases, call.kept, strict=True):
        if kept:
            own = slice(kept.start, kept.stop)
            theta.view(-1)[own] = base.reshape(-1)[own]
    return thetas


def _without(part: Tensor, kept: range) -> Tensor:
    """Rows of P w with zeros for weights that stay at θ₀."""
    return torch.cat(_around(part, kept)) if kept else part


def _around(part: Tensor, kept: range) -> list[Tensor]:
    """A vector with zeros for weights that stay at θ₀, in pieces of which none is a copy."""
    return [part[: kept.start], part.new_zeros(len(kept)), part[kept.stop :]]


class _Theta(torch.autograd.Function):
    """The same with its adjoint as one node, without dispatch: small networks notice both.

    A tensor that has a call to itself is projected as soon as its gradient is there, which is then
    free: the peak is one tensor's gradient, or GROUP weights. Nothing is saved for the backward
    pass, so that activation checkpoints find the same tensors when they run a part again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        step: Tensor,
        calls: Sequence[Call],
        dtype: torch.dtype | None,
        *bases: Tensor,
    ) -> Any:
        ctx.calls, ctx.step, ctx.w = calls, step, w.detach()
        with torch._C.DisableTorchFunctionSubclass():
            return tuple(form(ctx.w, step, calls, bases, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        along = _each(functools.partial(_project, ctx.w, ctx.step), ctx.calls, grads)
        total = along[0] if len(along) == 1 else torch.stack(along).sum(0)
        return total, None, None, None, *(None for _ in grads)


def _project(w: Tensor, step: Tensor, call: Call, grads: Sequence[Tensor]) -> list[Tensor]:
    """Pᵀ g of a call, alone in a list."""
    parts = []
    for grad, kept in zip(grads, call.kept, strict=True):
        dense = grad.to_dense() if grad.is_sparse else grad
        parts.extend(_around(dense.reshape(-1), kept) if kept else [dense])
    if torch.is_grad_enabled():  # a second derivative follows
        flat = [part.reshape(-1).to(w.device, w.dtype) for part in parts]
        return [product(torch.cat(flat), step, call.recipe, call.start, call.stop, True)]
    return [gather(from_recipe(call.recipe), parts, w, step, call.start)]


def key(compartment: str) -> str:
    """A compartment's name as a parameter's: dots would be read as submodules."""
    name = compartment.replace("%", "%25").replace("/", "%2F").replace(".", "/")
    return name + "/" if hasattr(nn.ParameterDict(), name) else name


def layout(
    compartments: Sequence[Compartment], projection: str, seed: int, options: Mapping[str, Any]
) -> str:
    """Digest of what w means: the family, and which weights the rows of each compartment are."""
    rows = [[part.dim, [astuple(piece) for piece in part.pieces]] for part in compartments]
    text = json.dumps([projection, seed, options, rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
