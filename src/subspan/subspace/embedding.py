"""An embedding of a large network forms the rows of θ that are looked up, and no others.

A table of words is often most of a network, and a batch looks up a few of its rows: the rest of
θ₀ + P w would be formed for nothing, and so would its gradient, which is zero there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subspan import kernels
from subspan.families.operator import composed, product
from subspan.families.registry import from_recipe
from subspan.subspace.blocks import Block
from subspan.subspace.functions import ordinary_tensors

if TYPE_CHECKING:
    from subspan.subspace.weights import Weights

SAVING = 4  # a row alone takes up to so many times as long as in a run: tiles are made whole


def look_up(weights: Weights, tensor: str, module: Any, ids: Tensor) -> Tensor | None:
    """Rows of θ; None where θ is to be formed as a whole."""
    if type(ids) is not Tensor or not ids.is_cpu or module.max_norm or module.scale_grad_by_freq:
        return None
    if (found := weights.alone(tensor)) is None:
        return None
    w, block, base = found
    kernel = _find_kernel(block, w)
    if kernel is None or base.dim() != 2 or not base.is_cpu:
        return None
    with ordinary_tensors():
        words, places = torch.unique(ids, return_inverse=True)
        if not 0 < SAVING * len(words) <= len(base):
            return None
        # Padding rows have no gradient; those that no other layer shares stay at θ₀, too.
        padding = module.padding_idx
        add, _ = kernel
        return _Rows.apply(w, weights.step, block, base, words, places, padding, add)


def _find_kernel(
    block: Block, w: Tensor
) -> tuple[Callable[..., None], Callable[..., Tensor]] | None:
    """Find both products for rows that do not follow each other; none in a forked process."""
    kernel = kernels.find(from_recipe(block.recipe).family, w)
    if kernel is None or kernel.added_apart is None or kernel.gathered_apart is None:
        return None
    return kernel.added_apart, kernel.gathered_apart


class _Rows(torch.autograd.Function):
    """(θ₀ + P w)[words][places], and its adjoint."""

    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        step: Tensor,
        block: Block,
        base: Tensor,
        words: Tensor,
        places: Tensor,
        padding: int | None,
        add: Callable[..., None],
    ) -> Tensor:
        p, width = from_recipe(block.recipe), base.shape[1]
        p.check_coordinates(w)
        kept = words == block.kept[0].start // width if block.kept[0] else None
        unmoved = words == padding if padding is not None else None
        ctx.set_materialize_grads(False)
        ctx.of = w.detach(), step, block, base.shape, words, places, unmoved
        rows = base.detach().index_select(0, words)
        before = None if kept is None else rows[kept]
        sums = rows.to(w.dtype).contiguous()
        add(p, w.detach().contiguous(), step, block.start + words * width, sums)
        rows = sums.to(base.dtype)
        if before is not None:
            rows[kept] = before
        return rows[places]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        w, step, block, shape, words, places, unmoved = ctx.of
        nothing: Sequence[None] = (None,) * 7
        if grad is None:
            return None, *nothing
        width = shape[1]
        flat = grad.reshape(-1, width).to(w.dtype)
        parts = flat.new_zeros(len(words), width).index_add(0, places.reshape(-1), flat)
        if unmoved is not None:
            parts = parts.masked_fill(unmoved.unsqueeze(1), 0)
        kernel = _find_kernel(block, w)
        if kernel is None or composed([grad]):
            # The process was forked since and has no kernels, or operators are asked for.
            dense = parts.new_zeros(shape).index_copy(0, words, parts).reshape(-1)
            return product(dense, step, block.recipe, block.start, block.stop, True), *nothing
        _, gather = kernel
        p, firsts = from_recipe(block.recipe), block.start + words * width
        return gather(p, parts, step, firsts), *nothing
