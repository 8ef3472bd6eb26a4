"""θ₀ + P w of blocks as one node of autograd's graph, and without a graph as numbers.

The node computes θ and, in the backward pass, Pᵀ g. It is one node without dispatch, because small
networks notice both. Where a graph is recorded or a transform is under way, the same is composed of
operators that PyTorch can look into.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from subspan.families.operator import captured, composed, product, transformed
from subspan.families.registry import from_recipe
from subspan.families.updates import add, gather
from subspan.subspace.blocks import Block
from subspan.subspace.functions import ordinary_tensors


def form_theta(
    w: Tensor,
    step: Tensor,
    blocks: Sequence[Block],
    bases: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> Sequence[Tensor]:
    """Form θ₀ + P w of the pieces of blocks, differentiable in the coordinates ``w``, (d,).

    ``bases`` are θ₀ of every piece, in any shape, on any device. The results are like them, but for
    the dtype, if there is one; low precisions are added up in that of ``w``, and rounded once. The
    number of the redraw of P is ``step``, 0-D int64.
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
    """Compute every block with its share of the tensors, and return all results in one list."""
    if len(blocks) == 1:
        return compute(blocks[0], tensors)
    results, first = [], 0
    for block in blocks:
        results += compute(block, tensors[first : first + len(block.pieces)])
        first += len(block.pieces)
    return results


def with_dense_gradient(theta: Tensor) -> Tensor:
    """Let a weight have a sparse gradient, as embeddings do, though its parts take none."""
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
    """Compose θ₀ + P w of operators that autograd and compilers see."""
    rows = product(w, step, block.recipe, block.start, block.stop, False)
    parts = rows.split([len(piece) for piece in block.pieces])
    moves = [torch.cat(_around(p, k)) if k else p for p, k in zip(parts, block.kept, strict=True)]
    return [
        (base + move.view(base.shape).to(base.device)).to(base.dtype)
        for base, move in zip(bases, moves, strict=True)
    ]


def form_values(
    w: Tensor,
    step: Tensor,
    blocks: Sequence[Block],
    bases: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Compute θ₀ + P w as numbers, without a graph; arguments are those of :func:`form_theta`."""
    return _each(functools.partial(_form, w, step, dtype), blocks, bases)


def _form(
    w: Tensor, step: Tensor, dtype: torch.dtype | None, block: Block, bases: Sequence[Tensor]
) -> list[Tensor]:
    thetas = add(from_recipe(block.recipe), bases, w, step, block.start, dtype=dtype)
    for theta, base, kept in zip(thetas, bases, block.kept, strict=True):
        if kept:
            entries = slice(kept.start, kept.stop)
            theta.view(-1)[entries] = base.reshape(-1)[entries]
    return thetas


def _around(part: Tensor, kept: range) -> list[Tensor]:
    """Return a vector with zeros for weights that stay at θ₀, in pieces that copy nothing."""
    return [part[: kept.start], part.new_zeros(len(kept)), part[kept.stop :]]


class _Theta(torch.autograd.Function):
    """θ₀ + P w with its adjoint as one node.

    A tensor that has a block to itself is projected as soon as its gradient is there, and the
    gradient is then freed: the peak is one tensor's gradient, or GROUP weights. Nothing is saved
    for the backward pass, so that activation checkpoints find the same tensors when they run a part
    again.
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
        with ordinary_tensors():
            return tuple(form_values(ctx.w, step, blocks, bases, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        along = _each(functools.partial(_project, ctx.w, ctx.step), ctx.blocks, grads)
        total = along[0] if len(along) == 1 else torch.stack(along).sum(0)
        return total, None, None, None, *(None for _ in grads)


def _project(w: Tensor, step: Tensor, block: Block, grads: Sequence[Tensor]) -> list[Tensor]:
    """Compute Pᵀ g of a block, and return it in a list of one."""
    parts = []
    for grad, kept in zip(grads, block.kept, strict=True):
        dense = grad.to_dense() if grad.is_sparse else grad
        parts.extend(_around(dense.reshape(-1), kept) if kept else [dense])
    if composed(parts):
        flat = [part.reshape(-1).to(w.device, w.dtype) for part in parts]
        return [product(torch.cat(flat), step, block.recipe, block.start, block.stop, True)]
    return [gather(from_recipe(block.recipe), parts, w, step, block.start)]
