"""Classes made for the modules of a wrapped network, derived from their own and named as they."""

from __future__ import annotations

import functools
import sys
from abc import ABCMeta
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.parametrize import ParametrizationList

from subspan.errors import SubspanError
from subspan.subspace.adapted import FACTORS, Adapted
from subspan.subspace.callers import asked_by_fsdp, resolves_super, saved_by_trainer
from subspan.subspace.descriptors import QuantisedFlag, WeightDescriptor
from subspan.subspace.embedding import look_up
from subspan.subspace.links import PREFIX, link_of
from subspan.subspace.module_states import keeping_coordinates
from subspan.subspace.modules import WrappedModule, WrappedNetwork
from subspan.subspace.quantised_layers import Multiplied, multiplies_itself
from subspan.subspace.resuming import keep_beside
from subspan.subspace.slices import multiply


class Weighted:
    """A module with computed weights."""

    def __getattr__(self, name: str) -> Any:
        """Give a weight to whoever calls this function itself, as θ, too."""
        if name in self._subspan_class[1]:
            return object.__getattribute__(self, name)
        return super().__getattr__(name)  # type: ignore[misc]


class Listed:
    """A list of parameters: a slice of it would be one of new parameters."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]  # type: ignore[arg-type]
        return super().__getitem__(index)  # type: ignore[misc]


class Parametrized:
    """Parameters of which PyTorch computes a weight."""

    def right_inverse(self, value: Tensor) -> None:
        """Refuse to assign the weight, where that would change what coordinates give."""
        for tensor in link_of(self).tensors.values():
            raise SubspanError(
                f"{tensor} is computed from coordinates, and a weight that is computed from it "
                "cannot be assigned: do this before the network is wrapped, or on the network of "
                "merge() or unwrap()"
            )
        super().right_inverse(value)  # type: ignore[misc]


class Traced:
    """A module that torch.fx has made of a graph, whose code is in its class."""

    def recompile(self) -> None:
        """Refuse to make other code, which would be that of the made class."""
        raise SubspanError(
            "the graph of a network in a subspace cannot be compiled anew: change it before the "
            "network is wrapped, or in the network of merge() or unwrap()"
        )


class InParts:
    """A layer that computes with parts of its weight, where that is right and costs less."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - PyTorch's name
        """Compute what PyTorch's own layer does."""
        out = None
        if not torch.compiler.is_compiling():
            link, compute = link_of(self), _in_parts(self._subspan_class[0])  # type: ignore[attr-defined]
            out = compute(link.weights, link.tensors["weight"], self, input)
        return super().forward(input) if out is None else out  # type: ignore[misc]


@functools.cache
def _in_parts(cls: type) -> Any:
    """Find what computes in parts for modules of a class that does as PyTorch's own; else None."""
    for kind, compute in ((nn.Embedding, look_up), (nn.Linear, multiply)):
        if issubclass(cls, kind) and cls.forward is kind.forward:
            return compute
    return None


class Recurrent:
    """A recurrent layer, which keeps a list of its weights beside them."""

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        names = vars(self)["_flat_weights_names"]
        if not link_of(self).weights.ready:  # while copies are made
            return [None] * len(names)
        return [getattr(self, name, None) for name in names]

    @_flat_weights.setter
    def _flat_weights(self, value: Any) -> None:
        vars(self).pop("_flat_weights", None)

    def _update_flat_weights(self) -> None:
        """Nothing to do: the list is made at each read."""

    def flatten_parameters(self) -> None:
        """Nothing to do: computed weights do not lie in one piece of memory."""


@functools.cache
def _metaclass(kind: type[type]) -> type[type]:
    """Return the type of made classes, derived from that of the module's own class.

    A made class equals the module's own (``type(m) == nn.Linear``), and calling it, as slices of
    containers and class methods do, makes an ordinary module. What is set on it is set on that.
    """

    class Made(kind):  # type: ignore[valid-type,misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self._subspan_class[0](*args, **kwargs)

        def __eq__(self, other: object) -> bool:
            alike = self._subspan_class[0] is other and not resolves_super(sys._getframe(1))
            return self is other or alike

        def __hash__(self) -> int:
            if asked_by_fsdp(sys._getframe(1)):  # which keeps a class for each class
                return type.__hash__(self)
            return hash(self._subspan_class[0])

        def __setattr__(self, name: str, value: Any) -> None:
            if name.startswith(("__", "_abc_")):  # Python's own
                super().__setattr__(name, value)
            else:
                setattr(self._subspan_class[0], name, value)

        def __delattr__(self, name: str) -> None:
            if name not in vars(self) and hasattr(self, name):
                raise SubspanError(
                    f"{name} of {self.__name__} cannot be taken away from a network in a subspace: "
                    "do this before it is wrapped, or on the network of merge() or unwrap()"
                )
            super().__delattr__(name)

    return Made


_made: dict[tuple[type, tuple[str, ...], bool], type] = {}


def make_class(cls: type, names: tuple[str, ...], root: bool) -> type:
    """Make the class of a module whose parameters of these names are computed."""
    key = (cls, names, root)
    if key not in _made:
        weight, factors = "weight" in names, FACTORS[0] in names
        behaviours: dict[type, bool] = {
            Parametrized: issubclass(cls, ParametrizationList),
            Listed: issubclass(cls, nn.ParameterList),
            Recurrent: issubclass(cls, nn.RNNBase),
            Traced: issubclass(cls, GraphModule),
            WrappedNetwork if root else WrappedModule: True,
            Weighted: bool(names),
            InParts: weight and not factors and _in_parts(cls) is not None,
            Multiplied: weight and multiplies_itself(cls),
            Adapted: factors,
        }
        own = (behaviour for behaviour, has in behaviours.items() if has)
        bases = (*_first_in_memory(cls), *own, cls)
        body: dict[str, Any] = {name: WeightDescriptor(name) for name in names}
        body |= {"_subspan_class": key, "_subspan_rebuild": staticmethod(rebuild)}
        body |= {"__module__": cls.__module__, "__doc__": cls.__doc__}
        body["__qualname__"] = cls.__qualname__
        if root and hasattr(cls, "save_pretrained"):
            body["save_pretrained"] = _saving_all(cls.save_pretrained)
            body |= {} if hasattr(cls, "is_quantized") else {"is_quantized": QuantisedFlag()}
        # The metaclass, too, is not asked: it may keep a list of all classes.
        kind = _metaclass(type(cls))
        new = ABCMeta.__new__ if issubclass(kind, ABCMeta) else type.__new__
        _made[key] = new(kind, cls.__name__, bases, body)
    return _made[key]


def _first_in_memory(cls: type) -> tuple[type, ...]:
    """Return the base that a made class needs first, so that Python takes both for alike in memory.

    Python looks at the class from which on instances have a ``__dict__``, and at that one's base:
    in ``class Net(ABC, nn.Module)`` this is ABC and not object.
    """
    while cls.__base__ is not None and cls.__base__.__dictoffset__:
        cls = cls.__base__
    below: Any = cls.__base__
    if below is object:
        return ()
    own = {"__orig_bases__": ()}  # or Generic would ask for its parameters
    return (type(below)(below.__name__, (below,), own),)


def _saving_all(save: Callable[..., Any]) -> Callable[..., Any]:
    """Make a ``save_pretrained`` that takes a state of coordinates for the network's weights."""

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(getattr(self, "config", None), "quantization_config", None) is not None:
            raise SubspanError(
                "save_pretrained would call dense weights quantised, as the configuration of this "
                "network does: use it on the merge() of the SubspaceModel, or subspan.save"
            )
        state = kwargs.get("state_dict") or {}
        coordinates = link_of(self).weights.coordinates()
        given = {
            key: state[name]
            for key in coordinates
            for name in (PREFIX + key, f"coordinates.{key}")
            if name in state
        }
        if given:
            if not all(torch.equal(w, coordinates[key]) for key, w in given.items()):
                raise SubspanError(
                    "these coordinates are not those that the network has: load them, and save "
                    "without state_dict="
                )
            kwargs["state_dict"] = None
        weights = link_of(self).weights
        if beside := sorted(weights.adapters.keys() - weights.homes.keys()):
            raise SubspanError(
                f"save_pretrained would write {beside[0]}, which is quantised, without the LoRA "
                "beside it: use it on the merge() of the SubspaceModel, or subspan.save"
            )
        if weights.adapters:
            with keeping_coordinates():  # which nobody could find again from W + s B A
                return save(self, *args, **kwargs)
        out = save(self, *args, **kwargs)
        if saved_by_trainer(sys._getframe(1)):
            folder = args[0] if args else kwargs["save_directory"]
            keep_beside({PREFIX + key: w for key, w in coordinates.items()}, folder)
        return out

    return save_pretrained


def rebuild(cls: type, names: tuple[str, ...], root: bool) -> Any:
    """Make an empty module of such a class, for copies and pickles."""
    return object.__new__(make_class(cls, names, root))
