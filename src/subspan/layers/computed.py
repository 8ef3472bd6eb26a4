"""The weight of a layer that computes it when it is read: ordinary, but not to write to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from subspan.errors import SubspanError
from subspan.families.operator import transformed
from subspan.subspace.functions import (
    ordinary_tensors,
    property_of,
    read_only,
    share_memory,
    written_by,
)
from subspan.subspace.transient import Transient

_OF_GRADIENTS = ("register_hook", "register_post_accumulate_grad_hook")
LOST = "the weight of a compressed layer is computed when it is read, and what {} would be lost: {}"
ORDINARY = "change the ordinary layer before, or that of layers.merge()"


class Weight(Transient):
    """A weight that was made a moment ago and belongs to nobody: a change of it would be lost.

    A compiled function reads it from the layer, or takes a ``clone()`` of it: Dynamo cannot follow
    what is refused here.
    """

    # Whether this is the weight as the layer gives it, and no view or detached tensor of it, which
    # has flags, gradients and attributes of its own with any layer.
    read = False

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, property_of(func) or getattr(func, "__name__", "")
        changed = args[:1] if name in _OF_GRADIENTS else written_by(func, args, kwargs)
        lost = any(isinstance(t, Weight) for t in tree_leaves(changed))
        first = args[0] if args else None
        if name == "requires_grad_":
            if isinstance(first, Weight) and first.read:
                first.requires_grad = kwargs.get("requires_grad", (*args, True)[1])
                return first
        elif lost:
            raise SubspanError(LOST.format(f"{name} does to it", ORDINARY))
        elif name == "__dlpack__" and not kwargs.get("copy"):
            raise SubspanError(LOST.format("other libraries write to it", "give it .clone()"))
        with ordinary_tensors():
            out = func(*args, **kwargs)
            if name in ("numpy", "__array__"):
                read_only(out, args[0])
            elif type(out) is Tensor and isinstance(first, Weight) and share_memory(out, first):
                out = out.as_subclass(Weight)
        return out

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what is set on a tensor of one's own, or is as it was.

        Raises:
            SubspanError: for a weight as the layer gives it, which nobody sees again.
        """
        if not self.read or (name == "requires_grad" and value == self.requires_grad):
            super().__setattr__(name, value)
        elif name == "data":
            raise SubspanError(LOST.format("data does to it", ORDINARY))
        else:
            where = "set it on the layer's parameters"
            raise SubspanError(LOST.format(f"is set on it ({name})", where))


def guard(weight: Tensor) -> Tensor:
    """Make a computed weight a :class:`Weight`, where it is one person's and not a compiler's."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or transformed():
        return weight
    if type(weight) is Tensor:
        weight = weight.as_subclass(Weight)
        weight.read = True
    return weight
