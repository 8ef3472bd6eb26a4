"""The behaviour of modules whose weights are computed, so that a network stays itself.

A trained parameter stays in its module, under its name, as a frozen
:class:`~subspan.subspace.theta0.Base` that holds θ₀, and reading it gives θ
(:mod:`subspan.subspace.descriptors`). Modules get classes that are made for them
(:mod:`subspan.subspace.classes`), with the behaviour that is here and in
:mod:`subspan.subspace.module_states`.

One rule decides who sees what: the network's own methods and parts see θ; what asks the network as
a whole for parameters or a state (an optimizer, DDP, a trainer) sees frozen θ₀ and the coordinates.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx import _symbolic_trace as fx
from torch.nn.modules.batchnorm import _BatchNorm

from subspan.errors import SubspanError
from subspan.subspace import callers
from subspan.subspace.computed import Computed
from subspan.subspace.descriptors import QConfigDescriptor, refuse_part
from subspan.subspace.dtensors import home_of, is_shard, mark, refuse_flattening
from subspan.subspace.formed import find_call
from subspan.subspace.links import (
    LINK,
    PREFIX,
    Link,
    find_link,
    is_exported,
    is_ours,
    link_of,
    locate,
    trained_keys,
)
from subspan.subspace.module_states import ModuleStates
from subspan.subspace.rebinding import copying
from subspan.subspace.sharded import Shards, refuse_whole
from subspan.subspace.theta0 import Base, Packed, freeze, thaw
from subspan.subspace.transient import clone_results
from subspan.subspace.variant import refuse_in_use


class WrappedModule(ModuleStates):
    """The behaviour of every module that has a trained parameter, or a part with one."""

    _subspan_class: ClassVar[tuple[type, tuple[str, ...], bool]]  # arguments of make_class
    _subspan_rebuild: ClassVar[Callable[..., Any]]
    qconfig = QConfigDescriptor()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep made classes from people's lists of classes, which have the modules' own."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was pickled, and its trained parameters for θ₀."""
        super().__setstate__(state)
        if (link := find_link(self)) is not None:
            for attribute, tensor in link.tensors.items():
                parameter = self._parameters.get(attribute)
                if isinstance(parameter, nn.Parameter) and not isinstance(parameter, Base):
                    freeze(parameter, link.weights, tensor)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._check_copied()
        return self._subspan_rebuild, self._subspan_class, self.__getstate__()

    def _check_copied(self) -> None:
        """Refuse copies of shards, and of the network itself where it is a variant."""
        if (link := find_link(self)) is not None:
            for refuse in (refuse_whole, refuse_in_use):
                refuse(link.weights, "copied or pickled")

    @copying
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        self._check_copied()
        clone_results(vars(self), memo)
        kind: Any = self._subspan_class[0]
        if isinstance(self, GraphModule):
            own = {"forward": kind.forward, "__module__": kind.__module__}
            kind = type(kind.__name__, kind.__bases__, own)  # each has a class, with its code
        elif (copy_itself := getattr(super(), "__deepcopy__", None)) is not None:
            twin = copy_itself(memo)
            if type(twin) is not type(self) or LINK not in vars(twin):
                raise SubspanError(
                    f"{type(self).__name__} has a __deepcopy__ of its own, whose copies are not in "
                    "the subspace: copy the network of unwrap(), or copy state_dict()"
                )
            return twin
        twin = memo[id(self)] = self._subspan_rebuild(kind, *self._subspan_class[1:])
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    # ---- parameters --------------------------------------------------------------------------

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        """Yield a part's parameters at θ; of one module alone, as FSDP asks, the stored ones."""
        fsdp = paired = False
        if not torch.compiler.is_compiling():
            frame = sys._getframe(1)
            paired = callers.pairs_with_state(frame)
            fsdp = callers.asked_by_fsdp(frame)
            if callers.asked_by_export(frame):
                raise refuse_part("exported")
            if (link := find_link(self)) is not None:
                if callers.asked_by_tensor_parallel(frame):
                    raise SubspanError(
                        "tensor parallelism spreads single layers, whose weights are computed from "
                        "coordinates of the whole network here: call fully_shard on the layers and "
                        "on the network, or parallelize the network of merge()"
                    )
                refuse_flattening(self, frame)
                if callers.asked_by_ddp(frame):
                    self._refuse_ddp(link, callers.given_to_ddp(frame))
        stored = super().named_parameters(prefix, recurse, remove_duplicate)
        if is_exported(self):
            yield from self._exported(stored, prefix)
            return
        for name, p in self._lent(stored):
            if paired and home_of(p) is not None:
                continue  # states go without θ₀
            home = home_of(p) if recurse and not fsdp else None
            if home is not None:
                weights, tensor = home
                if tensor in weights.adapters and is_shard(p):
                    yield name, p  # W + s B A of a shard would need all of A
                elif tensor not in weights.hidden:
                    theta = weights.read(tensor)
                    if not torch.compiler.is_compiling() and weights.shards is None:
                        weights.lent.add(tensor, theta)
                    yield name, theta
            else:
                yield name, p

    def _exported(
        self, stored: Iterator[tuple[str, Any]], prefix: str
    ) -> Iterator[tuple[str, Any]]:
        """Yield the parameters of the ordinary network, at θ, to its own code while it is exported.

        Exporters have stand-ins in their places, which say nothing when they are computed with.
        """
        for name, p in stored:
            module, attribute = locate(self, name[len(prefix) + 1 if prefix else 0 :])
            link = find_link(module)
            tensor = None if link is None else link.tensors.get(attribute)
            if tensor is None and not is_ours(name):
                yield name, p
            elif link is not None and tensor is not None and tensor not in link.weights.hidden:
                yield name, getattr(module, attribute)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """Yield a part's buffers, which may be those of a variant."""
        return self._lent(super().named_buffers(*args, **kwargs))

    def _lent(self, named: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        link = find_link(self)
        if torch.compiler.is_compiling() or link is None or link.weights.root is self:
            return named
        variant = link.weights.variant()
        return named if variant is None else variant.lend_all(named)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the parts, which nobody may put into layers of another kind."""
        compiled = torch.compiler.is_compiling()
        if not compiled and callers.converts_batchnorm(sys._getframe(1)):
            for tensor, key, _ in trained_keys(self):
                if isinstance(self.get_submodule(key.rpartition(".")[0]), _BatchNorm):
                    raise SubspanError(
                        f"{tensor} is computed from coordinates and cannot become that of a "
                        "SyncBatchNorm: convert layers before the network is wrapped"
                    )
        return super().named_children()

    def get_parameter(self, target: str) -> Any:
        """Return the parameter of a path, which of a trained one is frozen θ₀."""
        path, _, attribute = target.rpartition(".")
        module = self.get_submodule(path)
        own = module._parameters.get(attribute)
        if is_exported(self):
            return getattr(module, attribute)
        if home_of(own) is not None:
            return own
        lent = None if own is None else getattr(module, attribute)  # that of a variant
        return lent if type(lent) is Computed else super().get_parameter(target)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; a weight that is computed cannot become something else."""
        link = find_link(self)
        if link is not None and param is not None and param is self._parameters.get(name):
            return  # tied once more
        if link is not None:
            lost = [attr for attr in link.tensors if attr not in self._parameters]
            if lost:  # taken out by the caller a moment ago
                link.weights.put_back(self, link)
            if lost or name in link.tensors or type(param) is Computed:
                tensor = link.tensors.get(lost[0] if lost else name, name)
                raise SubspanError(
                    f"{tensor} is computed from coordinates and cannot be replaced or computed "
                    "from another tensor: do this before the network is wrapped, or on the network "
                    "of merge() or unwrap()"
                )
        super().register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a computed weight cannot be tied to another one, nor the class set."""
        link = find_link(self)
        if name == "__class__" and link and not callers.may_set_class(sys._getframe(1)):
            raise self._refuse_class()
        stored = link is not None and name in self._parameters
        if stored and not torch.compiler.is_compiling() and callers.asked_by_fsdp(sys._getframe(1)):
            Shards.put(self, name, value)
            return
        if type(value) is Computed and link is not None and name in link.tensors:
            raise SubspanError(
                f"{link.tensors[name]} is computed from coordinates and cannot become "
                f"{value.weight_name}: tie them before the network is wrapped"
            )
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> Any:
        """TorchScript, which asks here, would keep the weights of now; a trace follows them."""
        if callers.asked_by_trace(sys._getframe(1)):
            return self
        raise SubspanError(
            "a network in a subspace cannot be scripted, since TorchScript would keep its weights "
            "as they are now: trace it, or script the merge() of the SubspaceModel"
        )

    def __delattr__(self, name: str) -> None:
        link = find_link(self)
        if link is not None and callers.parametrizes(sys._getframe(1)):
            raise self._refuse_class()
        if link is not None and name in link.tensors and name in self._parameters:
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

    def _refuse_class(self) -> SubspanError:
        return SubspanError(
            f"this {type(self).__name__} is in a subspace and has a class that was made for it; "
            "another one, as of a parametrization, would be lost with the next copy: set it before "
            "the network is wrapped, or in the network of merge() or unwrap()"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or convert; what that makes of θ₀ is θ₀ from now on."""
        if not torch.compiler.is_compiling() and callers.empties_for_fsdp(sys._getframe(1)):
            raise SubspanError(
                "accelerate's cpu_ram_efficient_loading would empty this network and fill its "
                "shards from one process, while every process needs θ₀ whole until it is sharded: "
                "set it to false (fsdp_cpu_ram_efficient_loading in a configuration file)"
            )
        link = link_of(self)
        changes, tensors = link.weights.changes, set(link.tensors.values())
        before = changes.changed(tensors)
        for attribute in link.tensors:
            if isinstance(packed := self._parameters[attribute], Packed):
                thaw(packed)  # for the library, which may make another object
        out = super()._apply(fn, recurse)
        for attribute, tensor in link.tensors.items():
            parameter = self._parameters[attribute]
            if is_shard(parameter):
                mark(parameter, link.weights, tensor)
            elif not isinstance(parameter, Base):  # PyTorch has made another object
                freeze(parameter, link.weights, tensor)
        changes.remember(tensors - before)
        if (outer := find_call(link.weights)) is not None:  # as Switch Transformers' routers do
            outer.drop_converted(tensors)
        return out

    @staticmethod
    def _refuse_ddp(link: Link, given: list[Tensor]) -> None:
        """Refuse a part in DDP without the coordinates, which each process would train alone."""
        own = link.weights.coordinates().values()
        if any(w.requires_grad for w in own) and not any(w is p for w in own for p in given):
            raise SubspanError(
                "a part of a network in a subspace cannot be given to DDP, since its coordinates "
                "are the network's: give the network, or the SubspaceModel; or a module that holds "
                "it, or freeze the coordinates"
            )

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        if callers.asked_by_ddp(sys._getframe(1)):
            self._refuse_ddp(link_of(self), [])
        return []  # to whoever lists attributes

    def _replicate_for_data_parallel(self) -> Any:
        raise SubspanError(
            "nn.DataParallel copies parameters one by one and would lose the subspace: use "
            "DistributedDataParallel"
        )


class WrappedNetwork(WrappedModule):
    """The behaviour of the network itself: its coordinates are among its parameters."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network; θ that is formed meanwhile is kept until it ends."""
        weights = link_of(self).weights
        if not torch.compiler.is_compiling() and fx._is_fx_tracing_flag:
            raise SubspanError(
                "weights of a network in a subspace would be constants of the graph that torch.fx "
                "traces: trace the merge() of the SubspaceModel"
            )
        return weights.call(super().__call__, args, kwargs)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        """Frozen parameters at θ₀, and the coordinates.

        A property of the network (``dtype`` in transformers) that looks at its first parameter
        gets coordinates last: they have a dtype of their own.
        """
        weights = link_of(self).weights
        weights.note()
        if not torch.compiler.is_compiling():
            weights.changes.check_freezing(sys._getframe(1))
        stored = super(WrappedModule, self).named_parameters(prefix, recurse, remove_duplicate)
        if is_exported(self):
            stored = self._exported(stored, prefix)
        elif not torch.compiler.is_compiling():
            frame = sys._getframe(1)
            if callers.copies_weights(frame):
                stored = weights.copied()  # type: ignore[assignment]
            elif callers.asked_by_fsdp(frame):
                # Coordinates are whole in every process, and no business of FSDP's.
                stored = (pair for pair in stored if not pair[0].startswith(PREFIX))
            elif callers.pairs_with_state(frame):
                own = weights.coordinate_names  # states go without θ₀ and what nobody trains
                stored = (pair for pair in stored if pair[0] in own or weights.lists(*pair))
            elif callers.asked_by_own_property(frame, self):
                stored = iter(sorted(stored, key=lambda pair: is_ours(pair[0])))  # it is stable
        yield from stored

    def named_modules(self, memo: set[Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Return the modules; to an average of models only one, which holds what is trained.

        It pairs parameters by their order, whether a handle, a network or what is around it has
        them; θ₀ is the same in a copy, and packed numbers have no mean. Checkpoints of what is
        around go without θ₀, too.
        """
        frame = None if torch.compiler.is_compiling() else sys._getframe(1)
        if frame is not None:
            refuse_flattening(self, frame)
        if not frame or not (callers.averages_models(frame) or callers.pairs_with_state(frame)):
            return super().named_modules(memo, *args, **kwargs)
        memo = set() if memo is None else memo
        if self in memo:
            return iter(())
        memo.add(self)
        prefix = kwargs.get("prefix", args[0] if args else "")
        listed = SimpleNamespace(items=link_of(self).weights.listed)  # one at a time
        return iter([(prefix, SimpleNamespace(_parameters=listed))])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or convert; coordinates keep float32 where weights get 16 bits.

        So they have it around a network that was converted before: a step of an optimizer is
        smaller than what 16 bits tell apart.
        """
        own: dict[str, Any] = self._parameters
        names = link_of(self).weights.coordinate_names
        before = {name: own[name].data for name in names}
        grads = {name: g.data for name in names if (g := own[name].grad) is not None}
        out = super()._apply(fn, recurse)
        for name in names:
            w = own[name]
            if w.dtype.itemsize == 2:
                w.grad, w.data = None, before[name].to(w.device, torch.float32)
                w.grad = grads[name].to(w.device, torch.float32) if name in grads else None
        return out

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """θ₀ stays where it is: DDP, which asks here, must not send it with every batch."""
        return link_of(self).weights.for_ddp("")
