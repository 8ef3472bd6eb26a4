"""The product P x, or its adjoint, as one operator: for eager programs, compilers and transforms.

The map is linear, so that every derivative of it is itself or its adjoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
    enable_single_level_autograd_function,
)
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from subspan.errors import SubspanError
from subspan.families.registry import from_recipe


def as_step(step: int | Tensor) -> Tensor:
    """Turn a step into what the operator takes: a 0-D int64 tensor."""
    if isinstance(step, Tensor):
        return step
    return torch.scalar_tensor(step, dtype=torch.int64, device="cpu")


def compute(x: Tensor, step: Tensor, recipe: str, start: int, stop: int, adjoint: bool) -> Tensor:
    """Compute P x or Pᵀ x for rows start … stop−1, unseen by autograd and compilers.

    The result is never ``x`` itself, which no operator and no function of autograd may return.
    """
    out = from_recipe(recipe)._apply(x, step, start, stop, adjoint)
    return out.clone() if out.data_ptr() == x.data_ptr() else out


def product(x: Tensor, step: Tensor, recipe: str, start: int, stop: int, adjoint: bool) -> Tensor:
    """Compute P x or Pᵀ x for rows start … stop−1, without the checks of the public methods.

    It has derivatives of any order, in backward and forward mode and under ``torch.func``.
    """
    if captured(x):
        return project(x, step, recipe, start, stop, adjoint)
    return _Product.apply(x, step, recipe, start, stop, adjoint)


def captured(x: Tensor) -> bool:
    """Return whether a graph of operators is being recorded, in which ours must be one operator."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    return x.is_meta or type(x) not in (Tensor, torch.nn.Parameter) or batched(x)


def composed(grads: Sequence[Tensor]) -> bool:
    """Return whether a backward pass must consist of operators: of a second one, or of vmap."""
    return torch.is_grad_enabled() or transformed() or any(map(batched, grads))


def batched(x: Tensor) -> bool:
    """Return whether a tensor stands for several in a vmap of autograd's own.

    That vmap (of ``is_grads_batched``, ``jacobian(vectorize=True)``) knows operators alone.
    """
    return torch._C._functorch.is_legacy_batchedtensor(x)


def transformed() -> bool:
    """Return whether a transform of torch.func, or forward mode, is under way."""
    functorch = torch._C._functorch.maybe_current_level() is not None
    return functorch or forward_ad._current_level >= 0


class _Product(torch.autograd.Function):
    """The product for eager programs, with rules for every transform of PyTorch."""

    @staticmethod
    def forward(
        x: Tensor, step: Tensor, recipe: str, start: int, stop: int, adjoint: bool
    ) -> Tensor:
        return compute(x.detach(), step, recipe, start, stop, adjoint)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.step, *ctx.rest = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        recipe, start, stop, adjoint = ctx.rest
        back = product(grad, ctx.step, recipe, start, stop, not adjoint)
        return back, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return product(tangent, ctx.step, *ctx.rest)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, step: Tensor, *rest: Any
    ) -> tuple[Tensor, int]:
        if in_dims[1] is not None:
            raise SubspanError("vmap over the step of a projection: give all samples one step")
        return torch.stack([product(one, step, *rest) for one in x.unbind(in_dims[0])]), 0


# ---- the operator: opaque to compilers, differentiable, its backward is its own adjoint ----------


_library = torch.library.Library("subspan", "FRAGMENT")
_library.define(
    "project(Tensor x, Tensor step, str recipe, SymInt start, SymInt stop, bool adjoint) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
project = torch.ops.subspan.project.default
"""P x or Pᵀ x as an operator, for graphs that are compiled, exported or traced."""


@torch._compile._disable_dynamo
def _run(x: Tensor, step: Tensor, recipe: str, start: int, stop: int, adjoint: bool) -> Tensor:
    with torch.no_grad():
        return compute(x.detach(), step, recipe, start, stop, adjoint)


def _shape(x: Tensor, step: Tensor, recipe: str, start: int, stop: int, adjoint: bool) -> Tensor:
    return x.new_empty(from_recipe(recipe).in_dim if adjoint else stop - start)


class _Projected(_SingleLevelFunction):
    """The derivatives of the operator, at one level of what may be several transforms.

    Those that :mod:`torch.library` makes are refused inside of ``torch.func.grad``, and forward
    mode goes by without a word.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, *rest: Any) -> Tensor:
        ctx.rest = rest
        ctx.save_for_backward(step)
        ctx.save_for_forward(step)
        # Other levels record their derivatives below this one.
        below = torch._C._AutoDispatchBelowAutograd()
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), below:
            return project(x, step, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (step,), (*rows, adjoint) = ctx.saved_tensors, ctx.rest
        return project(grad, step, *rows, not adjoint), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return project(tangent, *ctx.saved_tensors, *ctx.rest)


def _differentiate(*arguments: Any) -> Tensor:
    with enable_single_level_autograd_function():
        return _Projected.apply(*arguments)  # type: ignore[attr-defined]


_library.impl("project", _run, "CompositeExplicitAutograd")
_library.impl("project", _differentiate, "Autograd")
torch.library.register_fake("subspan::project", _shape, lib=_library)
