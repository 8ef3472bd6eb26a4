"""θ₀ among a network's parameters: tensors that refuse what would mean θ₀ where θ is meant.

:class:`Base` is what ``net.parameters()`` gives of a trained weight. It may be moved, converted,
copied, read and changed; whoever computes with it wants the weight, and gets a sentence.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only

from subspan.errors import SubspanError
from subspan.subspace import functions
from subspan.subspace.callers import asked_by_a_graph
from subspan.subspace.functions import ordinary_tensors, property_of
from subspan.subspace.transient import CopiedPlain, clone_results

if TYPE_CHECKING:
    from subspan.subspace.weights import Weights

    Home = tuple[Weights, str]  # the network, and the name of the tensor whose θ₀ it is

_VIEWS = frozenset({"T", "mT", "H", "mH", "real"})


def take_wish(home: Home, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Note what ``requires_grad`` of frozen θ₀ was set to, in place of setting it."""
    weights, tensor = home
    wish = kwargs.get("requires_grad", args[1] if len(args) > 1 else True)
    adapter = weights.adapters.get(tensor)
    for trained in (tensor,) if adapter is None else adapter.factors:
        weights.changes.wishes[trained] = bool(wish)
    return args[0] if name == "requires_grad_" else None


def refuse_use(tensor: str, name: str, base: str = "θ₀") -> SubspanError:
    """Make the refusal of a function that computes with θ₀ where the weight is meant."""
    return SubspanError(
        f"{tensor} among parameters() is {base}, and {name} of it is not that of the weight, which "
        f"is trained through coordinates: read it from its module (net.{tensor}), from a part's "
        "parameters() or from weights() of the SubspaceModel"
    )


def _check_change(function: Any, args: Sequence[Any]) -> None:
    """Refuse changes in place by which a weight would not become what is meant.

    Entries of θ₀ must not be changed each in a way of its own, in place or by writing over them
    what a function has made of them, nor some of them alone. Another network's parameter must not
    be given what is θ₀ only, as a target network's that follows this one.
    """
    if not functions.writes_first(function):
        return
    name = getattr(function, "__name__", "")
    each = name if functions.changes_each_entry(function, args) else ""
    each = each or next((t.made_by for t in tree_leaves(args[1:]) if isinstance(t, Data)), "")
    for written in tree_leaves(args[:1]):
        if not isinstance(written, Theta0 | Data) or written.made_by:
            continue
        weights, tensor = written.home
        base = weights.find(tensor)
        part = base is not None and written.numel() < base.numel()
        if each or part:
            raise SubspanError(
                f"{tensor} among parameters() is θ₀, and {each or name}{' of a part' * part} of it "
                "is not that of the weight θ₀ + P w: bound, mask or round weights by a "
                "parametrization that is registered before the network is wrapped, or where the "
                "forward pass reads them"
            )
    lists = [each for each in args if isinstance(each, list | tuple)]  # of a foreach function
    for first, *others in zip(*lists, strict=False) if name.startswith("_foreach_") else [args]:
        if isinstance(first, nn.Parameter) and not isinstance(first, Base):
            for given in tree_leaves(others):
                if isinstance(given, Theta0 | Data):
                    raise refuse_use(given.home[1], name)


class Data(CopiedPlain):
    """The ``data`` of θ₀: an ordinary tensor, but for what :func:`_check_change` refuses."""

    home: Home
    made_by = ""  # the function that has made it of the data, each entry in a way of its own

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        _check_change(func, args or (*(kwargs or {}).values(),))
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        with ordinary_tensors():
            out = func(*args, **kwargs)
            if name in ("numpy", "__array__"):
                functions.read_only(out, args[0])
            if name != "__iter__":
                return _note_maker(out, func, args, kwargs)
            return iter(_note_maker(list(out), func, args, kwargs))


def _note_maker(out: Any, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Note of what was made of the data of θ₀ that each entry was changed in its own way.

    A view of the data is as careful as they are.
    """
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Data)]
    name = getattr(function, "__name__", "") if functions.changes_each_entry(function, args) else ""
    name = name or next((t.made_by for t in given if t.made_by), "")

    def note(tensor: Tensor) -> Tensor:
        if type(tensor) is not Tensor or not tensor.is_floating_point():
            return tensor
        seen = [t for t in given if functions.share_memory(tensor, t)]
        if not seen and not (name and tensor.shape == given[0].shape):
            return tensor
        noted = tensor.as_subclass(Data)
        noted.home, noted.made_by = (seen or given)[0].home, seen[0].made_by if seen else name
        return noted

    return functions.map_tensors(note, out)


def _guard_data(data: Tensor, of: Theta0) -> Tensor:
    """Make the data of θ₀ a :class:`Data`; numbers that another library has packed stay."""
    if type(data) is not Tensor or not data.is_floating_point() or torch.compiler.is_compiling():
        return data
    guarded = data.as_subclass(Data)
    guarded.home = of.home
    return guarded


class Theta0(Tensor):
    """A view of θ₀: whoever computes with it wants the weight, and gets a refusal.

    It may be moved, converted, copied, read and changed.
    """

    home: Home
    made_by = ""  # see Data

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if isinstance(func, torch._ops.OpOverload):
            # A person's program may be compiled, too, and has no frames then.
            if not torch.compiler.is_dynamo_compiling() and asked_by_a_graph(sys._getframe(1)):
                with ordinary_tensors():
                    return func(*args, **kwargs)
            name = name.partition(".")[0]  # of its overload
        flag = name in ("requires_grad_", "__set__") and functions.sets_flag(func)
        if flag and isinstance(args[0], Base):
            return take_wish(args[0].home, name, args, kwargs)
        _check_change(func, args or (*kwargs.values(),))  # functions of nn.init name them all
        if name == "__set__" and property_of(func) in ("grad", "_grad") and args[1] is not None:
            raise SubspanError(
                f"{args[0].home[1]} among parameters() is θ₀, which a step would move by this "
                "gradient, beside its coordinates: set gradients of parameters that require one"
            )
        with ordinary_tensors():
            out = func(*args, **kwargs)
            if name in ("numpy", "__array__"):
                functions.read_only(out, args[0])
            if name == "__get__" and property_of(func) not in _VIEWS:
                return _guard_data(out, args[0]) if property_of(func) == "data" else out
            if name == "detach":
                return _guard_data(out, args[0])
            if name == "__iter__":
                out = list(out)
            elif name == "__set__" or functions.is_harmless(name):
                return out
            bases = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Theta0)]
            out = functions.map_tensors(lambda t: _guard_view(t, bases, name), out)
        return iter(out) if name == "__iter__" else out


def _guard_view(out: Tensor, bases: Sequence[Theta0], name: str) -> Tensor:
    """Make a view of θ₀ as careful as θ₀ itself, and refuse numbers computed from it."""
    if type(out) is not Tensor or not out.is_floating_point():
        return out
    for base in bases:
        if functions.share_memory(out, base):
            out = out.as_subclass(Theta0)
            out.home = base.home
            return out
    raise refuse_use(bases[0].home[1], name)


class Base(Theta0, nn.Parameter):
    """A parameter that is trained in a subspace: frozen, and it holds θ₀.

    ``requires_grad = …`` is taken as a wish, see
    :meth:`subspan.subspace.changes.Changes.check_flags`.
    Pickled it is an ordinary parameter, which its module takes for θ₀ again if it comes along.
    """

    kind: type[nn.Parameter]  # that it had, and gets back

    def __deepcopy__(self, memo: dict[int, Any]) -> Base:
        if id(self) not in memo:
            with ordinary_tensors():
                twin = type(self)(self.data.clone(memory_format=torch.preserve_format), False)
            memo[id(self)] = twin
            clone_results(vars(self), memo)
            vars(twin).update(copy.deepcopy(vars(self), memo))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        with ordinary_tensors():
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
        """Return the same tensor as an object of the library's."""
        with ordinary_tensors():
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
    """A packed θ₀ that is made of several tensors: operators get the library's own object."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(
            *tree_map_only(cls, cls.as_it_was, args),
            **tree_map_only(cls, cls.as_it_was, kwargs or {}),
        )


@functools.cache
def _frozen(kind: type) -> type[Base]:
    """Make the class of frozen θ₀ that was a parameter of a class."""
    if kind.__module__.partition(".")[0] not in ("bitsandbytes", "torchao"):
        return Base
    base = Wrapped if hasattr(kind, "__tensor_flatten__") else Packed
    body = {"__module__": kind.__module__, "__new__": kind.__new__, "kind": kind}
    return type(kind.__name__, (base, kind), body)


def thaw(parameter: Base) -> None:
    """Undo :func:`freeze`, but for ``requires_grad``."""
    parameter.__class__ = parameter.kind  # type: ignore[assignment]
    del parameter.home, parameter.kind
