"""A linear layer of a large weight multiplies by slices of θ, one after the other.

The head of a language model is its largest tensor. Whole, it takes θ, its gradient and what the
product needs beside them, which is a gradient in float32 where a processor has no instructions for
16 bits. In slices the peak is θ₀, a slice of all these, and the activations.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from subspan.families.registry import from_recipe
from subspan.precision import autocast_dtype
from subspan.subspace import formed, forming
from subspan.subspace.blocks import slice_of
from subspan.subspace.functions import ordinary_tensors, uncounted

if TYPE_CHECKING:
    from subspan.subspace.weights import Weights

LARGE = 4 * formed.KEPT  # weights of a tensor that is formed in slices
SLICE = formed.KEPT  # weights of a slice at most, or a row


def multiply(weights: Weights, tensor: str, module: Any, x: Tensor) -> Tensor | None:
    """Compute x θᵀ + b, (…, out); None where θ is to be formed as a whole.

    It is where the tensor is no large one, and where so many rows are multiplied that the result,
    of which there are two while it is put together, takes as much as the weight.
    """
    if len(weights.blocks_of[tensor][0].pieces[0]) <= LARGE:  # first, for most are small
        return None
    if (found := weights.alone(tensor, outside=True)) is None:
        return None
    w, block, base = found
    if type(x) is not Tensor or x.layout is not torch.strided or x.is_nested:
        return None
    few = 2 * x.numel() <= base.shape[-1] ** 2  # twice the results are no more than the weights
    fits = base.dim() == 2 and x.dim() > 0 and x.shape[-1] == base.shape[-1]
    if not (few and fits) or base.is_meta:
        return None
    if weights.variant() is not None or not from_recipe(block.recipe).local:
        return None  # a variant's θ is kept, and each slice of orthogonal would cost all of P w
    bias, dtype = module.bias, None
    if base.dtype == torch.float32:  # autocast casts no float64
        dtype = autocast_dtype(base.device)
    if dtype is not None and x.dtype == torch.float32:
        x = x.to(dtype)  # once; a copy for each slice would be kept for the backward pass
    rows = max(1, SLICE // base.shape[1])
    parts = range(0, len(base), rows)
    inputs = _Given.apply(x, len(parts)) if x.requires_grad else [x] * len(parts)
    outer, out = formed.find_call(weights), []
    for own, first in zip(inputs, parts, strict=True):
        last = min(first + rows, len(base))
        part = slice_of(block, range(first * base.shape[1], last * base.shape[1]))
        with ordinary_tensors(), uncounted():
            held = base.detach()[first:last]
            (theta,) = forming.form_theta(w, weights.step, [part], [held], dtype)
            if outer is not None:
                outer.remember(theta, tensor, [(w, weights.step, part, held)])
        out.append(linear(own, theta, None if bias is None else bias[first:last]))
    return torch.cat(out, dim=-1)


class _Given(torch.autograd.Function):
    """A tensor as the input of several operators, whose gradients for it are added in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, times: int) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for _ in range(times))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        return functools.reduce(torch.add, (g.to(wide) for g in grads)).to(grads[0].dtype), None
