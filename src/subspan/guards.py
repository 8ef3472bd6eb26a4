"""Tensors of a network in a subspace that refuse what would have no effect, or would mean θ₀.

:class:`Base` is what ``net.parameters()`` gives of a trained weight, θ₀; :class:`Computed` what
reading ``net.fc.weight`` outside of a call gives, θ. Everything that is right works as with
ordinary tensors; both look at a function of PyTorch before it is called.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from subspan.errors import SubspanError

if TYPE_CHECKING:
    from subspan.weights import Weights

_plain = torch._C.DisableTorchFunctionSubclass


def _property(function: Any) -> str:
    """The name of the property whose getter or setter this is; "" of an ordinary function."""
    return getattr(getattr(function, "__self__", None), "__name__", "")


def _changes_first(function: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function of PyTorch writes to its first argument."""
    name = getattr(function, "__name__", "")
    if name == "__set__":
        return _property(function) == "data"
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or (name.startswith("__i") and name in _IN_PLACE)


_IN_PLACE = {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow",
                                "and", "or", "xor", "lshift", "rshift", "matmul")
}  # fmt: skip


class Base(nn.Parameter):
    """A parameter that is trained in a subspace: frozen, and it holds θ₀.

    It may be moved, converted, copied and read; but whoever computes with it wants the weight,
    which its module gives, and gets a refusal. ``requires_grad = …`` is taken as a wish, see
    :meth:`subspan.changes.Changes.check_flags`.
    """

    home: tuple[Weights, str]
    kind: type[nn.Parameter]  # that it had, and gets back

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__" or isinstance(func, torch._ops.OpOverload):  # of a compiled graph
            with _plain():
                return func(*args, **kwargs)
        if name == "requires_grad_" or (name == "__set__" and _property(func) == "requires_grad"):
            wish = kwargs.get("requires_grad", args[1] if len(args) > 1 else True)
            weights, tensor = args[0].home
            weights.changes.wishes[tensor] = bool(wish)
            return args[0] if name == "requires_grad_" else None
        with _plain():
            out = func(*args, **kwargs)
            if not _is_harmless(name) and (computed := cls._behind(out, (args, kwargs))):
                raise SubspanError(
                    f"{computed} among parameters() is θ₀, and {name} of it is not that of the "
                    f"weight, which is trained through coordinates: read it from its module "
                    f"(net.{computed}), from a part's parameters() or from weights() of the "
                    "SubspaceModel"
                )
        return out

    @classmethod
    def _behind(cls, out: Any, arguments: Any) -> str:
        """The name of θ₀ that numbers were computed from; "" of views, and if there are none."""
        numbers = [t for t in tree_leaves(out) if type(t) is Tensor and t.is_floating_point()]
        bases = [t for t in tree_leaves(arguments) if type(t) is cls] if numbers else []
        views = any(_shares_memory(number, base) for number in numbers for base in bases)
        return "" if views or not bases else bases[0].home[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Base:
        if id(self) not in memo:
            with _plain():
                twin = type(self)(self.data.clone(memory_format=torch.preserve_format), False)
            memo[id(self)] = twin
            vars(twin).update(copy.deepcopy(vars(self), memo))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _plain():  # and its home afterwards, which holds this parameter
            return _base, (self.data.detach(),), vars(self), None, None, _settle


_HARMLESS = frozenset({
    "detach", "clone", "to", "cpu", "cuda", "type", "type_as", "float", "half", "double",
    "bfloat16", "contiguous", "pin_memory", "empty_like", "zeros_like", "__deepcopy__",
})  # fmt: skip


def _is_harmless(name: str) -> bool:
    """Whether a function moves, converts or changes a parameter, and computes nothing from it."""
    if name in _HARMLESS or name.endswith("_like") or name.startswith(("new_", "__i")):
        return True
    return name.endswith("_") and not name.endswith("__")


def _base(data: Tensor) -> Base:
    return Base(data, False)


def _settle(base: Base, attributes: dict[str, Any]) -> None:
    vars(base).update(attributes)


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    try:
        return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):  # without a storage
        return False


class Computed(Tensor):
    """A weight θ that was read outside of a call of the network: ordinary, but not to write to.

    It was made a moment ago and belongs to nobody, so that a change of it would be lost without a
    word: ``net.fc.weight.data.zero_()`` is refused.
    """

    weight_name: str

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = [kwargs.get("out")]
        if _changes_first(func, kwargs):
            written.append(args[0] if args else kwargs.get("tensor"))
        target = next((t for t in tree_leaves(written) if type(t) is Computed), None)
        name = getattr(func, "__name__", "")
        if target is not None and not (name == "requires_grad_" and target._own(args, kwargs)):
            if name == "requires_grad_":
                raise target._not_alone()
            raise SubspanError(
                f"{target.weight_name} is θ₀ + P w, computed when it is read, and a change of it "
                f"({_property(func) or name}) would be lost: change the network before it is "
                "wrapped, or that of merge() or unwrap()"
            )
        if name == "__set__" and _property(func) == "requires_grad" and not args[0]._own(args, {}):
            raise args[0]._not_alone()
        with _plain():
            out = func(*args, **kwargs)
            if type(out) is Tensor and args and type(args[0]) is Computed:
                source = args[0]
                if not out.is_sparse and _shares_memory(out, source):
                    out = out.as_subclass(Computed)
                    out.weight_name = source.weight_name
        return out

    def _own(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether a flag requires_grad can be set: that of a detached copy, or as it is already."""
        with _plain():
            flag = kwargs.get("requires_grad", args[1] if len(args) > 1 else True)
            return (self.is_leaf and not self._is_theta) or bool(flag) == self.requires_grad

    _is_theta = False

    def _not_alone(self) -> SubspanError:
        return SubspanError(
            f"{self.weight_name} is trained through coordinates that it may share with others, and "
            "cannot be frozen alone: give exclude= when the network is wrapped"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with _plain():
            twin = self.detach().clone().as_subclass(Tensor)
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _plain():
            return self.detach().clone().as_subclass(Tensor).__reduce_ex__(protocol)


def guarded(theta: Tensor, name: str) -> Tensor:
    """θ as a :class:`Computed`, in the same graph."""
    theta = theta.as_subclass(Computed)
    theta.weight_name, theta._is_theta = name, True
    return theta
