"""The weight of a layer that computes it when it is read: ordinary, but not to write to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from subspan.errors import SubspanError
from subspan.families.operator import transformed
from subspan.layers.factors import plain
from subspan.subspace.functions import property_of, share_memory, written_by

_OF_GRADIENTS = ("register_hook", "register_post_accumulate_grad_hook")


class Weight(Tensor):
    """A weight that was made a moment ago and belongs to nobody: a change of it would be lost."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, property_of(func) or getattr(func, "__name__", "")
        changed = args[:1] if name in _OF_GRADIENTS else written_by(func, args, kwargs)
        lost = any(isinstance(t, Weight) for t in tree_leaves(changed))
        if lost and name != "requires_grad_":
            raise SubspanError(
                f"the weight of a compressed layer is computed when it is read, and what {name} "
                "does to it would be lost: change the ordinary layer before, or that of "
                "layers.merge()"
            )
        with plain():
            out = func(*args, **kwargs)
            first = args[0] if args else None
            if type(out) is Tensor and isinstance(first, Weight) and share_memory(out, first):
                out = out.as_subclass(Weight)
        return out

    @property
    def _is_param(self) -> bool:
        """Whether it is a parameter to PyTorch, whose ``nn.Parameter(weight)`` sets this."""
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        self.__class__ = nn.Parameter  # type: ignore[assignment]  # of another module, from now on

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with plain():
            return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        with plain():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)


def guard(weight: Tensor) -> Tensor:
    """Make a computed weight a :class:`Weight`, where it is one person's and not a compiler's."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or transformed():
        return weight
    return weight.as_subclass(Weight) if type(weight) is Tensor else weight
