"""The protocol of compressed layers: layers that hold fewer numbers than their weight has.

Checkpoints, counts, :func:`~subspan.layers.merge`, exports and the training know compressed layers
by this class alone. A new type of layer is a class derived from it, in this package or in any
module that is imported before a file of such layers is loaded (``docs/add-a-layer.md``).
"""

from __future__ import annotations

import itertools
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from subspan.errors import SubspanError
from subspan.registry import Registry
from subspan.subspace.callers import quantises

_types: Registry[type[Compressed]] = Registry("type of layers")


class Compressed(nn.Module, ABC):
    """A layer in the place of an ``nn.Linear`` or an ``nn.Conv2d``, which holds fewer numbers.

    Its parameters and the buffers of its ``state_dict`` are what a file holds. ``recipe`` says what
    they mean. A class is made with the arguments of the layer that it replaces, and those of the
    recipe.

    Args:
        type_name: registers a type, so that files name it. Classes derived from this one are of
            that type, too.
        replaces: registers the class as the one of its type in the place of ``nn.Linear``, or of
            ``nn.Conv2d``.

    Attributes:
        type_name: the name in files.
        classes: those of the type by what they replace.
        shape: n and m of the weight as a matrix; a kernel is flattened to out × (in·k²).
        bias: (n,), or None; or whatever makes it, if :attr:`bias_length` says how long it is.
        resizes: whether :meth:`resize` takes another recipe in place.
    """

    type_name: ClassVar[str]
    classes: ClassVar[dict[type[nn.Module], type[Compressed]]]
    shape: tuple[int, int]
    resizes: ClassVar[bool] = False

    def __init_subclass__(
        cls, *, type_name: str | None = None, replaces: type[nn.Module] | None = None, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if type_name is not None:
            _types.add(type_name, cls)
            cls.type_name, cls.classes = type_name, {}
        if replaces is not None:
            if replaces in cls.classes:
                raise TypeError(f"{cls.type_name!r} has a class in place of {replaces} already")
            cls.classes[replaces] = cls

    # ---- what every type says --------------------------------------------------------------------

    @property
    @abstractmethod
    def recipe(self) -> Any:
        """JSON that says, with the layer's tensors, which weight they make."""

    @abstractmethod
    def dense(self) -> nn.Module:
        """Return the ordinary layer with copies of this weight and bias."""

    # ---- what follows from that, and may be said better ------------------------------------------

    @classmethod
    def make(cls, recipe: Any, **arguments: Any) -> Self:
        """Make a layer of a recipe, with any values; by default its entries are arguments, too.

        Args:
            recipe: as :attr:`recipe` gives it.
            arguments: of ``nn.Linear`` or of ``nn.Conv2d``, without ``groups``.

        Raises:
            SubspanError: for a recipe that a layer of these sizes cannot have.
        """
        return cls(**arguments | recipe)

    @classmethod
    def rebuild(cls, like: Counterpart, recipe: Any, device: Device = None) -> Compressed:
        """Make a layer of this type and a recipe, with any values, in the place of another one.

        Args:
            like: gives the sizes, the geometry, whether there is a bias, and the dtype.
            recipe: as :attr:`recipe` gives it.
            device: of its tensors; that of ``like`` by default.

        Raises:
            SubspanError: for a recipe that this place cannot have.
        """
        arguments = _arguments_of(like)
        replaced = nn.Conv2d if "kernel_size" in arguments else nn.Linear
        if replaced not in cls.classes:
            raise SubspanError(
                f"a layer of the type {cls.type_name!r} cannot take the place of an "
                f"nn.{replaced.__name__}: leave it out"
            )
        if device is not None:
            arguments["device"] = device
        return cls.classes[replaced].make(recipe, **arguments)

    @property
    def meaning(self) -> dict[str, Any]:
        """Return what numbers of a state mean beside their shapes: JSON by names for errors."""
        size: Any = getattr(self, "kernel_size", None)
        return {} if size is None else {"kernel_size": list(size)}

    def two_factors(self) -> nn.Module:
        """Two ordinary layers, where the weight is a product of two; otherwise the dense one."""
        return self.dense()

    @property
    def bias_length(self) -> int:
        """The length of the ordinary layer's bias, n, or 0 without one."""
        return 0 if getattr(self, "bias", None) is None else self.shape[0]

    @property
    def dense_numbers(self) -> int:
        """The number of parameters of the ordinary layer."""
        return math.prod(self.shape) + self.bias_length

    @property
    def own_numbers(self) -> int:
        """The number of parameters of this layer."""
        return sum(p.numel() for p in self.parameters())

    @property
    def inference_numbers(self) -> int:
        """The number of those that are needed to run it."""
        return self.own_numbers

    @classmethod
    def published_counts(cls, layers: Sequence[Any], matrices: int) -> dict[str, int]:
        """Count a network as certain papers do, by name.

        Args:
            layers: all of this type in the network; at least one.
            matrices: how many numbers all other weights with two dimensions or more have.
        """
        return {}

    def recipe_in(self, tensors: Mapping[str, Tensor]) -> Any:
        """Return the recipe of saved tensors, by their sizes; by default the layer's own.

        Args:
            tensors: of a file, by their names in this layer.
        """
        return self.recipe

    def resize(self, recipe: Any) -> None:
        """Take a recipe, with any values; the parameters stay the same objects."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, but no weight in the place of the one that is computed.

        Nor a ``qconfig``, by which ``torch.ao`` would quantise an ordinary layer and leave this.
        """
        self._refuse_weight(name)
        if name == "qconfig" and not hasattr(self, name):
            kinds = [kind for kind, own in self.classes.items() if isinstance(self, own)]
            if value is not None or quantises(sys._getframe(1), kinds):
                raise SubspanError(
                    f"torch.ao does not quantise a {type(self).__name__} and would leave it as it "
                    "is: give it the ordinary layers of layers.merge(), or set qconfig = None on "
                    "this one"
                )
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, but none in the place of the weight, as pruning does."""
        self._refuse_weight(name.removesuffix("_orig"))
        super().register_parameter(name, param)

    def _refuse_weight(self, name: str) -> None:
        if name == "weight" and isinstance(getattr(type(self), name, None), property):
            raise SubspanError(
                f"the weight of a {type(self).__name__} is computed from its parameters and cannot "
                "be exchanged, shared, masked or pruned: do that to an ordinary layer, which "
                "layers.merge() puts there"
            )

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {})
        metadata.setdefault(prefix[:-1], {})["meaning"] = self.meaning

    def check_meaning(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Refuse numbers of a state that mean another weight; ``rest`` begins with its metadata.

        Raises:
            SubspanError: for those of another seed, say, or of a kernel of another shape.
        """
        given = any(prefix + name in state_dict for name in self._parameters)
        metadata = rest[0] if given and rest else {}  # only what state_dict() made has some
        now = self.meaning
        for name, was in metadata.get("meaning", {}).items():
            if was != now.get(name):
                raise SubspanError(
                    f"this state_dict is of {prefix.removesuffix('.') or 'a layer'} where its "
                    f"numbers make another weight ({name}: {was} there, {now.get(name)} here): "
                    "make the layer as that one was made"
                )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **more: Any
    ) -> None:
        """Take a state of this layer.

        Raises:
            SubspanError: for one of the ordinary layer, which ``strict=False`` would leave out; and
                for numbers that mean another weight.
        """
        self.check_meaning(state_dict, prefix, *rest)
        if prefix + "weight" in state_dict and "weight" not in self._parameters:
            raise SubspanError(
                f"{prefix}weight of this state_dict is that of an ordinary layer, and the layer "
                f"there is a {type(self).__name__}: load it before the layer is put there"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)


Device: TypeAlias = torch.device | str | None
Counterpart: TypeAlias = nn.Linear | nn.Conv2d | Compressed


def layer_types() -> list[str]:
    """Return all types of compressed layers by name."""
    return sorted(_types)


def layer_type(name: str) -> type[Compressed]:
    """Return the class of a type of compressed layers; one must be imported that defines it."""
    return _types.find(name)


def compressed_layers(net: nn.Module) -> dict[str, Compressed]:
    """Return the compressed layers of a network by their first names."""
    return {name: m for name, m in net.named_modules() if isinstance(m, Compressed)}


def comes_back(layer: Compressed, kind: type[Compressed]) -> bool:
    """Return whether a type makes this layer of its recipe; a derived class may compute anything.

    The classes that PyTorch derives count as their bases: of ``fully_shard``, of parametrizations.
    """
    own: type = type(layer)
    if is_parametrized(layer) or any(c.__name__ == "FSDPModule" for c in own.__bases__):
        own = own.__bases__[-1]
    return own is type(kind.rebuild(layer, layer.recipe, device="meta"))


def _arguments_of(layer: Counterpart) -> dict[str, Any]:
    """Return the arguments with which an ordinary layer of the same sizes and geometry is made."""
    names: tuple[str, ...] = ("in_features", "out_features")
    if hasattr(layer, "kernel_size"):
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
        names += ("padding_mode",)
    tensor = next(itertools.chain(layer.parameters(), layer.buffers()))
    return {name: getattr(layer, name) for name in names} | {
        "bias": getattr(layer, "bias", None) is not None,
        "device": tensor.device,
        "dtype": tensor.dtype,
    }
