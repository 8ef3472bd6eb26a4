"""How the products of a model are grouped into calls, and how a network runs with other weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from subspan.compartments import Compartment, Piece
from subspan.errors import SubspanError
from subspan.families.base import Projection, compute, project

GROUP = 1 << 20  # weights up to which one call of the operator serves several tensors


@dataclass(frozen=True)
class Call:
    """One call of the operator: rows start … stop−1 of a projection, for consecutive pieces."""

    coordinates: str
    recipe: str
    start: int
    stop: int
    pieces: tuple[Piece, ...]


def plan(
    compartments: Sequence[Compartment], projections: Sequence[Projection]
) -> tuple[Call, ...]:
    """Small tensors share a call; a family that computes all rows at once is called once."""
    calls = []
    for part, projection in zip(compartments, projections, strict=True):
        limit = GROUP if projection.local else part.weights
        start = stop = 0
        group: list[Piece] = []
        for piece in (*part.pieces, None):
            if group and (piece is None or stop - start + len(piece) > limit):
                calls.append(Call(key(part.name), projection.recipe, start, stop, tuple(group)))
                start, group = stop, []
            if piece is not None:
                group.append(piece)
                stop += len(piece)
    return tuple(calls)


def theta(w: Tensor, step: Tensor, call: Call, bases: Sequence[Tensor]) -> Sequence[Tensor]:
    """θ₀ + P w of a call's pieces.

    Args:
        w: (d,) coordinates.
        step: which redraw of P, 0-D int64.
        call: which rows.
        bases: θ₀ of every piece, in any shape, on any device.

    Returns:
        Tensors like ``bases``; low precisions are added up in that of ``w``, and rounded once.
    """
    if traced(w):
        return _theta(project, w, step, call, bases)
    return _Theta.apply(w, step, call, *bases)


def traced(x: Tensor) -> bool:
    """Whether something follows the operators that are called, and must meet ours among them."""
    stand_in = x.is_meta or type(x) not in (Tensor, nn.Parameter)
    return stand_in or torch.compiler.is_compiling()


def _theta(
    product: Callable[..., Tensor], w: Tensor, step: Tensor, call: Call, bases: Sequence[Tensor]
) -> list[Tensor]:
    rows = product(w, step, call.recipe, call.start, call.stop, False)
    parts = rows.split([len(piece) for piece in call.pieces]) if len(bases) > 1 else [rows]
    return [_added(base, part.view(base.shape)) for base, part in zip(bases, parts, strict=True)]


def _added(base: Tensor, part: Tensor) -> Tensor:
    if part.requires_grad or base.dtype != part.dtype or base.device != part.device:
        return (base + part.to(base.device)).to(base.dtype)
    return part.add_(base)  # rows of P w that nobody else has


class _Theta(torch.autograd.Function):
    """The same with its adjoint as one node, without dispatch: small networks notice both.

    A tensor that has a call to itself is projected as soon as its gradient is there, which is then
    free: the peak is one tensor's gradient, or GROUP weights.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, step: Tensor, call: Call, *bases: Tensor) -> Any:
        ctx.call, ctx.device, ctx.dtype = call, w.device, w.dtype
        ctx.save_for_backward(step)
        return tuple(_theta(compute, w, step, call, bases))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (step,), call = ctx.saved_tensors, ctx.call
        parts = [grad.to(ctx.device, ctx.dtype).reshape(-1) for grad in grads]
        g = parts[0] if len(parts) == 1 else torch.cat(parts)
        product = project if torch.is_grad_enabled() else compute  # a second derivative follows
        w_grad = product(g, step, call.recipe, call.start, call.stop, True)
        return w_grad, None, None, *(None for _ in grads)


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


def refuse_reentrant_checkpoints(arguments: Any, out: Any) -> None:
    """Refuse what ``torch.utils.checkpoint(…, use_reentrant=True)`` made between these tensors.

    The backward pass would run those parts again, at θ₀, and θ would get no gradient from them.
    (Without reentrance torch itself notices that something else is recomputed.)
    """
    before, after = (
        {t.grad_fn for t in tree_leaves(tree) if isinstance(t, Tensor) and t.grad_fn}
        for tree in (arguments, out)
    )
    nodes, seen = list(after - before), before | after
    while nodes:
        node = nodes.pop()
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise SubspanError(
                "activation checkpointing runs the network again without its trained weights: "
                "switch it off for a SubspaceModel"
            )
        new = {before for before, _ in node.next_functions if before} - seen
        seen |= new
        nodes += new
