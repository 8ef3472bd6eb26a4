"""SubspaceModel: any network, trained through d coordinates. θ = θ₀ + P w.

Source: Li, Farkhoor, Liu and Yosinski, "Measuring the intrinsic dimension of objective landscapes",
ICLR 2018; per layer: Minut 2023; on fine-tuning: Aghajanyan, Zettlemoyer and Gupta, ACL 2021.

The network is wrapped in place: it keeps its class, its parameters (frozen, at θ₀) and its methods,
and every read of a weight gives θ (:mod:`subspan.subspace.inplace`,
:mod:`subspan.subspace.weights`). A SubspaceModel is a handle to it, an ordinary module whose
parameters are the coordinates and what is trained fully, so that optimizers, DDP, compilers and
checkpoints need to know nothing.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from subspan import families
from subspan.errors import SubspanError, unknown
from subspan.subspace import init, quantised
from subspan.subspace.blocks import digest_layout, parameter_key
from subspan.subspace.compartments import Compartment, Patterns, Rules, partition, select
from subspan.subspace.inplace import FINGERPRINT, LINK, PREFIX
from subspan.subspace.parameters import (
    check_trainable,
    digest_tensors,
    find_aliases,
    find_padding,
    find_quantised,
    find_slots,
    saved_buffers,
    select_trainable,
)
from subspan.subspace.sharded import home_of, refuse_sharded, refuse_whole
from subspan.subspace.summary import Row, Summary
from subspan.subspace.weights import Weights


class SubspaceModel(nn.Module):
    """A network whose weights are θ₀ + P w, with w its parameters.

    The network is changed in place, not copied: its parameters are frozen at θ₀, and reading them
    from their modules gives θ. It may be used and trained without this handle, too. :meth:`merge`
    gives an ordinary network with the trained weights, :meth:`unwrap` the network as it was.

    Args:
        net: any module.
        dim: d, the number of coordinates in all; or of each compartment; None where rules say it.
        projection: a family of :func:`subspan.projections`.
        compartments: "global", "layer", "tensor", "uniform:k" or {pattern: dimension}.
        allocation: how a total is divided between compartments: "sqrt" of their size, "equal"
            or by "size".
        targets: patterns of the parameters to train (see
            :func:`subspan.subspace.compartments.matches`);
            by default all that require a gradient. The others stay at θ₀.
        exclude: patterns of parameters that stay at θ₀.
        train_fully: patterns of parameters that are trained directly and stored as they are (a
            new head).
        padding: whether rows of embeddings at ``padding_idx`` stay at θ₀ ("keep"), as they do when
            all weights are trained, or move with the others ("train"). A tensor that is also used
            elsewhere, a tied head say, moves in either case.
        seed: of the projection, in [0, 2⁶⁴).
        options: what the family has beyond these (``s`` of ``sparse``).

    Raises:
        SubspanError: for anything that cannot be trained as asked; the network is then untouched.
    """

    body: nn.Module

    def __init__(
        self,
        net: nn.Module,
        dim: int | Sequence[int] | None = None,
        *,
        projection: str = "hash",
        compartments: Rules = "global",
        allocation: str = "sqrt",
        targets: Patterns = None,
        exclude: Patterns = None,
        train_fully: Patterns = None,
        padding: Literal["keep", "train"] = "keep",
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        if padding not in ("keep", "train"):
            raise unknown("padding", padding, ("keep", "train"))
        if isinstance(net, SubspaceModel):
            raise SubspanError("the network is a SubspaceModel already: merge or unwrap it first")
        if not isinstance(net, nn.Module):
            raise SubspanError(f"the network must be a torch.nn.Module, got {type(net).__name__}")
        for name, module in net.named_modules():
            if isinstance(module, SubspaceModel) or LINK in vars(module):
                raise SubspanError(
                    f"{name or 'the network'} is in a subspace already: merge or unwrap that "
                    "SubspaceModel first"
                )
        refuse_sharded(net)
        targets, exclude, train_fully = _plain(targets), _plain(exclude), _plain(train_fully)
        places = find_slots(net)
        names = find_aliases(places)
        tensors = {name: net.get_parameter(name) for name in names}
        fully = select(names, train_fully, "train_fully")
        packed = find_quantised(net, places)
        sizes = select_trainable(
            tensors, names, targets, exclude, fully, packed, quantised.foreign(net)
        )
        check_trainable(net, places, set(sizes), fully, packed)
        parts = partition(sizes, names, dim, compartments, allocation)
        projections = tuple(
            families.projection(
                projection, out_dim=part.weights, in_dim=part.dim, seed=seed, stream=k, **options
            )
            for k, part in enumerate(parts)
        )
        base: dict[str, Tensor | quantised.Stored] = {
            name: packed.get(name, tensor) for name, tensor in tensors.items() if name not in fully
        }
        inside = [slot for slot in places if slot.tensor in sizes]
        kept = find_padding(net, inside) if padding == "keep" else {}
        own = options | ({"padding": "keep"} if kept else {})
        weights = Weights(
            net,
            parts,
            projections,
            inside,
            {name: tensor.requires_grad for name, tensor in tensors.items()},
            fully,
            kept,
            digest_tensors({**base, **saved_buffers(net)})
            + digest_layout(parts, projection, seed, own),
            {name: found.kind for name, found in packed.items()},
        )
        weights.recipe = own | {
            "dim": list(dim) if isinstance(dim, Sequence) else dim,
            "projection": projection,
            "compartments": compartments if isinstance(compartments, str) else _pairs(compartments),
            "allocation": allocation,
            "targets": targets,
            "exclude": exclude,
            "train_fully": train_fully,
            "seed": seed,
        }
        signature_of = type(net)
        weights.attach()  # the last that can fail; from here on the network is changed
        self._take(net, weights, signature_of)

    def _take(self, net: nn.Module, weights: Weights, signature_of: type) -> None:
        self.subspace = weights
        self.body = net
        self.__class__ = _with_signature(type(self), signature_of)  # type: ignore[arg-type]

    @classmethod
    def of(cls, net: nn.Module) -> SubspaceModel | None:
        """A handle of a network that is in a subspace; None of any other network."""
        if isinstance(net, SubspaceModel):
            return net
        link = vars(net).get(LINK)
        if link is None or link.weights.root is not net:
            return None
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._take(net, link.weights, type(net))
        return model.train(net.training)

    @classmethod
    def from_seed(
        cls,
        build: Callable[[], nn.Module],
        dim: int | Sequence[int] | None = None,
        *,
        init_seed: int = 0,
        **options: Any,
    ) -> Self:
        """A model whose θ₀ is drawn from a seed, so that a checkpoint holds nothing but w.

        Args:
            build: makes the network; its parameters are overwritten by
                :func:`subspan.subspace.init.initialize`.
            dim: as for the class.
            init_seed: of θ₀, in [0, 2⁶⁴).
            options: as for the class.
        """
        net = init.build(build, init_seed)
        model = cls(net, dim, **options)
        model.init_seed = init_seed
        return model

    # ---- the network and its coordinates -------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network at θ₀ + P w; arguments and results are the network's own."""
        self.subspace.network()  # refuses what was unwrapped
        return self.body(*args, **kwargs)

    @property
    def compartments(self) -> tuple[Compartment, ...]:
        """Which weights share which coordinates."""
        return self.subspace.compartments

    @property
    def projections(self) -> tuple[families.Projection, ...]:
        """P of each compartment."""
        return self.subspace.projections

    @property
    def coordinates(self) -> Coordinates:
        """W of each compartment, a parameter by the compartment's name."""
        return Coordinates(self.subspace)

    @property
    def recipe(self) -> dict[str, Any]:
        """The arguments that make this model of its network, as JSON."""
        return self.subspace.recipe

    @property
    def init_seed(self) -> int | None:
        """The seed of θ₀, if it has one."""
        return self.subspace.init_seed

    @init_seed.setter
    def init_seed(self, seed: int | None) -> None:
        self.subspace.init_seed = seed

    @property
    def base_fingerprint(self) -> str:
        """A digest of θ₀ and the buffers as they were when the network was wrapped."""
        return self.subspace.fingerprint[:32]

    @property
    def layout(self) -> str:
        """A digest of what the coordinates mean."""
        return self.subspace.fingerprint[32:]

    @property
    def fingerprint(self) -> Tensor:
        """Both digests, byte by byte, as the buffer that a ``state_dict`` carries."""
        return self.body.get_buffer(FINGERPRINT)

    def weights(self) -> dict[str, Tensor]:
        """The weights of every tensor that is not trained fully, by name; θ is differentiable."""
        thetas = self.subspace.all()
        return {
            name: thetas[name] if name in thetas else self.subspace.resting(name)
            for name in self.subspace.requires_grad
            if name not in self.subspace.fully
        }

    @torch.inference_mode(False)  # what is made in it could not be trained
    @torch.no_grad()
    def merge(self) -> nn.Module:
        """An ordinary network with the weights θ₀ + P w; this model is left as it is.

        Layers whose quantised weights are trained become dense ones: ``nn.Linear`` in the dtype
        that was quantised.
        """
        refuse_whole(self.subspace, "merged")
        thetas = self.subspace.all()
        twin = copy.deepcopy(self)
        return twin.subspace.detach({name: theta.clone() for name, theta in thetas.items()})

    def unwrap(self) -> nn.Module:
        """The network that was wrapped, at θ₀ exactly; this model cannot be used any more.

        What was trained fully, and buffers, keep what training made of them.
        """
        return self.subspace.detach()

    def fully_trained(self) -> dict[str, nn.Parameter]:
        """The parameters of ``train_fully`` by name."""
        return {name: self.body.get_parameter(name) for name in self.subspace.fully}

    def changed_buffers(self) -> dict[str, Tensor]:
        """The network's saved buffers that are not what they were when it was wrapped."""
        buffers = saved_buffers(self.body)
        was = self.subspace.base_buffers
        return {
            name: b for name, b in buffers.items() if digest_tensors({name: b}) != was.get(name)
        }

    def summary(self) -> Summary:
        """Tensor by tensor: weights, compartment, coordinates. Print it, or read its rows."""
        parts: dict[str, list[Compartment]] = {}
        for part in self.compartments:
            for piece in part.pieces:
                parts.setdefault(piece.tensor, []).append(part)
        rows = [
            Row.of(
                name,
                self.subspace.held(name).shape,
                name in self.subspace.fully,
                parts.get(name, []),
            )
            for name in self.subspace.requires_grad
        ]
        return Summary(tuple(rows), sum(part.dim for part in self.compartments))

    def print_trainable_parameters(self) -> None:
        """Print the counts in one line, as PEFT does: "all" are the weights of the network."""
        print(self.summary().line())

    # ---- what makes the handle an ordinary module ----------------------------------------------

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what is trained: coordinates, then the network's own that require a gradient.

        With duplicates (for exporters, which look tensors up by their paths) all that there are.
        """
        self.subspace.note()
        start = f"{prefix}." if prefix else ""
        if not recurse and _asked_by_a_checkpoint():
            # It goes from module to module, and wants every name of a parameter.
            for key, w in self.coordinates.items():
                yield f"{start}coordinates.{key}", w
        if not remove_duplicate or not recurse:
            yield from super().named_parameters(prefix, recurse, remove_duplicate)
            return
        coordinates = self.coordinates
        for key, w in coordinates.items():
            yield f"{start}coordinates.{key}", w
        ours = {id(w) for w in coordinates.values()}
        fully = {f"{start}body.{name}" for name in self.subspace.fully}
        for name, p in super().named_parameters(prefix):
            if id(p) not in ours and home_of(p) is None and (p.requires_grad or name in fully):
                yield name, p

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter of a path, which of a trained one is frozen θ₀."""
        inside = target.removeprefix("body.")
        return (
            super().get_parameter(target) if inside == target else self.body.get_parameter(inside)
        )

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze or unfreeze all that is trained."""
        for tensor in self.subspace.trained():
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
        plain = {slot.path for slot in self.subspace.slots}
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
        taken = name == "body" or isinstance(getattr(SubspaceModel, name, None), property)
        if taken and name != "init_seed" and "body" in vars(self).get("_modules", ()):
            raise self._taken(name)
        new = name.startswith("_") and not hasattr(self, name)
        if self._is_own(name) or (new and self._asked_by_another_package()):
            super().__setattr__(name, value)
        else:
            setattr(self.body, name, value)
            if hasattr(type(self), name):  # of every module: reading it would find that
                vars(self)[name] = value

    def _taken(self, name: str) -> SubspanError:
        return SubspanError(
            f"{name} is the SubspaceModel's own: set that of the network by model.body.{name}"
        )

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
                raise self._taken(name)
        else:
            self.body.add_module(name, module)

    def register_buffer(self, *args: Any, **kwargs: Any) -> None:
        """Add a buffer to the network."""
        self.body.register_buffer(*args, **kwargs)

    def register_parameter(self, *args: Any, **kwargs: Any) -> None:
        """Add a parameter to the network."""
        self.body.register_parameter(*args, **kwargs)

    def _asked_by_another_package(self) -> bool:
        """Whether an installed program, other than the network's, marks what it was given."""
        frame = sys._getframe(2)
        asks, ours = frame.f_globals.get("__name__", ""), type(self.body).__module__
        installed = "site-packages" in frame.f_code.co_filename
        return installed and asks.partition(".")[0] != ours.partition(".")[0]

    def _is_own(self, name: str) -> bool:
        """Whether an attribute is the handle's; what nobody has becomes the network's."""
        if "body" not in vars(self).get("_modules", ()) or name == "body":
            return True
        if name in vars(SubspaceModel) or (name in vars(self) and not hasattr(type(self), name)):
            return True
        if name in vars(self.body):  # even if every module has something of this name
            return name in _OF_EVERY_MODULE
        return name in vars(self) or hasattr(type(self), name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _remade, self._signature_of, self.__getstate__()


def _asked_by_a_checkpoint() -> bool:
    """Whether parameters are listed for torch.distributed.checkpoint."""
    if torch.compiler.is_compiling():
        return False
    return sys._getframe(2).f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict"


_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {
    name for name in vars(nn.Module) if name.startswith("_")
}


class Coordinates(nn.Module):
    """w of a model by compartment: a view of parameters that the network holds."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._parameters = _Slots(weights)  # type: ignore[assignment]

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
        """The parameters."""
        return self._parameters.values()

    def items(self) -> Any:
        """Both."""
        return self._parameters.items()


class _Slots(MutableMapping[str, Any]):
    """The coordinates' entries in the network's ``_parameters``, by compartment."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __getitem__(self, key: str) -> Any:
        return self._weights.coordinates()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._weights.root._parameters[PREFIX + key] = value

    def __delitem__(self, key: str) -> None:
        raise SubspanError("coordinates cannot be deleted: unwrap() the model")

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights.coordinates())

    def __len__(self) -> int:
        return len(self._weights.coordinate_names)


@functools.cache
def _with_signature(handle: type, net: type) -> type:
    """A handle's class whose ``forward`` shows the network's signature: trainers read it there."""
    body: dict[str, Any] = {
        "_signature_of": (handle, net),
        "__module__": handle.__module__,
        "__qualname__": handle.__qualname__,
        "__doc__": handle.__doc__,
    }
    for name in ("__len__", "__getitem__", "__iter__", "__contains__", "__enter__", "__exit__"):
        if hasattr(net, name):  # Python looks them up in the class
            body[name] = functools.partialmethod(_of_the_network, name)
    with contextlib.suppress(TypeError, ValueError):  # some callables of C have none

        @functools.wraps(handle.forward)  # type: ignore[attr-defined]
        def forward(self: SubspaceModel, *args: Any, **kwargs: Any) -> Any:
            self.subspace.network()  # refuses what was unwrapped
            return self.body(*args, **kwargs)

        forward.__signature__ = inspect.signature(net.forward)  # type: ignore[attr-defined]
        body["forward"] = forward
    return type(handle.__name__, (handle,), body)


def _of_the_network(handle: SubspaceModel, name: str, *args: Any) -> Any:
    return getattr(type(handle.body), name)(handle.body, *args)


def _remade(handle: type, net: type) -> Any:
    cls = _with_signature(handle, net)
    return cls.__new__(cls)  # type: ignore[call-overload]


def _pairs(rules: Mapping[str, int] | Sequence[tuple[str, int]]) -> list[list[Any]]:
    """Rules as JSON that keeps their order: the first that matches counts."""
    return [list(rule) for rule in (rules.items() if isinstance(rules, Mapping) else rules)]


def _plain(patterns: Patterns) -> str | list[str] | None:
    return patterns if isinstance(patterns, str | None) else list(patterns)
