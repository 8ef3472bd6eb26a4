"""Tensors that FSDP has spread over processes (DTensors): whose θ₀ they are, and their guard.

The rules and the sentences are those of whole tensors (:mod:`subspan.subspace.theta0`,
:mod:`subspan.subspace.computed`); the class is another one, because a DTensor keeps its kind.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from subspan.errors import SubspanError
from subspan.subspace import functions
from subspan.subspace.callers import find_left_by_fsdp1
from subspan.subspace.computed import refuse_change
from subspan.subspace.functions import ordinary_tensors, property_of
from subspan.subspace.links import link_of
from subspan.subspace.theta0 import Base, refuse_use, take_wish

if TYPE_CHECKING:
    from subspan.subspace.weights import Weights

HOME = "_subspan_home"  # of a tensor that FSDP, or we, have made: of what, and whether it is θ


def is_shard(tensor: Any) -> bool:
    """Return whether a tensor is spread over processes; nothing is imported to know it."""
    return type(tensor).__name__ == "DTensor"


@functools.cache
def _guarded_dtensor() -> type[Tensor]:
    """Make the kind of DTensor that shards of θ₀ and of θ are, as careful as whole tensors."""
    from torch.distributed.tensor import DTensor

    class Guarded(DTensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            name = getattr(func, "__name__", "")
            first: Any = args[0] if args else None
            if type(first) is Guarded:
                weights, tensor, theta = getattr(first, HOME, (None, "", False))
                if weights is not None and not theta and functions.sets_flag(func):
                    return take_wish((weights, tensor), name, args, kwargs)
                if theta and functions.writes_first(func):
                    raise refuse_change(tensor, func, instead="")
            with ordinary_tensors():
                out = func(*args, **kwargs)
                views = name == "detach" or property_of(func) == "data"
                if views and is_shard(out) and functions.share_memory(local(out), local(first)):
                    mark(out, *getattr(first, HOME))
                if name in ("__get__", "__set__") or functions.is_harmless(name):
                    return out
                for leaf in tree_leaves((args, kwargs)):
                    _, tensor, theta = getattr(leaf, HOME, None) or (None, "", True)
                    if type(leaf) is Guarded and not theta and _computes(out, leaf):
                        raise refuse_use(tensor, name, "a shard of θ₀")
            return out

        def __reduce_ex__(self, protocol: Any) -> Any:
            with ordinary_tensors():
                return self.detach().__reduce_ex__(protocol)

    Guarded.__name__ = Guarded.__qualname__ = "DTensor"  # which is how everybody knows one
    Guarded.__module__ = DTensor.__module__
    return Guarded


def _computes(out: Any, base: Any) -> bool:
    """Return whether a result has numbers that are not those of a shard itself."""
    return any(
        isinstance(t, Tensor)
        and t.is_floating_point()
        and not functions.share_memory(local(t), base._local_tensor)
        for t in tree_leaves(out)
    )


def mark(parameter: Any, weights: Weights, tensor: str, theta: bool = False) -> None:
    """Note whose θ₀ (or θ) a tensor is that FSDP or this library has made."""
    setattr(parameter, HOME, (weights, tensor, theta))
    if is_shard(parameter):
        parameter.__class__ = _guarded_dtensor()


def home_of(parameter: Any) -> tuple[Weights, str] | None:
    """Return the network and the name whose θ₀ a parameter is, FSDP's included, or None."""
    if isinstance(parameter, Base):
        return getattr(parameter, "home", None)  # one without is an exporter's
    weights, tensor, theta = getattr(parameter, HOME, (None, "", True))
    return None if theta or weights is None else (weights, tensor)


def refuse_sharded(net: nn.Module) -> None:
    """Refuse a network that is spread over processes already."""
    for prefix, module in net.named_modules():
        for name, p in module._parameters.items():
            if is_shard(p):
                raise SubspanError(
                    f"{prefix}.{name} is sharded over processes already, and a subspace is made of "
                    "whole tensors: wrap the network first, SubspaceModel(net, …), and then call "
                    "fully_shard on its layers and on it"
                )


def refuse_flattening(module: nn.Module, frame: FrameType) -> None:
    """Refuse FSDP1, which makes one parameter of many, unless it leaves the coordinates alone."""
    left = find_left_by_fsdp1(frame)
    if left is not None and not left.issuperset(link_of(module).weights.coordinates().values()):
        raise SubspanError(
            "FullyShardedDataParallel (FSDP1) makes one parameter of many, and weights that are "
            "computed from coordinates cannot be among them: call fully_shard (FSDP2) on the "
            "layers and on the network; accelerate has it as fsdp_version=2"
        )


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what its shards are together: then all processes must ask."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or this process's part of it."""
    return tensor._local_tensor.detach() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def copy_into(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be spread over processes."""
    if is_shard(target):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as place

        mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
        shape, offset = place(target.shape, mesh, placements)
        inside = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
        target, value = local(target), value[inside]
    with torch.inference_mode() if target.is_inference() else torch.no_grad():
        target.copy_(value)
