"""SubspaceModel: any network, trained through d coordinates. θ = θ₀ + P w.

Source: Li, Farkhoor, Liu and Yosinski, "Measuring the intrinsic dimension of objective landscapes",
ICLR 2018; per layer: Minut 2023; on fine-tuning: Aghajanyan, Zettlemoyer and Gupta, ACL 2021.

An ordinary module: its parameters are the coordinates (and what is trained fully), so optimizers,
DDP, compilers and checkpoints need to know nothing. The network inside is hollow: θ₀ lies in its
slots as buffers that are never saved, and each call puts θ there tensor by tensor, so that no flat
vector of all weights ever exists.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from subspan import families, init, slots
from subspan.compartments import Compartment, Patterns, Piece, Rules, partition, select
from subspan.errors import SubspanError
from subspan.families.base import project
from subspan.summary import Row, Summary

GROUP = 1 << 20  # weights up to which one call of the operator serves several tensors


@dataclass(frozen=True)
class Call:
    """One call of the operator: rows start … stop−1 of a projection, for consecutive pieces."""

    coordinates: str
    recipe: str
    start: int
    stop: int
    pieces: tuple[Piece, ...]


class SubspaceModel(nn.Module):
    """A network whose weights are θ₀ + P w, with w its parameters.

    The network is taken over, not copied: its own parameters become θ₀. :meth:`merge` gives an
    ordinary network with the trained weights, :meth:`unwrap` the network as it was.

    Args:
        net: any module.
        dim: d, the number of coordinates in all; or of each compartment; None where rules say it.
        projection: a family of :func:`subspan.projections`.
        compartments: "global", "layer", "tensor", "uniform:k" or {pattern: dimension}.
        allocation: how a total is divided between compartments: "sqrt" of their size, "equal"
            or by "size".
        targets: patterns of the parameters to train (see :func:`subspan.compartments.matches`);
            by default all that require a gradient. The others stay at θ₀.
        exclude: patterns of parameters that stay at θ₀.
        train_fully: patterns of parameters that are trained directly and stored as they are (a
            new head).
        seed: of the projection, in [0, 2⁶⁴).
        options: what the family has beyond these (``s`` of ``sparse``).

    Raises:
        SubspanError: for anything that cannot be trained as asked; the network is then untouched.
    """

    body: nn.Module
    fingerprint: Tensor  # a buffer, so that a state_dict carries it and DDP sends rank 0's

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
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(net, SubspaceModel):
            raise SubspanError("the network is a SubspaceModel already: merge() or unwrap() it first")
        places = slots.slots(net)
        names = slots.aliases(places)
        tensors = {name: net.get_parameter(name) for name in names}
        fully = select(names, train_fully, "train_fully")
        sizes = _trained(tensors, names, targets, exclude, fully)
        self.compartments = partition(sizes, names, dim, compartments, allocation)
        self.projections = tuple(
            families.projection(
                projection, out_dim=part.weights, in_dim=part.dim, seed=seed, stream=k, **options
            )
            for k, part in enumerate(self.compartments)
        )
        self.recipe: dict[str, Any] = options | {
            "dim": list(dim) if isinstance(dim, Sequence) else dim,
            "projection": projection,
            "compartments": dict(compartments) if isinstance(compartments, Mapping) else compartments,
            "allocation": allocation,
            "targets": _plain(targets),
            "exclude": _plain(exclude),
            "train_fully": _plain(train_fully),
            "seed": seed,
        }
        self.init_seed: int | None = None

        self._places = tuple(slot for slot in places if slot.tensor not in fully)
        self._fully = tuple(sorted(fully))
        self._order = slots.parameter_order(net)
        self._requires_grad = {name: tensor.requires_grad for name, tensor in tensors.items()}
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in net.modules())
        self._calls = _plan(self.compartments, self.projections)
        self._step = torch.tensor(0)
        self._ranks_checked = False

        base = {name: tensor for name, tensor in tensors.items() if name not in fully}
        buffers = slots.saved_buffers(net)
        self.base_buffers = {name: slots.digest({name: b}) for name, b in buffers.items()}
        self.base_fingerprint = slots.digest(base | buffers)
        digits = list(bytes.fromhex(self.base_fingerprint))
        self.register_buffer("fingerprint", torch.tensor(digits, dtype=torch.uint8))

        # From here on nothing can fail, and the network changes.
        some = tensors[next(iter(sizes))]
        dtype = torch.float64 if some.dtype == torch.float64 else torch.float32
        self.coordinates = nn.ParameterDict()
        for part in self.compartments:
            w = torch.zeros(part.dim, device=some.device, dtype=dtype)
            self.coordinates[_key(part.name)] = nn.Parameter(w)
        for name in fully:
            tensors[name].requires_grad_(True)
        slots.hollow(net, self._places)
        self.body = net
        # θ₀ stays where it is: DDP must not send it with every batch.
        self._ddp_params_and_buffers_to_ignore = [f"body.{slot.path}" for slot in self._places]
        self.register_load_state_dict_pre_hook(_refuse_other_base)
        self._take_signature()

    @classmethod
    def from_seed(
        cls, build: Callable[[], nn.Module], dim: int | Sequence[int] | None = None, *,
        init_seed: int = 0, **options: Any,
    ) -> Self:  # fmt: skip
        """A model whose θ₀ is drawn from a seed, so that a checkpoint holds nothing but w.

        Args:
            build: makes the network; its parameters are overwritten by
                :func:`subspan.init.initialize`.
            dim: as for the class.
            init_seed: of θ₀, in [0, 2⁶⁴).
            options: as for the class.
        """
        net = init.build(build, init_seed)
        model = cls(net, dim, **options)
        model.init_seed = init_seed
        return model

    # ---- the forward pass --------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """θ of every tensor that is not trained fully, by name; differentiable in w."""
        deltas: dict[str, list[Tensor]] = {}
        for call in self._calls:
            w = self.coordinates[call.coordinates]
            rows = project(w, self._step, call.recipe, call.start, call.stop, False)
            parts = rows.split([len(piece) for piece in call.pieces])
            for piece, part in zip(call.pieces, parts, strict=True):
                deltas.setdefault(piece.tensor, []).append(part)
        thetas = {}
        for slot in self._places:
            if slot.path == slot.tensor:
                theta = self.body.get_buffer(slot.tensor)
                if slot.tensor in deltas:
                    delta = torch.cat(deltas[slot.tensor]).view(theta.shape)
                    # Low precisions are added up in the coordinates' own, and rounded once.
                    theta = (theta + delta.to(theta.device)).to(theta.dtype)
                thetas[slot.tensor] = theta
        return thetas

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network at θ₀ + P w; arguments and results are the network's own."""
        return self._call("forward", args, kwargs)

    def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A method of the network with θ in its slots."""
        if not self._ranks_checked and not torch.compiler.is_compiling():
            self._check_ranks()
        theta = self.weights()
        in_slots = {f"body.{slot.path}": theta[slot.tensor] for slot in self._places}
        out = functional_call(_Method(self.body, method), in_slots, args, kwargs, tie_weights=False)
        if self._recurrent:
            slots.forget_flat_weights(self.body)
        return out

    def _check_ranks(self) -> None:
        """Once: where DDP has put rank 0's fingerprint, it must be that of our own θ₀."""
        if bytes(self.fingerprint.tolist()).hex() != self.base_fingerprint:
            raise SubspanError(
                "the initial weights of this process differ from those of rank 0: build the network "
                "from the same seed or file on every rank"
            )
        self._ranks_checked = True

    # ---- the network inside --------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """An ordinary network with the weights θ₀ + P w; this model is left as it is."""
        theta = {name: tensor.clone() for name, tensor in self.weights().items()}
        return self._filled(copy.deepcopy(self.body), theta)

    def unwrap(self) -> nn.Module:
        """The network that was wrapped, at θ₀ exactly; this model cannot be used any more.

        What was trained fully, and buffers, keep what training made of them.
        """
        base = {s.tensor: self.body.get_buffer(s.tensor) for s in self._places if s.path == s.tensor}
        return self._filled(self.body, base)

    def _filled(self, net: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        parameters = {
            name: nn.Parameter(tensor, requires_grad=self._requires_grad[name])
            for name, tensor in tensors.items()
        }
        slots.fill(net, self._places, parameters)
        slots.restore_order(net, self._order)
        return net

    def fully_trained(self) -> dict[str, nn.Parameter]:
        """The parameters of ``train_fully`` by name."""
        return {name: self.body.get_parameter(name) for name in self._fully}

    def changed_buffers(self) -> dict[str, Tensor]:
        """The network's saved buffers that are not what they were when it was wrapped."""
        buffers = slots.saved_buffers(self.body)
        return {n: b for n, b in buffers.items() if slots.digest({n: b}) != self.base_buffers.get(n)}

    def summary(self) -> Summary:
        """Tensor by tensor: weights, compartment, coordinates. Print it, or read its rows."""
        parts: dict[str, list[Compartment]] = {}
        for part in self.compartments:
            for piece in part.pieces:
                parts.setdefault(piece.tensor, []).append(part)
        rows = []
        for name in self._requires_grad:
            fully = name in self._fully
            tensor = self.body.get_parameter(name) if fully else self.body.get_buffer(name)
            rows.append(Row.of(name, tensor, fully, parts.get(name, [])))
        return Summary(tuple(rows), sum(part.dim for part in self.compartments))

    def print_trainable_parameters(self) -> None:
        """Print the counts in one line, as PEFT does: "all" are those of the network and w."""
        print(self.summary().line())

    # ---- what makes the wrapper transparent --------------------------------------------------------

    def _take_signature(self) -> None:
        """Show the network's own signature of ``forward``: trainers read it to choose columns."""
        try:
            theirs = inspect.signature(self.body.forward)
        except (TypeError, ValueError):  # some callables of C have none
            return

        @functools.wraps(SubspaceModel.forward)
        def forward(self: SubspaceModel, *args: Any, **kwargs: Any) -> Any:
            return self._call("forward", args, kwargs)

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        parameters = [own, *theirs.parameters.values()]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        # A bound method, because deepcopy binds it to the copy.
        self.forward = types.MethodType(forward, self)  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "body" or "_modules" not in self.__dict__:
                raise
        found = getattr(self.body, name)
        if inspect.ismethod(found) and found.__self__ is self.body:
            # ``model.generate(…)`` must see θ and not θ₀, too.
            return functools.partial(self._call_named, name)
        return found

    def _call_named(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        return self._call(name, args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Without the bound method, which pickle cannot name."""
        return {key: value for key, value in self.__dict__.items() if key != "forward"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._take_signature()


class _Method(nn.Module):
    """Any method of a module as a ``forward``, which is what ``functional_call`` calls."""

    def __init__(self, body: nn.Module, name: str) -> None:
        super().__init__()
        self.body, self.name = body, name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The method's result."""
        if self.name == "forward":
            return self.body(*args, **kwargs)  # runs hooks
        return getattr(self.body, self.name)(*args, **kwargs)


def _trained(
    tensors: Mapping[str, nn.Parameter], names: Mapping[str, Sequence[str]],
    targets: Patterns, exclude: Patterns, fully: set[str],
) -> dict[str, int]:  # fmt: skip
    """The tensors to train in the subspace and their sizes, in the network's order."""
    if targets is None:
        chosen = {name for name, tensor in tensors.items() if tensor.requires_grad}
    else:
        chosen = select(names, targets, "targets")
    chosen -= select(names, exclude, "exclude") | fully
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin) or tensor.is_meta:
            raise SubspanError(f"{name} has no values yet: run one batch, or load the weights, first")
        if name in chosen and not tensor.is_floating_point():
            raise SubspanError(f"{name} is {tensor.dtype} and P w is real: exclude it")
    sizes = {name: t.numel() for name, t in tensors.items() if name in chosen and t.numel()}
    if not sizes:
        raise SubspanError(
            "no parameter is left to train in the subspace: give targets, or unfreeze some, "
            f"of {', '.join(names) or 'none'}"
        )
    return sizes


def _plan(
    compartments: Sequence[Compartment], projections: Sequence[families.Projection]
) -> tuple[Call, ...]:
    """Small tensors share a call; a family that computes all rows at once is called once."""
    calls = []
    for part, projection in zip(compartments, projections, strict=True):
        limit = GROUP if projection.local else part.weights
        start = stop = 0
        group: list[Piece] = []
        for piece in (*part.pieces, None):
            if group and (piece is None or stop - start + len(piece) > limit):
                calls.append(Call(_key(part.name), projection.recipe, start, stop, tuple(group)))
                start, group = stop, []
            if piece is not None:
                group.append(piece)
                stop += len(piece)
    return tuple(calls)


def _key(compartment: str) -> str:
    """A compartment's name as a parameter's: dots would be read as submodules."""
    key = compartment.replace(".", "/")
    return key + "/" if hasattr(nn.ParameterDict(), key) else key


def _plain(patterns: Patterns) -> str | list[str] | None:
    return patterns if isinstance(patterns, str | None) else list(patterns)


def _refuse_other_base(
    model: SubspaceModel, state: Mapping[str, Tensor], prefix: str, *_: Any
) -> None:
    """Coordinates mean nothing on another θ₀."""
    theirs = state.get(prefix + "fingerprint")
    if theirs is not None and bytes(theirs.tolist()).hex() != model.base_fingerprint:
        raise SubspanError(
            "this state_dict was trained from other initial weights (fingerprint "
            f"{bytes(theirs.tolist()).hex()}, this network has {model.base_fingerprint}): build the "
            "network with the same initial weights"
        )
