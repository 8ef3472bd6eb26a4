"""How a network stays itself while its weights are computed: classes made for its modules.

A trained parameter stays in its module, under its name, as a frozen :class:`Base` that holds θ₀.
The module gets a class of the same name, derived from its own, with a data descriptor for each of
these parameters: a descriptor on the type goes before ``Module.__getattr__``, so that every read of
``module.weight`` gives θ = θ₀ + P w, whoever reads it and from wherever. (Source of the idea:
``torch.nn.utils.parametrize``, which moves the parameter away for it.)

One rule decides who sees what: the network's own methods and parts see θ; what asks the network as
a whole for parameters or a state (an optimizer, DDP, a trainer) sees frozen θ₀ and the coordinates.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import threading
from abc import ABCMeta
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import _symbolic_trace as fx
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_leaves

from subspan.errors import SubspanError
from subspan.subspace.embedding import LookedUp, looks_up
from subspan.subspace.guards import Base, Computed, Packed, freeze, guarded, thaw
from subspan.subspace.quantised import Multiplied, own_product
from subspan.subspace.sharded import Shards, asked_by_fsdp, home_of, is_shard, mark, refuse_whole

if TYPE_CHECKING:
    from subspan.subspace.weights import Weights

LINK = "_subspan"  # in a module's __dict__: its Link
PREFIX = "subspan_"  # of our names among a network's parameters and buffers
FINGERPRINT = PREFIX + "fingerprint"

_saving = threading.local()  # .thetas: of a state_dict of θ that is being made, None of coordinates


class Link:
    """Connects a module to its network's subspace.

    Args:
        weights: of the network.
        tensors: names of the module's trained tensors, by attribute.
        order: of all parameters that the module had when it was wrapped.
    """

    def __init__(self, weights: Weights, tensors: dict[str, str], order: list[str]) -> None:
        self.weights, self.tensors, self.order = weights, tensors, order


def _link(module: Any) -> Link:
    """The link of a module in a subspace.

    Raises:
        SubspanError: if it is a copy that lost it.
    """
    link: Link | None = vars(module).get(LINK)
    if link is None:
        raise SubspanError(
            f"this {type(module).__name__} was copied by a method of its own and is not in the "
            "subspace of the original: copy the network of unwrap() or merge(), or state_dict()"
        )
    return link


class Weight:
    """The descriptor of a trained parameter: reading it gives θ."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        base = module._parameters.get(self.name)
        if base is None:
            return _otherwise(module, self.name)
        link = _link(module)
        if not torch.compiler.is_compiling() and torch._C._is_tracing():
            _check_trace(link)
        try:
            return link.weights.read(link.tensors[self.name])
        except AttributeError as error:  # Python would ask Module.__getattr__, which has θ₀
            raise RuntimeError(f"{link.tensors[self.name]} could not be computed") from error

    def __set__(self, module: nn.Module, value: Any) -> None:
        module.__dict__[self.name] = value  # of a module whose parameter has been taken away


def _check_trace(link: Link) -> None:
    """Refuse to trace what would not have coordinates.

    Raises:
        SubspanError: for the ONNX exporter that traces, and for a part alone.
    """
    if torch.onnx.is_in_onnx_export():
        raise SubspanError(
            "torch.onnx.export(dynamo=False) knows no operator of a network in a subspace: leave "
            "dynamo=False out, or export the merge() of the SubspaceModel"
        )
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != "trace_module":
        frame = frame.f_back
    if frame is not None and link.weights.root not in list(frame.f_locals["mod"].modules()):
        raise _only_whole("traced")


def _only_whole(done: str) -> SubspanError:
    return SubspanError(
        f"a part of a network in a subspace cannot be {done} alone, since its coordinates are the "
        "network's: give the network, or the part in the merge() of the SubspaceModel"
    )


def _otherwise(module: nn.Module, name: str) -> Any:
    """An attribute that was a trained parameter and is something else by now."""
    for place in (module.__dict__, module._buffers, module._modules, module._parameters):
        if name in place:
            return place[name]
    raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")


class Quantised:
    """The attribute that PyTorch's quantisation sets: it would pass modules of our classes by."""

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None or "qconfig" not in module.__dict__:
            raise AttributeError("qconfig")
        return module.__dict__["qconfig"]

    def __set__(self, module: nn.Module, value: Any) -> None:
        raise SubspanError(
            "a network in a subspace cannot be quantised: quantise the merge() of its SubspaceModel"
        )


class Part:
    """The behaviour of every module that has a trained parameter, or a part with one."""

    _subspan_class: ClassVar[tuple[type, tuple[str, ...], bool]]
    qconfig = Quantised()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep made classes from people's lists of classes, which have the modules' own."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was pickled, and its trained parameters for θ₀."""
        super().__setstate__(state)  # type: ignore[misc]
        link: Link | None = vars(self).get(LINK)
        for attribute, tensor in ({} if link is None else link.tensors).items():
            parameter = self._parameters.get(attribute)  # type: ignore[attr-defined]
            if isinstance(parameter, nn.Parameter) and not isinstance(parameter, Base):
                freeze(parameter, link.weights, tensor)  # type: ignore[union-attr]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if (link := vars(self).get(LINK)) is not None:
            refuse_whole(link.weights, "copied or pickled")
        return _remade, self._subspan_class, self.__getstate__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if (link := vars(self).get(LINK)) is not None:
            refuse_whole(link.weights, "copied or pickled")
        for leaf in tree_leaves(vars(self)):  # a result that the module keeps, in a graph
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None and id(leaf) not in memo:
                memo[id(leaf)] = leaf.detach().clone()
        own = getattr(super(), "__deepcopy__", None)
        if own is not None:
            twin = own(memo)
            if type(twin) is not type(self) or LINK not in vars(twin):
                raise SubspanError(
                    f"{type(self).__name__} has a __deepcopy__ of its own, whose copies are not in "
                    "the subspace: copy the network of unwrap(), or copy state_dict()"
                )
            return twin
        twin = memo[id(self)] = _remade(*self._subspan_class)
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    # ---- parameters --------------------------------------------------------------------------

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """A part's parameters at θ; of one module alone, as FSDP asks, those that are stored."""
        fsdp = False
        if not torch.compiler.is_compiling():
            asks = sys._getframe(1).f_globals.get("__name__", "")
            fsdp = asked_by_fsdp(sys._getframe(1))
            if asks.startswith(("torch.export", "torch._export")):
                raise _only_whole("exported")
        own = super().named_parameters(prefix, recurse, remove_duplicate)  # type: ignore[misc]
        for name, p in own:
            home = home_of(p) if recurse and not fsdp else None
            if home is not None:
                weights, tensor = home
                yield name, weights.read(tensor)
            else:
                yield name, p

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The parts, which nobody may put into layers of another kind."""
        compiled = torch.compiler.is_compiling()
        if not compiled and sys._getframe(1).f_code.co_name == "convert_sync_batchnorm":
            for tensor, key in _keys(self, ""):  # type: ignore[arg-type]
                if isinstance(self.get_submodule(key.rpartition(".")[0]), _BatchNorm):  # type: ignore[attr-defined]
                    raise SubspanError(
                        f"{tensor} is computed from coordinates and cannot become that of a "
                        "SyncBatchNorm: convert layers before the network is wrapped"
                    )
        return super().named_children()  # type: ignore[misc]

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter of a path, which of a trained one is frozen θ₀."""
        path, _, attribute = target.rpartition(".")
        p = self.get_submodule(path)._parameters.get(attribute)  # type: ignore[attr-defined]
        return p if home_of(p) is not None else super().get_parameter(target)  # type: ignore[misc]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; a weight that is computed cannot become something else."""
        link: Link | None = vars(self).get(LINK)
        if link is not None and param is not None and param is self._parameters.get(name):  # type: ignore[attr-defined]
            return  # tied once more
        if link is not None:
            lost = [attr for attr in link.tensors if attr not in self._parameters]  # type: ignore[attr-defined]
            if lost:  # taken out by the caller a moment ago
                link.weights.put_back(self, link)  # type: ignore[arg-type]
            if lost or name in link.tensors or type(param) is Computed:
                tensor = link.tensors.get(lost[0] if lost else name, name)
                raise SubspanError(
                    f"{tensor} is computed from coordinates and cannot be replaced or computed "
                    "from another tensor: do this before the network is wrapped, or on the network "
                    "of merge() or unwrap()"
                )
        super().register_parameter(name, param)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a computed weight cannot be tied to another one."""
        link: Link | None = vars(self).get(LINK)
        stored = link is not None and name in self._parameters  # type: ignore[attr-defined]
        if stored and not torch.compiler.is_compiling() and asked_by_fsdp(sys._getframe(1)):
            Shards.put(self, name, value)  # type: ignore[arg-type]
            return
        if type(value) is Computed and link is not None and name in link.tensors:
            raise SubspanError(
                f"{link.tensors[name]} is computed from coordinates and cannot become "
                f"{value.weight_name}: tie them before the network is wrapped"
            )
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> Any:
        """TorchScript, which asks here, would keep the weights of now; a trace follows them."""
        frame = sys._getframe(1)
        while frame.f_back is not None and not frame.f_code.co_name.startswith(("trace", "script")):
            frame = frame.f_back
        if frame.f_code.co_name.startswith("trace"):
            return self
        raise SubspanError(
            "a network in a subspace cannot be scripted, since TorchScript would keep its weights "
            "as they are now: trace it, or script the merge() of the SubspaceModel"
        )

    def __delattr__(self, name: str) -> None:
        link: Link | None = vars(self).get(LINK)
        if link is not None and name in link.tensors and name in self._parameters:  # type: ignore[attr-defined]
            raise SubspanError(
                f"{link.tensors[name]} is computed from coordinates and cannot be deleted or "
                "computed from another tensor: do this before the network is wrapped, or on the "
                "network of merge() or unwrap()"
            )
        if link is not None and {name + end for end in ("_orig", "_g", "_v")} & link.tensors.keys():
            raise SubspanError(
                f"{name} is computed from parameters that are computed from coordinates: take "
                "pruning or a norm away from the network of merge() or unwrap()"
            )
        super().__delattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or convert; what that makes of θ₀ is θ₀ from now on."""
        link = _link(self)
        changes, own = link.weights.changes, set(link.tensors.values())
        before = changes.changed(own)
        for attribute in link.tensors:
            if isinstance(packed := self._parameters[attribute], Packed):  # type: ignore[attr-defined]
                thaw(packed)  # for the library, which may make another object
        out = super()._apply(fn, recurse)  # type: ignore[misc]
        for attribute, tensor in link.tensors.items():
            parameter = self._parameters[attribute]  # type: ignore[attr-defined]
            if is_shard(parameter):
                mark(parameter, link.weights, tensor)
            elif not isinstance(parameter, Base):  # PyTorch has made another object
                freeze(parameter, link.weights, tensor)
        changes.remember(own - before)
        return out

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        if sys._getframe(1).f_globals.get("__name__") == "torch.nn.parallel.distributed":
            raise SubspanError(
                "a part of a network in a subspace cannot be given to DDP, since its coordinates "
                "are the network's: give the network, or the SubspaceModel"
            )
        return []  # to whoever lists attributes

    def _replicate_for_data_parallel(self) -> Any:
        raise SubspanError(
            "nn.DataParallel copies parameters one by one and would lose the subspace: use "
            "DistributedDataParallel"
        )

    # ---- states ------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return θ of a part, and for the network's own methods; else the coordinates."""
        if hasattr(_saving, "thetas"):  # of something around
            return super().state_dict(*args, **kwargs)  # type: ignore[misc]
        weights = _link(self).weights
        whole = weights.root is self and not _asked_by_itself(self)
        if whole:
            weights.changes.check_base()
        elif weights.root is self:
            refuse_whole(weights, "saved with all its weights")
        _saving.thetas = None if whole else {}
        try:
            return super().state_dict(*args, **kwargs)  # type: ignore[misc]
        finally:
            del _saving.thetas

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        link = _link(self)
        thetas = _saving.thetas
        for attribute, tensor in link.tensors.items():
            if thetas is None:
                destination.pop(prefix + attribute, None)
            elif prefix + attribute in destination:
                if tensor not in thetas:
                    theta = link.weights.form(tensor)
                    theta = theta if is_shard(theta) else guarded(theta, tensor)
                    thetas[tensor] = theta if keep_vars else theta.detach()
                destination[prefix + attribute] = thetas[tensor]
        if thetas is not None and link.weights.root is self:
            for name in (*link.weights.coordinate_names, FINGERPRINT):
                destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        link = _link(self)
        if link.weights.root is self:
            link.weights.before_loading(state_dict, prefix)
        for tensor, key in _keys(self, prefix):  # type: ignore[arg-type]
            if key in state_dict:  # of a part below, too: nothing is loaded yet
                raise SubspanError(
                    f"{tensor} is computed from coordinates, and a part alone cannot be loaded: "
                    "load a state of the whole network, or load before the network is wrapped"
                )
        before = set(missing_keys)
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        own = {prefix + attribute for attribute in link.tensors}
        missing_keys[:] = [key for key in missing_keys if key in before or key not in own]


def _keys(module: nn.Module, prefix: str) -> Iterator[tuple[str, str]]:
    """The trained tensors of a module and its parts, and their keys in its state."""
    for path, part in module.named_modules(remove_duplicate=False):
        link: Link | None = vars(part).get(LINK)
        for attribute, tensor in ({} if link is None else link.tensors).items():
            yield tensor, prefix + (f"{path}.{attribute}" if path else attribute)


class Root(Part):
    """The behaviour of the network itself: its coordinates are among its parameters."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network; θ that is formed meanwhile is kept until it ends."""
        weights = _link(self).weights
        if not torch.compiler.is_compiling() and fx._is_fx_tracing_flag:
            raise SubspanError(
                "weights of a network in a subspace would be constants of the graph that torch.fx "
                "traces: trace the merge() of the SubspaceModel"
            )
        return weights.call(super().__call__, args, kwargs)  # type: ignore[misc]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Frozen parameters at θ₀, and the coordinates.

        A property of the network (``dtype`` in transformers) that looks at its first parameter
        gets coordinates last: they have a dtype of their own.
        """
        _link(self).weights.note()
        own = super(Part, self).named_parameters(prefix, recurse, remove_duplicate)  # type: ignore[misc]
        if not torch.compiler.is_compiling() and asked_by_fsdp(sys._getframe(1)):
            # Coordinates are whole in every process, and no business of FSDP's.
            yield from (pair for pair in own if not pair[0].startswith(PREFIX))
            return
        if not _asked_by_a_property(self):
            yield from own
            return
        found = list(own)
        found.sort(key=lambda pair: pair[0].rpartition(".")[2].startswith(PREFIX))
        yield from found

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """θ₀ stays where it is: DDP, which asks here, must not send it with every batch."""
        return _link(self).weights.for_ddp("")


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
        for tensor in _link(self).tensors.values():
            raise SubspanError(
                f"{tensor} is computed from coordinates, and a weight that is computed from it "
                "cannot be assigned: do this before the network is wrapped, or on the network of "
                "merge() or unwrap()"
            )
        super().right_inverse(value)  # type: ignore[misc]


class Recurrent:
    """A recurrent layer, which keeps a list of its weights beside them."""

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        names = vars(self)["_flat_weights_names"]
        if not _link(self).weights.ready:  # while copies are made
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
    """The type of made classes, derived from that of the module's own class.

    A made class equals the module's own (``type(m) == nn.Linear``), and calling it, as slices of
    containers and class methods do, makes an ordinary module.
    """

    class Made(kind):  # type: ignore[valid-type,misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self._subspan_class[0](*args, **kwargs)

        def __eq__(self, other: object) -> bool:
            return self is other or self._subspan_class[0] is other

        def __hash__(self) -> int:
            if asked_by_fsdp(sys._getframe(1)):  # which keeps a class for each class
                return type.__hash__(self)
            return hash(self._subspan_class[0])

        def __delattr__(self, name: str) -> None:
            if name not in vars(self) and hasattr(self, name):
                raise SubspanError(
                    f"{name} of {self.__name__} cannot be taken away from a network in a subspace: "
                    "do this before it is wrapped, or on the network of merge() or unwrap()"
                )
            super().__delattr__(name)

    return Made


_made: dict[tuple[type, tuple[str, ...], bool], type] = {}


def made(cls: type, names: tuple[str, ...], root: bool) -> type:
    """The class of a module whose parameters of these names are computed."""
    key = (cls, names, root)
    if key not in _made:
        bases = (Root if root else Part, cls)
        if issubclass(cls, nn.RNNBase):
            bases = (Recurrent, *bases)  # type: ignore[assignment]
        if issubclass(cls, nn.ParameterList):
            bases = (Listed, *bases)  # type: ignore[assignment]
        if "weight" in names and own_product(cls):
            bases = (bases[0], Multiplied, *bases[1:])  # type: ignore[assignment]
        if "weight" in names and looks_up(cls):
            bases = (bases[0], LookedUp, *bases[1:])  # type: ignore[assignment]
        if issubclass(cls, ParametrizationList):
            bases = (Parametrized, *bases)  # type: ignore[assignment]
        body: dict[str, Any] = {name: Weight(name) for name in names}
        body |= {"_subspan_class": key, "__module__": cls.__module__, "__doc__": cls.__doc__}
        body["__qualname__"] = cls.__qualname__
        if root and hasattr(cls, "save_pretrained"):
            body["save_pretrained"] = _saving_all(cls.save_pretrained)
        # The metaclass, too, is not asked: it may keep a list of all classes.
        kind = _metaclass(type(cls))
        new = ABCMeta.__new__ if issubclass(kind, ABCMeta) else type.__new__
        _made[key] = new(kind, cls.__name__, bases, body)
    return _made[key]


def _saving_all(save: Callable[..., Any]) -> Callable[..., Any]:
    """A ``save_pretrained`` that takes a state of coordinates for the network's weights."""

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(getattr(self, "config", None), "quantization_config", None) is not None:
            raise SubspanError(
                "save_pretrained would call dense weights quantised, as the configuration of this "
                "network does: use it on the merge() of the SubspaceModel, or subspan.save"
            )
        state = kwargs.get("state_dict") or {}
        coordinates = _link(self).weights.coordinates()
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
        return save(self, *args, **kwargs)

    return save_pretrained


def _remade(cls: type, names: tuple[str, ...], root: bool) -> Any:
    return object.__new__(made(cls, names, root))


def _own_code(net: Any, properties: bool) -> set[Any]:
    """The code of the methods, or of the properties, that a network's own classes define."""
    codes = set()
    for cls in type(net).__mro__:
        if cls in (Root, Part, nn.Module):
            continue
        for value in vars(cls).values():
            if isinstance(value, property) is not properties:
                continue
            function = (
                value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            )
            codes.add(
                getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            )
    return codes - {None}


def _is_of(frame: FrameType, net: Any, codes: set[Any]) -> bool:
    code = frame.f_code
    return code in codes and code.co_argcount > 0 and frame.f_locals[code.co_varnames[0]] is net


def _asked_by_itself(net: Any) -> bool:
    """Whether a method of the network, save_pretrained say, is being run: it gets what it had."""
    codes = _own_code(net, properties=False)
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and not _is_of(frame, net, codes):
        frame = frame.f_back
    return frame is not None


def _asked_by_a_property(net: Any) -> bool:
    """Whether a property of the network asks for its parameters."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in ("parameters", "<genexpr>", "<listcomp>"):
        frame = frame.f_back
    return frame is not None and _is_of(frame, net, _own_code(net, properties=True))
