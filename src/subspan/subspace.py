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
from typing import Any, Self

import torch
from torch import Tensor, nn

from subspan import calls, families, init, slots
from subspan.compartments import Compartment, Patterns, Rules, partition, select
from subspan.errors import SubspanError
from subspan.summary import Row, Summary


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
            raise SubspanError("the network is a SubspaceModel already: merge or unwrap it first")
        if not isinstance(net, nn.Module):
            raise SubspanError(f"the network must be a torch.nn.Module, got {type(net).__name__}")
        targets, exclude, train_fully = _plain(targets), _plain(exclude), _plain(train_fully)
        places = slots.slots(net)
        names = slots.aliases(places)
        tensors = {name: net.get_parameter(name) for name in names}
        fully = select(names, train_fully, "train_fully")
        sizes = slots.trained(tensors, names, targets, exclude, fully)
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
            "compartments": compartments if isinstance(compartments, str) else _pairs(compartments),
            "allocation": allocation,
            "targets": targets,
            "exclude": exclude,
            "train_fully": train_fully,
            "seed": seed,
        }
        self.init_seed: int | None = None

        self._places = tuple(slot for slot in places if slot.tensor not in fully)
        self._fully = tuple(sorted(fully))
        self._order = slots.parameter_order(net)
        self._requires_grad = {name: tensor.requires_grad for name, tensor in tensors.items()}
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in net.modules())
        self._calls = calls.plan(self.compartments, self.projections)
        self._step = torch.tensor(0)
        self._ranks_checked = True
        self._graph_checked = False

        base = {name: tensor for name, tensor in tensors.items() if name not in fully}
        buffers = slots.saved_buffers(net)
        self.base_buffers = {name: slots.digest({name: b}) for name, b in buffers.items()}
        self.base_fingerprint = slots.digest(base | buffers)
        self.layout = calls.layout(self.compartments, projection, seed, options)
        digits = list(bytes.fromhex(self.base_fingerprint + self.layout))
        self.register_buffer("fingerprint", torch.tensor(digits, dtype=torch.uint8))

        # From here on nothing can fail, and the network changes.
        some = tensors[next(iter(sizes))]
        dtype = torch.float64 if some.dtype == torch.float64 else torch.float32
        self.coordinates = nn.ParameterDict()
        for part in self.compartments:
            w = torch.zeros(part.dim, device=some.device, dtype=dtype)
            self.coordinates[calls.key(part.name)] = nn.Parameter(w)
        for name in fully:
            tensors[name].requires_grad_(True)
        slots.hollow(net, self._places)
        self.body = net
        self.register_load_state_dict_pre_hook(_refuse_other_model)
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

    # ---- the forward pass ------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """θ of every tensor that is not trained fully, by name; differentiable in w."""
        thetas = self._base()
        begun: list[Tensor] = []
        for call in self._calls:
            w = self.coordinates[call.coordinates]
            bases = [
                base if len(piece) == base.numel() else base.reshape(-1)[piece.start : piece.stop]
                for piece in call.pieces
                for base in (thetas[piece.tensor],)
            ]
            for piece, part in zip(
                call.pieces, calls.theta(w, self._step, call, bases), strict=True
            ):
                whole = thetas[piece.tensor]
                if len(piece) == whole.numel():
                    thetas[piece.tensor] = part
                    continue
                begun.append(part)  # compartments share this tensor
                if piece.stop == whole.numel():
                    thetas[piece.tensor] = torch.cat(begun).view(whole.shape)
                    begun.clear()
        return thetas

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network at θ₀ + P w; arguments and results are the network's own."""
        return self._call("forward", args, kwargs)

    def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A method of the network with θ in its slots."""
        eager = not torch.compiler.is_compiling()
        if eager and not self._ranks_checked:
            self._check_ranks()
        base = self._base()
        slots.swap(self.body, self._places, self.weights())
        try:
            # The network itself and not its ``forward``, which would pass its hooks by.
            run = self.body if method == "forward" else getattr(self.body, method)
            out = run(*args, **kwargs)
        finally:
            slots.swap(self.body, self._places, base)
            if self._recurrent:
                slots.forget_flat_weights(self.body)
        if eager and not self._graph_checked and torch.is_grad_enabled():
            calls.refuse_reentrant_checkpoints((args, kwargs), out)
            self._graph_checked = True
        return out

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """θ₀ stays where it is: DDP, which asks here, must not send it with every batch.

        What DDP does send first is rank 0's fingerprint; the next call compares it with our own.
        """
        self._ranks_checked = False
        prefixes = ("body", "_orig_mod.body")  # the second if it was compiled first
        return [f"{prefix}.{slot.path}" for prefix in prefixes for slot in self._places]

    def _check_ranks(self) -> None:
        if different := self._difference(self.fingerprint):
            raise SubspanError(
                f"{different} of this process differ from those of rank 0: build the model from "
                "the same seed or file and with the same options on every rank"
            )
        self._ranks_checked = True

    def _difference(self, fingerprint: Tensor) -> str:
        """What makes coordinates under another fingerprint meaningless here; empty if nothing."""
        theirs = bytes(fingerprint.tolist()).hex()
        if theirs[:32] != self.base_fingerprint:
            return "the initial weights"
        return "the projection or its compartments" if theirs[32:] != self.layout else ""

    # ---- the network inside ----------------------------------------------------------------------

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """An ordinary network with the weights θ₀ + P w; this model is left as it is."""
        theta = {name: tensor.clone() for name, tensor in self.weights().items()}
        return self._filled(copy.deepcopy(self.body), theta)

    def unwrap(self) -> nn.Module:
        """The network that was wrapped, at θ₀ exactly; this model cannot be used any more.

        What was trained fully, and buffers, keep what training made of them.
        """
        return self._filled(self.body, self._base())

    def _base(self) -> dict[str, Tensor]:
        """θ₀ of every tensor that is not trained fully, by name."""
        return slots.base(self.body, self._places)

    def _filled(self, net: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        for name in self._fully:
            net.get_parameter(name).requires_grad_(self._requires_grad[name])
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
        was = self.base_buffers
        return {name: b for name, b in buffers.items() if slots.digest({name: b}) != was.get(name)}

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
        """Print the counts in one line, as PEFT does: "all" are the weights of the network."""
        print(self.summary().line())

    # ---- what makes the wrapper transparent ------------------------------------------------------

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

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._take_signature()


def _pairs(rules: Mapping[str, int] | Sequence[tuple[str, int]]) -> list[list[Any]]:
    """Rules as JSON that keeps their order: the first that matches counts."""
    return [list(rule) for rule in (rules.items() if isinstance(rules, Mapping) else rules)]


def _plain(patterns: Patterns) -> str | list[str] | None:
    return patterns if isinstance(patterns, str | None) else list(patterns)


def _refuse_other_model(
    model: SubspaceModel, state: Mapping[str, Tensor], prefix: str, *_: Any
) -> None:
    """Coordinates mean nothing on another θ₀ or along other directions."""
    theirs = state.get(prefix + "fingerprint")
    if theirs is not None and (different := model._difference(theirs)):
        raise SubspanError(
            f"{different} of the model that this state_dict comes from differ from this model's: "
            "build it from the same initial weights and with the same options"
        )
