"""The life of θ: what a call of the network keeps, and what the backward pass forms again.

θ of a network of up to KEPT weights is formed once for each call, small tensors together. Of a
larger one, each tensor is formed when it is read and dropped after the operator that used it; what
autograd would keep of it for the backward pass is how it was formed, and there it is formed again.
So the peak is θ₀, the largest tensor's θ and gradient, and the activations. Two things cost little
memory and save time: small tensors of a large network are formed together and kept, and autograd
gets the first θ as they are, up to as many weights as the largest tensor has.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from subspan.errors import SubspanError
from subspan.families.operator import transformed
from subspan.subspace import forming
from subspan.subspace.at_base import is_at_base
from subspan.subspace.blocks import Block
from subspan.subspace.functions import address_of, ordinary_tensors, uncounted
from subspan.subspace.held import held_by
from subspan.subspace.quantised import QuantisedTensor, dense

if TYPE_CHECKING:
    from subspan.subspace.network import Network
    from subspan.subspace.weights import Weights

# Coordinates, which redraw, the block, and θ₀ as it is stored.
Part = tuple[Tensor, Tensor, Block, Tensor | QuantisedTensor]

KEPT = 1 << 22  # weights whose θ is kept during a call

now = threading.local()  # .calls: of every network that is being called in this thread

_level = torch._C._functorch.maybe_current_level


def version_of(tensor: Tensor | QuantisedTensor) -> Any:
    """Return how often a tensor was changed in place; −1 of one that does not count."""
    if isinstance(tensor, QuantisedTensor):
        return tensor.version
    return -1 if tensor.is_inference() else tensor._version


@dataclass(eq=False)
class Formed:
    """θ of a block or of a tensor, what it was formed from; its names, versions and sums."""

    coordinates: Sequence[Tensor]
    state: tuple[Any, ...]
    thetas: Sequence[Tensor]
    marks: Sequence[tuple[str, int, Tensor | None]]

    def check_unwritten(self) -> None:
        """Refuse a forward that writes to its own weights: computed ones would not keep it."""
        for theta, (name, version, was) in zip(self.thetas, self.marks, strict=True):
            unwritten = version_of(theta) == version
            if was is not None and (now := _sum(theta)) is not None:
                unwritten &= torch.allclose(now, was, rtol=0, atol=0, equal_nan=True)
            if not unwritten:
                raise SubspanError(
                    f"the network changed a weight of its own during a call ({name}), which is "
                    "computed from coordinates and would not keep that: exclude it"
                )


def _sum(theta: Tensor) -> Tensor | None:
    """Return the sum of θ, which a write through ``.data`` changes, as it does no version.

    None of a tensor without numbers, and where an operator would be recorded.
    """
    if type(theta) is not Tensor or theta.is_meta or torch._C._is_tracing():
        return None
    with uncounted():
        return theta.detach().sum(dtype=torch.promote_types(theta.dtype, torch.float32))


class Lent:
    """θ among a part's parameters(), which a function of autograd may have been given.

    If it runs the part again in its backward pass, to ask for gradients of what it was given (the
    adjoint of an ODE does), the part must read that once more.
    """

    def __init__(self) -> None:
        self.thetas: dict[str, list[weakref.ref[Tensor]]] = {}

    def __reduce__(self) -> Any:
        return Lent, ()

    def add(self, tensor: str, theta: Tensor) -> None:
        """Note θ of a tensor."""
        if theta.grad_fn is not None and _level() is None:
            before = [other for other in self.alive(tensor) if other is not theta]
            self.thetas[tensor] = [weakref.ref(other) for other in (*before, theta)]

    def alive(self, tensor: str) -> list[Tensor]:
        """Return all θ of a tensor that somebody holds on to."""
        found = [reference() for reference in self.thetas.get(tensor, ())]
        return [theta for theta in found if theta is not None]

    def find(self, tensor: str) -> Tensor | None:
        """Return θ of a tensor that the function whose backward pass runs was given."""
        if (node := torch._C._current_autograd_node()) is None:
            return None
        given = node.next_functions
        return next((t for t in self.alive(tensor) if (t.grad_fn, t.output_nr) in given), None)


class Outermost:
    """A call of a network that is not inside another call of it.

    It keeps the latest θ that were formed, of KEPT weights together or the last alone, and θ of
    small tensors to its end. Sums of θ are compared in the first call in each mode alone, since
    they take time; a forward that writes to its weights does so then.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights, self.level = weights, _level()
        self.mode = weights.root.training
        self.first = self.level is None and self.mode not in weights.modes
        self.bases = given_bases(weights)  # among which may be another θ₀
        self.formed: dict[Any, Formed] = {}  # oldest first
        self.passing: dict[Any, int] = {}  # weights of those that are dropped for others
        # How θ was formed, by its address, where autograd is asked to save that.
        self.formulas: dict[int, tuple[weakref.ref[Tensor], Formula]] | None = None
        self._spared_places = set[int]()
        self._seen: list[tuple[weakref.ref[Tensor], str]] = []  # all θ of a first call, with names
        self.spare = 0 if weights.shards is not None else min(weights.largest, 4 * KEPT)

    def get(self, key: Any, state: tuple[Any, ...]) -> Sequence[Tensor] | None:
        """θ that was formed from the same things, or None."""
        formed = self.formed.get(key)
        return formed.thetas if formed is not None and formed.state == state else None

    def drop(self, key: Any) -> None:
        """Drop θ under a key, if there is one."""
        if key in self.formed:
            self.passing.pop(key, None)
            self.formed.pop(key).check_unwritten()

    def drop_converted(self, tensors: Collection[str]) -> None:
        """Drop θ of tensors whose θ₀ a forward has converted or moved since θ was formed."""
        for key, formed in list(self.formed.items()):
            for theta, (name, *_) in zip(formed.thetas, formed.marks, strict=True):
                base = self.weights.base_of(name) if name in tensors else theta
                if (theta.dtype, theta.device) != (base.dtype, base.device):
                    self.drop(key)
                    break

    def make_room(self, key: Any, size: int) -> None:
        """Drop θ under a key, and the oldest that pass until ``size`` weights more may be kept."""
        self.drop(key)
        while self.passing and sum(self.passing.values()) + size > KEPT:
            self.drop(next(iter(self.passing)))

    def keep(
        self,
        key: Any,
        coordinates: Sequence[Tensor],
        state: tuple[Any, ...],
        thetas: Sequence[Tensor],
        names: Sequence[str],
    ) -> None:
        """Keep θ until the end of the call, or until there is no room.

        The key is that of a group of blocks, or a tensor. ``coordinates`` live as long as θ, so
        that the state, of what they were and in which mode, may name them by their identity.
        """
        sums = [_sum(theta) if self.first else None for theta in thetas]
        marks = list(zip(names, map(version_of, thetas), sums, strict=True))
        self.formed[key] = Formed(coordinates, state, thetas, marks)
        if self.first:
            self._seen += zip(map(weakref.ref, thetas), names, strict=True)

    def find_kept(self) -> Iterator[tuple[Tensor, str]]:
        """Yield what modules keep of θ at the end of a first call, with the names of the tensors.

        It may be θ or a view of it, in an attribute or in what that holds.
        """
        seen = ((reference(), name) for reference, name in self._seen)
        names = {address_of(theta): name for theta, name in seen if type(theta) is Tensor}
        for module in self.weights.root.modules():
            for kept in held_by(module):
                if type(kept) is Tensor and (name := names.get(address_of(kept) or -1)):
                    yield kept, name

    def check_unwritten(self) -> None:
        """See :meth:`Formed.check_unwritten`."""
        for formed in self.formed.values():
            formed.check_unwritten()

    def remember(self, theta: Tensor, tensor: str, parts: Sequence[Part]) -> None:
        """Remember what θ of a tensor, or of a slice of it, was formed from while it lives."""
        if self.formulas is not None:
            formula = Formula.of(tensor, parts, theta.dtype)
            self.formulas[theta.untyped_storage().data_ptr()] = weakref.ref(theta), formula

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Have autograd save how θ was formed in its place, where a graph is made and it can.

        A network that itself uses transforms of torch.func is refused, as PyTorch refuses them
        where tensors are saved in another way.
        """
        enabled = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
        graph = torch.is_grad_enabled() and not is_at_base(self.weights)  # of θ
        if not enabled or not graph or transformed():
            yield
            return
        self.formulas = {}
        around = torch._C._autograd._top_saved_tensors_default_hooks(True)

        def pack(tensor: Tensor) -> Callable[[], Tensor]:
            if (formula := self._formula(tensor)) and not self._spared(tensor, formula.name):
                where = tensor.size(), tensor.stride(), tensor.storage_offset()
                return partial(_view_again, formula, where)
            if around is not None:
                pack_other, unpack_other = around
                return partial(unpack_other, pack_other(tensor))
            return partial(_unwritten, tensor, version_of(tensor))

        try:
            with saved_tensors_hooks(pack, operator.call):
                yield
        except RuntimeError as error:
            if "support saved tensor hooks" not in str(error):
                raise
            raise SubspanError(
                "the network uses torch.func inside of its forward, and PyTorch refuses that where "
                "the weights of a large network are formed again in the backward pass: call it "
                "inside of torch.autograd.graph.disable_saved_tensors_hooks(''), which keeps them"
            ) from error

    def _spared(self, theta: Tensor, tensor: str) -> bool:
        """Return whether autograd gets θ as it is: while there is room, and where it is lent."""
        if any(theta is lent for lent in self.weights.lent.alive(tensor)):
            return True
        place = theta.untyped_storage().data_ptr()
        if place not in self._spared_places:
            if theta.numel() > self.spare:
                return False
            self.spare -= theta.numel()
            self._spared_places.add(place)
        return True

    def _formula(self, tensor: Tensor) -> Formula | None:
        """Return the formula of a tensor that is θ or a view of it, else None."""
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or _level() is not None:
            return None
        assert self.formulas is not None
        theta, formula = self.formulas.get(address_of(tensor), (None, None))
        alive = None if theta is None else theta()
        return formula if alive is not None and alive.dtype == tensor.dtype else None


def given_bases(weights: Weights) -> dict[str, Tensor]:
    """Return the contents of all slots where a functional call has given coordinates."""
    ordinary = all(isinstance(w, torch.nn.Parameter) for w in weights.coordinates().values())
    return {} if ordinary else {tensor: weights.base_of(tensor) for tensor in weights.homes}


def find_call(weights: Network) -> Outermost | None:
    """Return the call of a network that is under way in this thread."""
    for outer in reversed(now.__dict__.get("calls", ())):
        if outer.weights is weights:
            return outer
    return None


@dataclass(frozen=True)
class Formula:
    """Holds what θ of a tensor was formed from, to form it again."""

    name: str
    parts: tuple[Part, ...]
    dtype: torch.dtype
    versions: tuple[Any, ...]

    @classmethod
    def of(cls, name: str, parts: Sequence[Part], dtype: torch.dtype) -> Formula:
        """Return a formula of the tensors as they are now, whatever gets other data later."""
        with ordinary_tensors():
            own = tuple(
                (w.detach(), step, block, base.detach() if isinstance(base, Tensor) else base)
                for w, step, block, base in parts
            )
        return cls(name, own, dtype, _versions(own))

    @torch.no_grad()
    def again(self) -> Tensor:
        """θ once more, flat.

        Raises:
            RuntimeError: if the coordinates or θ₀ have been changed, as autograd has it.
        """
        if _versions(self.parts) != self.versions:
            raise RuntimeError(
                f"the coordinates of {self.name}, or its initial weights, were modified by an "
                "inplace operation between forward and backward: its gradient cannot be computed"
            )
        with ordinary_tensors():
            for *_, base in self.parts:
                if isinstance(base, Tensor) and freed(base):
                    raise RuntimeError(
                        f"the backward pass needs {self.name}, which is sharded over processes and "
                        "was not gathered for it (set_unshard_in_backward(False), or a part whose "
                        "own call was passed by): let FSDP gather it"
                    )
            parts = []
            for w, step, block, base in self.parts:
                (theta,) = forming.form_values(w, step, [block], [dense(base)], self.dtype)
                parts.append(theta.reshape(-1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def freed(base: Tensor) -> bool:
    """Return whether FSDP has taken the memory of a tensor back."""
    return base.numel() > 0 and not base.untyped_storage().nbytes()


def _versions(parts: Sequence[Part]) -> tuple[Any, ...]:
    return tuple(version_of(tensor) for w, _, _, base in parts for tensor in (w, base))


def _view_again(formula: Formula, where: tuple[Any, Any, Any]) -> Tensor:
    """Form θ that autograd was not given; ``where`` are size, stride and offset of a view."""
    return formula.again().as_strided(*where)


def _unwritten(tensor: Tensor, version: Any) -> Tensor:
    """Return a tensor that autograd has saved, if it has the version that it had then."""
    if version_of(tensor) != version:  # PyTorch does not look where there are hooks
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: {tensor.dtype} of shape {tuple(tensor.shape)} is at version "
            f"{version_of(tensor)}; expected version {version} instead"
        )
    return tensor
