"""The rows of P are grouped into blocks, and θ₀ + P w of a block is one node of the graph."""

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

GROUP = 1 << 20  # weights up to which a block has the rows of several tensors


@dataclass(frozen=True)
class Block:
    """Rows start … stop−1 of a projection, which are those of consecutive pieces of tensors."""

    coordinates: str
    recipe: str
    start: int
    stop: int
    pieces: tuple[Piece, ...]
    kept: tuple[range, ...]
    """Entries of each piece that stay at θ₀ whatever the coordinates are; empty for most."""


def group_into_blocks(
    compartments: Sequence[Compartment],
    projections: Sequence[Projection],
    kept: Mapping[str, range] | None = None,
) -> tuple[Block, ...]:
    """Group rows of P: small tensors share a block; a family that is not local has one block.

    Args:
        compartments: of the weights.
        projections: of the compartments.
        kept: entries of flattened tensors that stay at θ₀, by the tensor's name.
    """
    kept = kept or {}
    blocks = []
    for part, projection in zip(compartments, projections, strict=True):
        limit = GROUP if projection.local else part.weights
        start = stop = 0
        group: list[Piece] = []
        for piece in (*part.pieces, None):
            if group and (piece is None or stop - start + len(piece) > limit):
                inside = tuple(_inside(kept.get(p.tensor, range(0)), p) for p in group)
                blocks.append(
                    Block(
                        parameter_key(part.name),
                        projection.recipe,
                        start,
                        stop,
                        tuple(group),
                        inside,
                    )
                )
                start, group = stop, []
            if piece is not None:
                group.append(piece)
                stop += len(piece)
    return tuple(blocks)


def _inside(kept: range, piece: Piece) -> range:
    """The entries of a tensor that are kept, counted from the start of a piece of it."""
    start, stop = max(kept.start, piece.start), min(kept.stop, piece.stop)
    return range(start - piece.start, stop - piece.start) if start < stop else range(0)


def form_theta(
    w: Tensor,
    step: Tensor,
    blocks: Sequence[Block],
    bases: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> Sequence[Tensor]:
    """θ₀ + P w of the pieces of blocks.

    Args:
        w: (d,) coordinates.
        step: which redraw of P, 0-D int64.
        blocks: which rows.
        bases: θ₀ of every piece, in any shape, on any device.
        dtype: of the results, where it is not that of each base.

    Returns:
        Tensors like ``bases``; low precisions are added up in that of ``w``, and rounded once.
    """
    if captured(w) or transformed() or any(base.requires_grad for base in bases):
        # What is recorded runs elsewhere: a frozen base goes there as an ordinary tensor.
        plain = [base if base.requires_grad else base.detach() for base in bases]
        thetas = _each(functools.partial(_theta, w, step), blocks, plain)
        return thetas if dtype is None else [theta.to(dtype) for theta in thetas]
    return _Theta.apply(w, step, blocks, dtype, *bases)


def _each(
    compute: Callable[[Block, Sequence[Tensor]], list[Tensor]],
    blocks: Sequence[Block],
    tensors: Sequence[Tensor],
) -> list[Tensor]:
    """What ``compute`` makes of every block and its share of the tensors, in one list."""
    if len(blocks) == 1:
        return compute(blocks[0], tensors)
    found, place = [], 0
    for block in blocks:
        found += compute(block, tensors[place : place + len(block.pieces)])
        place += len(block.pieces)
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


def _theta(w: Tensor, step: Tensor, block: Block, bases: Sequence[Tensor]) -> list[Tensor]:
    """θ₀ + P w by operators that autograd and compilers see."""
    rows = product(w, step, block.recipe, block.start, block.stop, False)
    parts = rows.split([len(piece) for piece in block.pieces])
    return [
        (base + _without(part, kept).view(base.shape).to(base.device)).to(base.dtype)
        for base, part, kept in zip(bases, parts, block.kept, strict=True)
    ]


def form_values(
    w: Tensor,
    step: Tensor,
    blocks: Sequence[Block],
    bases: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """θ₀ + P w as numbers, without a graph: see :func:`form_theta`."""
    return _each(functools.partial(_form, w, step, dtype), blocks, bases)


def _form(
    w: Tensor, step: Tensor, dtype: torch.dtype | None, block: Block, bases: Sequence[Tensor]
) -> list[Tensor]:
    thetas = add(from_recipe(block.recipe), bases, w, step, block.start, dtype=dtype)
    for theta, base, kept in zip(thetas, bases, block.kept, strict=True):
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

    A tensor that has a block to itself is projected as soon as its gradient is there, which is then
    free: the peak is one tensor's gradient, or GROUP weights. Nothing is saved for the backward
    pass, so that activation checkpoints find the same tensors when they run a part again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        step: Tensor,
        blocks: Sequence[Block],
        dtype: torch.dtype | None,
        *bases: Tensor,
    ) -> Any:
        ctx.blocks, ctx.step, ctx.w = blocks, step, w.detach()
        with torch._C.DisableTorchFunctionSubclass():
            return tuple(form_values(ctx.w, step, blocks, bases, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        along = _each(functools.partial(_project, ctx.w, ctx.step), ctx.blocks, grads)
        total = along[0] if len(along) == 1 else torch.stack(along).sum(0)
        return total, None, None, None, *(None for _ in grads)


def _project(w: Tensor, step: Tensor, block: Block, grads: Sequence[Tensor]) -> list[Tensor]:
    """Pᵀ g of a block, alone in a list."""
    parts = []
    for grad, kept in zip(grads, block.kept, strict=True):
        dense = grad.to_dense() if grad.is_sparse else grad
        parts.extend(_around(dense.reshape(-1), kept) if kept else [dense])
    if torch.is_grad_enabled():  # a second derivative follows
        flat = [part.reshape(-1).to(w.device, w.dtype) for part in parts]
        return [product(torch.cat(flat), step, block.recipe, block.start, block.stop, True)]
    return [gather(from_recipe(block.recipe), parts, w, step, block.start)]


def parameter_key(compartment: str) -> str:
    """A compartment's name as a parameter's: dots would be read as submodules."""
    name = compartment.replace("%", "%25").replace("/", "%2F").replace(".", "/")
    return name + "/" if hasattr(nn.ParameterDict(), name) else name


def digest_layout(
    compartments: Sequence[Compartment], projection: str, seed: int, options: Mapping[str, Any]
) -> str:
    """Digest of what w means: the family, and which weights the rows of each compartment are."""
    rows = [[part.dim, [astuple(piece) for piece in part.pieces]] for part in compartments]
    text = json.dumps([projection, seed, options, rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
