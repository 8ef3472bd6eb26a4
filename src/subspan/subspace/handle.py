"""The handle of a network: an ordinary module, and one that passes for the network.

Trainers, DDP and checkpoints list the parameters of a model, read and set its attributes, and look
at the signature of its ``forward``: here all of that is answered, mostly by the network.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import torch
from torch import nn

from subspan.errors import SubspanError
from subspan.subspace import callers
from subspan.subspace.blocks import parameter_key
from subspan.subspace.links import FINGERPRINT, PREFIX
from subspan.subspace.rebinding import copying
from subspan.subspace.weights import Weights

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {
    name for name in vars(nn.Module) if name.startswith("_")
}


class Handle(nn.Module):
    """A module that holds a network in a subspace as its ``body``."""

    body: nn.Module
    subspace: Weights
    _own_names: ClassVar[Mapping[str, Any]]  # attributes of the class that are not the network's
    _signature_of: ClassVar[tuple[type, type]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network; θ is kept until the end, whatever a trainer makes of ``forward``."""
        return self.subspace.call(super().__call__, args, kwargs)

    def __repr__(self) -> str:
        return super().__repr__().replace(self._get_name(), "SubspaceModel", 1)

    @property
    def coordinates(self) -> Coordinates:
        """The coordinates of each compartment, a parameter by the compartment's name."""
        return Coordinates(self.subspace)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what is trained: coordinates, then the network's own that require a gradient.

        With duplicates (for exporters, which look tensors up by their paths) all that there are.
        """
        self.subspace.note()
        start = f"{prefix}." if prefix else ""
        compiled = torch.compiler.is_compiling()
        if not compiled:
            self.subspace.changes.check_freezing(sys._getframe(1))
        if not compiled and callers.copies_weights(sys._getframe(1)):
            yield from self.subspace.copied()  # type: ignore[misc]
            return
        if not recurse and not compiled and callers.asked_by_checkpoint(sys._getframe(1)):
            # It goes from module to module, and wants every name that the state has; θ₀ beside.
            state = self.state_dict(keep_vars=True)
            if not callers.pairs_with_state(sys._getframe(1)):
                own = dict(self._renamed())
                state |= {own.get(name, name): p for name, p in super().named_parameters()}
            yield from ((start + name, tensor) for name, tensor in state.items())
            return
        if not remove_duplicate or not recurse:
            yield from super().named_parameters(prefix, recurse, remove_duplicate)
            return
        own = dict(self._renamed())
        for name, p in self.subspace.listed():
            inside = f"body.{name}"
            yield start + own.get(inside, inside), p

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the network; coordinates, too, to whoever sorts parameters by their modules.

        Checkpoints of ``torch.distributed`` get all names from :meth:`named_parameters`.
        """
        if not torch.compiler.is_compiling():
            if callers.asked_by_checkpoint(sys._getframe(1)):
                return
            if callers.sorts_by_decay(sys._getframe(1)):
                yield "coordinates", self.coordinates
        yield from super().named_children()

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """Return the modules; to checkpoints of a module around, parameters by names of states."""
        modules = super().named_modules(*args, **kwargs)
        if torch.compiler.is_compiling() or not callers.lists_for_checkpoint(sys._getframe(1)):
            return modules
        if callers.pairs_with_state(sys._getframe(1)):
            path, _ = next(modules)
            return iter([(path, SimpleNamespace(_parameters=dict(self.named_parameters())))])
        names = self.subspace.coordinate_names
        own = {f"coordinates.{key}": w for key, w in self.coordinates.items()}
        rest = {name: p for name, p in self.body._parameters.items() if name not in names}
        parts = {self: own, self.body: rest}
        return (
            (path, SimpleNamespace(_parameters=parts[m]) if m in parts else m)
            for path, m in modules
        )

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return the parameter of a path, which of a trained one is frozen θ₀."""
        inside = target.removeprefix("body.")
        return (
            super().get_parameter(target) if inside == target else self.body.get_parameter(inside)
        )

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze or unfreeze all that is trained."""
        for tensor in self.subspace.homes:
            self.subspace.changes.wishes[tensor] = requires_grad
        return super().requires_grad_(requires_grad)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Coordinates, the fingerprint, what is trained fully, and buffers."""
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        state = super().state_dict(*args, **kwargs)
        for inner, own in self._renamed():
            if prefix + inner in state:
                state[prefix + own] = state.pop(prefix + inner)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        plain = {slot.path for slot in self.subspace.slots} | {*self.subspace.coordinate_names}
        if any(prefix + path in state_dict for path in plain):  # of the network without a handle
            for key in [key for key in state_dict if key.startswith(prefix)]:
                state_dict[f"{prefix}body.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        for inner, own in self._renamed():
            if prefix + own in state_dict:
                state_dict[prefix + inner] = state_dict.pop(prefix + own)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _renamed(self) -> Iterator[tuple[str, str]]:
        """Keys of the network's state, and what they are in the handle's."""
        for name in self.subspace.coordinate_names:
            yield f"body.{name}", f"coordinates.{name.removeprefix(PREFIX)}"
        yield f"body.{FINGERPRINT}", "fingerprint"

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        return self.subspace.for_ddp("body.")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Python looks special methods up here, too: they are not the network's.
            if name == "body" or "_modules" not in self.__dict__ or name.startswith("__"):
                raise
        return getattr(self.body, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Attributes of the network are set there, as they are read there."""
        if name == "__class__" and not callers.may_set_class(sys._getframe(1)):
            raise SubspanError(
                "a SubspaceModel has a class that was made for its network, and another one would "
                "be lost with the next copy: set that of the network before it is wrapped, or in "
                "the network of merge() or unwrap()"
            )
        taken = name == "body" or isinstance(self._own_names.get(name), property)
        if taken and name != "init_seed" and "body" in vars(self).get("_modules", ()):
            raise _refuse_setting(name)
        new = name.startswith("_") and not hasattr(self, name)
        if self._is_own(name) or (
            new and callers.asked_by_another_package(sys._getframe(1), self.body)
        ):
            super().__setattr__(name, value)
        else:
            setattr(self.body, name, value)
            if hasattr(type(self), name):  # of every module: reading it would find that
                vars(self)[name] = value

    def __delattr__(self, name: str) -> None:
        if self._is_own(name):
            super().__delattr__(name)
        else:
            delattr(self.body, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.body)})

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a part to the network."""
        if name == "body":  # put back by somebody who goes over the handle's parts
            if module is not self.body:
                raise _refuse_setting(name)
        else:
            self.body.add_module(name, module)

    def register_buffer(self, *args: Any, **kwargs: Any) -> None:
        """Add a buffer to the network."""
        self.body.register_buffer(*args, **kwargs)

    def register_parameter(self, *args: Any, **kwargs: Any) -> None:
        """Add a parameter to the network."""
        self.body.register_parameter(*args, **kwargs)

    def _is_own(self, name: str) -> bool:
        """Return whether an attribute is the handle's; what nobody has becomes the network's."""
        if "body" not in vars(self).get("_modules", ()) or name == "body":
            return True
        if name in self._own_names or (name in vars(self) and not hasattr(type(self), name)):
            return True
        if name in vars(self.body):  # even if every module has something of this name
            return name in _OF_EVERY_MODULE
        return name in vars(self) or hasattr(type(self), name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, self._signature_of, self.__getstate__()

    @copying
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = memo[id(self)] = _rebuild(*self._signature_of)
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin


def _refuse_setting(name: str) -> SubspanError:
    return SubspanError(
        f"{name} is the SubspaceModel's own: set that of the network by model.body.{name}"
    )


@functools.cache
def with_signature(handle: type, net: type) -> type:
    """Make a handle's class with the name and the signature of the network's, which trainers read.

    By them they know whether labels are shifted, and how these are called. A subclass whose own
    ``forward`` names its arguments keeps its signature.
    """
    body: dict[str, Any] = {
        "_signature_of": (handle, net),
        "__module__": handle.__module__,
        "__qualname__": handle.__qualname__,
        "__doc__": handle.__doc__,
    }
    for name in ("__len__", "__getitem__", "__iter__", "__contains__", "__enter__", "__exit__"):
        if hasattr(net, name) and not hasattr(handle, name):  # Python looks them up in the class
            body[name] = functools.partialmethod(_of_the_network, name)
    run: Any = handle.forward  # type: ignore[attr-defined]
    with contextlib.suppress(TypeError, ValueError):  # some callables of C have none

        @functools.wraps(run)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if type(args) is not tuple:  # but what stands for all arguments
                raise SubspanError(
                    "torch.fx finds no arguments in the forward of a SubspaceModel, which hands "
                    "them on: trace the network, model.body, or that of merge()"
                )
            return run(self, *args, **kwargs)

        forward.__signature__ = inspect.signature(net.forward)  # type: ignore[attr-defined]
        kinds = {p.kind for p in list(inspect.signature(run).parameters.values())[1:]}
        if kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            body["forward"] = forward
    return type(net.__name__, (handle,), body)


def _of_the_network(handle: Any, name: str, *args: Any) -> Any:
    return getattr(type(handle.body), name)(handle.body, *args)


def _rebuild(handle: type, net: type) -> Any:
    cls = with_signature(handle, net)
    return cls.__new__(cls)  # type: ignore[call-overload]


# ---- coordinates ---------------------------------------------------------------------------------


class Coordinates(nn.Module):
    """w of a model by compartment: a view of parameters that the network holds."""

    def __init__(self, network: Weights) -> None:
        super().__init__()
        self._parameters = _Entries(network)  # type: ignore[assignment]

    def __getitem__(self, key: str) -> nn.Parameter:
        return self._parameters[parameter_key(key) if key not in self._parameters else key]  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self._parameters)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __contains__(self, key: str) -> bool:
        return key in self._parameters

    def keys(self) -> Any:
        """Names of the compartments, with a slash for every dot."""
        return self._parameters.keys()

    def values(self) -> Any:
        """Return the parameters."""
        return self._parameters.values()

    def items(self) -> Any:
        """Both."""
        return self._parameters.items()


class _Entries(MutableMapping[str, Any]):
    """The coordinates' entries in the network's ``_parameters``, by compartment."""

    def __init__(self, network: Weights) -> None:
        self._network = network

    def __getitem__(self, key: str) -> Any:
        return self._network.coordinates()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._network.root._parameters[PREFIX + key] = value

    def __delitem__(self, key: str) -> None:
        raise SubspanError("coordinates cannot be deleted: unwrap() the model")

    def __iter__(self) -> Iterator[str]:
        return iter(self._network.coordinates())

    def __len__(self) -> int:
        return len(self._network.coordinate_names)
