"""Tensors of a network in a subspace that refuse what would have no effect, or would mean θ₀.

:class:`Base` is what ``net.parameters()`` gives of a trained weight, θ₀; :class:`Computed` what
reading ``net.fc.weight`` outside of a call gives, θ. Everything that is right works as with
ordinary tensors; both look at a function of PyTorch before it is called.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only

from subspan.errors import SubspanError

if TYPE_CHECKING:
    from subspan.subspace.weights import Weights

_plain = torch._C.DisableTorchFunctionSubclass


def _property(function: Any) -> str:
    """The name of the property whose getter or setter this is; "" of an ordinary function."""
    return getattr(getattr(function, "__self__", None), "__name__", "")


def _sets(function: Any, name: str) -> bool:
    return getattr(function, "__name__", "") == "__set__" and _property(function) == name


def _changes_first(function: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function of PyTorch writes to its first argument."""
    name = getattr(function, "__name__", "")
    if name == "__set__":
        return _property(function) == "data"
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or (name.startswith("__i") and name in _IN_PLACE)


_IN_PLACE = {
    f"__i{name}__"
    for name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "div",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
        "matmul",
    )
}


class Theta0(Tensor):
    """A view of θ₀: whoever computes with it wants the weight, and gets a refusal.

    It may be moved, converted, copied, read and changed.
    """

    home: tuple[Weights, str]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if isinstance(func, torch._ops.OpOverload):
            if _asked_by_a_graph():
                with _plain():
                    return func(*args, **kwargs)
            name = name.partition(".")[0]  # of its overload
        if isinstance(args[0], Base) and (name == "requires_grad_" or _sets(func, "requires_grad")):
            wish = kwargs.get("requires_grad", args[1] if len(args) > 1 else True)
            weights, tensor = args[0].home
            weights.changes.wishes[tensor] = bool(wish)
            return args[0] if name == "requires_grad_" else None
        with _plain():
            out = func(*args, **kwargs)
            if name == "__get__" and _property(func) not in _VIEWS:
                return out
            if name == "__iter__":
                out = list(out)
            elif name in ("detach", "__set__") or _is_harmless(name):
                return out
            bases = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Theta0)]
            out = tree_map_only(Tensor, lambda t: _seen(t, bases, name), out)
        return iter(out) if name == "__iter__" else out


def _asked_by_a_graph() -> bool:
    """Whether a compiled or exported graph calls an operator: it has θ₀ + P w from others."""
    if torch.compiler.is_dynamo_compiling():  # of a person's
        return False
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename == torch._ops.__file__:
        frame = frame.f_back
    if frame is None:
        return False
    file, module = frame.f_code.co_filename, frame.f_globals.get("__name__", "")
    return "eval_with_key" in file or "torchinductor" in file or module.startswith("torch.")


def _seen(out: Tensor, bases: Sequence[Theta0], name: str) -> Tensor:
    """Return a view of θ₀ as careful as θ₀ itself, and refuse numbers computed from it."""
    if type(out) is not Tensor or not out.is_floating_point():
        return out
    for base in bases:
        if _shares_memory(out, base):
            out = out.as_subclass(Theta0)
            out.home = base.home
            return out
    tensor = bases[0].home[1]
    raise SubspanError(
        f"{tensor} among parameters() is θ₀, and {name} of it is not that of the weight, which is "
        f"trained through coordinates: read it from its module (net.{tensor}), from a part's "
        "parameters() or from weights() of the SubspaceModel"
    )


class Base(Theta0, nn.Parameter):
    """A parameter that is trained in a subspace: frozen, and it holds θ₀.

    ``requires_grad = …`` is taken as a wish, see
    :meth:`subspan.subspace.changes.Changes.check_flags`.
    Pickled it is an ordinary parameter, which its module takes for θ₀ again if it comes along.
    """

    kind: type[nn.Parameter]  # that it had, and gets back

    def __deepcopy__(self, memo: dict[int, Any]) -> Base:
        if id(self) not in memo:
            with _plain():
                twin = type(self)(self.data.clone(memory_format=torch.preserve_format), False)
            memo[id(self)] = twin
            vars(twin).update(copy.deepcopy(vars(self), memo))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _plain():
            plain = nn.Parameter(self.data, False)
            vars(plain).update({k: v for k, v in vars(self).items() if k not in OWN})
            return plain.__reduce_ex__(protocol)


OWN = ("home", "kind")  # attributes of a Base that are ours


def freeze(parameter: Any, weights: Weights, tensor: str) -> None:
    """Make a parameter the frozen θ₀ of a tensor; it stays the same object."""
    kind = type(parameter)
    parameter.requires_grad_(False)
    parameter.__class__ = _frozen(kind)  # type: ignore[arg-type]
    parameter.home, parameter.kind = (weights, tensor), kind


class Packed(Base):
    """θ₀ that another library keeps quantised: it stays what that made of it, too."""

    def as_it_was(self) -> Any:
        """The same tensor as an object of the library's."""
        with _plain():
            if is_traceable_wrapper_subclass(self):
                names, rest = self.__tensor_flatten__()
                inside = {name: getattr(self, name) for name in names}
                twin: Any = self.kind.__tensor_unflatten__(inside, rest, self.shape, self.stride())
            else:
                twin = Tensor._make_subclass(self.kind, self.data, False)
            vars(twin).update({k: v for k, v in vars(self).items() if k not in OWN})
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            twin = memo[id(self)] = copy.deepcopy(self.as_it_was(), memo)
            weights, tensor = copy.deepcopy(self.home, memo)
            if not isinstance(twin, Base):  # or its module has done so meanwhile
                freeze(twin, weights, tensor)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_it_was().__reduce_ex__(protocol)


class Wrapped(Packed):
    """The same of a tensor that is made of others: operators get the library's own object."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(
            *tree_map_only(cls, _as_it_was, args), **tree_map_only(cls, _as_it_was, kwargs or {})
        )


def _as_it_was(base: Packed) -> Any:
    return base.as_it_was()


@functools.cache
def _frozen(kind: type) -> type[Base]:
    """The class of frozen θ₀ that was a parameter of a class."""
    if kind.__module__.partition(".")[0] not in ("bitsandbytes", "torchao"):
        return Base
    own = Wrapped if hasattr(kind, "__tensor_flatten__") else Packed
    body = {"__module__": kind.__module__, "__new__": kind.__new__, "kind": kind}
    return type(kind.__name__, (own, kind), body)


def thaw(parameter: Base) -> None:
    """Undo :func:`freeze`, but for ``requires_grad``."""
    parameter.__class__ = parameter.kind  # type: ignore[assignment]
    del parameter.home, parameter.kind


_HARMLESS = frozenset(
    {
        "detach",
        "clone",
        "to",
        "cpu",
        "cuda",
        "type",
        "type_as",
        "float",
        "half",
        "double",
        "bfloat16",
        "contiguous",
        "pin_memory",
        "__deepcopy__",
        "new",
        "view_as",
        "expand_as",
        "reshape_as",
        "_to_copy",
    }
)
_VIEWS = frozenset({"T", "mT", "H", "mH", "real"})


def _is_harmless(name: str) -> bool:
    """Whether a function moves, converts or changes a parameter, and computes nothing from it."""
    if name in _HARMLESS or name.endswith("_like") or name.startswith(("new_", "__i")):
        return True
    return name.endswith("_") and not name.endswith("__")


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
        if _sets(func, "requires_grad") and not args[0]._own(args, {}):
            raise args[0]._not_alone()
        of_gradients = name in _OF_GRADIENTS or (name != "name" and _property(func) == "grad")
        if of_gradients and args[0]._is_theta:
            raise SubspanError(
                f"{args[0].weight_name} is computed, and its gradient goes on to the coordinates "
                "and is kept there alone: look at theirs, or read the weight inside of a call"
            )
        if name == "type" or _property(func) == "is_leaf":
            args[0]._check_use()
        with _plain():
            if func is torch.autograd.grad:
                return _gradients(func, args, kwargs)
            out = func(*args, **kwargs)
            if args and type(args[0]) is Computed:
                out = tree_map_only(Tensor, args[0]._same, out)
        return out

    def _same(self, out: Tensor) -> Tensor:
        """A view of θ, as careful as θ itself."""
        if type(out) is Tensor and not out.is_sparse and _shares_memory(out, self):
            out = out.as_subclass(Computed)
            out.weight_name = self.weight_name
        return out

    def _own(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether a flag requires_grad can be set: that of a detached copy, or as it is already."""
        with _plain():
            flag = kwargs.get("requires_grad", args[1] if len(args) > 1 else True)
            return (self.is_leaf and not self._is_theta) or bool(flag) == self.requires_grad

    def set_(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refuse, as any change: PyTorch does not ask above for this one."""
        return self.__torch_function__(Tensor.set_, (), (self, *args), kwargs)

    def _check_use(self) -> None:
        """Refuse what PyTorch is about to refuse, or not to notice, in words of ours."""
        if torch.compiler.is_compiling():
            return
        frame = sys._getframe(2)
        asks, before = frame.f_code.co_name, frame.f_back
        if asks == "add_param_group" and self._is_theta:
            raise SubspanError(
                f"{self.weight_name} is computed, and an optimizer has nothing of it to change: "
                "give it the parameters of the SubspaceModel or of the whole network"
            )
        sets = before is not None and before.f_code.co_name in ("__setattr__", "register_parameter")
        if asks == "typename" and sets:
            raise SubspanError(
                f"{self.weight_name} is computed from coordinates and cannot be a parameter of "
                "another module, too: tie or convert modules before the network is wrapped, or "
                "those of merge()"
            )

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


_OF_GRADIENTS = frozenset({"register_hook", "register_post_accumulate_grad_hook", "retain_grad"})


def _gradients(function: Any, args: Any, kwargs: Any) -> Any:
    """The gradients of torch.autograd.grad; a θ that was read apart has none, which is refused."""
    inputs = kwargs.get("inputs", args[1] if len(args) > 1 else ())
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    lenient = {"allow_unused": True, "materialize_grads": False}
    found = (
        function(*args[:2], **(kwargs | lenient)) if len(args) < 3 else function(*args, **kwargs)
    )
    for tensor, gradient in zip(inputs, found, strict=True):
        if gradient is None and type(tensor) is Computed:
            raise SubspanError(
                f"{tensor.weight_name} is computed at each read, and this read is not the one that "
                "was used: read it once, and use what was read, or ask for the coordinates"
            )
    if any(gradient is None for gradient in found) and not kwargs.get("allow_unused"):
        return function(*args, **kwargs)  # with its own words
    if kwargs.get("materialize_grads"):
        pairs = zip(inputs, found, strict=True)
        return tuple(torch.zeros_like(t) if g is None else g for t, g in pairs)
    return found


def guarded(theta: Tensor, name: str) -> Tensor:
    """θ as a :class:`Computed`, in the same graph."""
    theta = theta.as_subclass(Computed)
    theta.weight_name, theta._is_theta = name, True
    return theta
