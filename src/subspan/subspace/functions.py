"""Functions of PyTorch, as ``__torch_function__`` is given them: which write, set, or only move."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map_only

ordinary_tensors = torch._C.DisableTorchFunctionSubclass  # a context: no __torch_function__ runs

_IN_PLACE = (
    {"__idiv__"}
    | {  # __iadd__, say, beside __add__
        name for name in dir(operator) if name[:3] == "__i" and hasattr(operator, f"__{name[3:]}")
    }
)
_MOVING = "to cpu cuda type type_as float half double bfloat16 contiguous pin_memory _to_copy"
_COPYING = "detach clone new __deepcopy__ view_as expand_as reshape_as"
_HARMLESS = frozenset(f"{_MOVING} {_COPYING}".split())
_BOUNDING = (
    "clamp clamp_min clamp_max clip minimum maximum renorm threshold hardtanh relu normalize"
)
_SHRINKING = "softshrink hardshrink pow square sqrt exp log tanh sigmoid softmax"
_MASKING = "masked_fill masked_scatter where dropout tril triu fill_diagonal"
_AT_INDICES = "index_fill index_copy index_add index_put put scatter scatter_add scatter_reduce"
_ROUNDING = (
    "round floor ceil trunc fix sign sgn abs absolute "
    "fake_quantize_per_tensor_affine fake_quantize_per_channel_affine"
)
_EACH = frozenset(f"{_BOUNDING} {_SHRINKING} {_MASKING} {_AT_INDICES} {_ROUNDING}".split())


def uncounted() -> AbstractContextManager[Any]:
    """Return a context whose operators are none of the network's to a selective checkpoint.

    It counts them when a part runs, and again when it runs once more; what is kept during a call is
    made by whoever reads it first, and only then.
    """
    modes = [] if torch.compiler.is_compiling() else _get_current_dispatch_mode_stack()
    counts = any(type(mode).__module__ == "torch.utils.checkpoint" for mode in modes)
    return _disable_current_modes() if counts else nullcontext()


def property_of(function: Any) -> str:
    """Return the name of the property whose getter or setter this is; "" of other functions."""
    return getattr(getattr(function, "__self__", None), "__name__", "")


def sets_flag(function: Any) -> bool:
    """Return whether a function sets ``requires_grad``, as a property or by its method."""
    name = getattr(function, "__name__", "")
    return name == "requires_grad_" or (
        name == "__set__" and property_of(function) == "requires_grad"
    )


def writes_first(function: Any) -> bool:
    """Return whether a function writes to its first argument."""
    name = getattr(function, "__name__", "")
    if name == "__set__":
        return property_of(function) == "data"
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or name in _IN_PLACE


def written_by(function: Any, args: Any, kwargs: Any) -> list[Any]:
    """Return what a function writes to, tensors or lists of them, and perhaps None."""
    written = [kwargs.get("out")]
    if writes_first(function) or receives(function, kwargs):
        written.append(args[0] if args else kwargs.get("tensor"))
    return written


def receives(function: Any, kwargs: Any) -> bool:
    """Return whether a collective of torch.distributed writes to its first argument here."""
    if getattr(function, "__module__", "") != "torch.distributed.distributed_c10d":
        return False
    name, group = function.__name__, kwargs.get("group")
    if name != "broadcast":
        return name not in ("send", "isend", "gather")
    if (source := kwargs.get("group_src")) is None:
        source, group = kwargs.get("src"), None
    ready = torch.distributed.is_initialized()
    return not ready or bool(torch.distributed.get_rank(group) != source)


def changes_each_entry(function: Any, args: Any) -> bool:
    """Return whether one that writes changes entries of its first argument each in its own way.

    What adds to all of them, multiplies them by a number or writes over them does the same to a sum
    of tensors if it is done to both; a bound, a mask or a power does not.
    """
    name = getattr(function, "__name__", "").removeprefix("_foreach_")
    if name == "__setitem__":
        return not all(_selects_all(index) for index in tree_leaves([args[1]]))
    name = name.removeprefix("__i").strip("_")
    if name in ("mul", "multiply", "div", "divide", "truediv"):
        return any(isinstance(t, Tensor) and t.dim() > 0 for t in tree_leaves(args[1:]))
    return name in _EACH


def _selects_all(index: Any) -> bool:
    return index is None or index is ... or (isinstance(index, slice) and index == slice(None))


def is_harmless(name: str) -> bool:
    """Return whether a function moves or changes a parameter, and computes nothing from it."""
    if name in _HARMLESS or name.endswith("_like") or name.startswith(("new_", "__i")):
        return True
    return name.endswith("_") and not name.endswith("__")


def read_only(array: Any, tensor: Tensor) -> None:
    """Let nobody write to an array of NumPy's that shares a tensor's memory."""
    shared = array.__array_interface__["data"][0] == tensor.data_ptr()
    array.flags.writeable &= not shared


def address_of(tensor: Tensor) -> int:
    """Return where a tensor's storage lies; 0 if it has none, as in transforms of torch.func."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same storage."""
    return address_of(one) == address_of(other) != 0


def map_tensors(function: Callable[[Tensor], Tensor], out: Any) -> Any:
    """Apply a function to the tensors of a result; a size, a tuple to PyTorch, stays a size."""
    return out if isinstance(out, torch.Size) else tree_map_only(Tensor, function, out)
