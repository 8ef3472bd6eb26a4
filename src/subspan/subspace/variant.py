"""A variant of a network: other coordinates than its own, in one context.

A context is a thread, or a task of asyncio: each may have another variant of one network, and none
of them touches the network's tensors. Coordinates are read through
:meth:`subspan.subspace.network.Network.coordinate`, and what stands beside them (fully trained
tensors, buffers) through :class:`BesideDescriptor`; both look here first. A compiled graph has an
operator in these places, which looks when it runs, so that all variants share one graph.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from subspan.errors import SubspanError
from subspan.families.registry import from_recipe
from subspan.families.updates import add_
from subspan.subspace.at_base import first_in_context, is_at_base, refuse_running_again
from subspan.subspace.computed import guard_lent
from subspan.subspace.formed import version_of
from subspan.subspace.functions import ordinary_tensors
from subspan.subspace.links import PREFIX, is_exporting, link_of, locate
from subspan.subspace.quantised import dense

if TYPE_CHECKING:
    from subspan.subspace.network import Network
    from subspan.subspace.weights import Weights

KEPT = 1 << 25  # weights of a variant whose θ is kept; the others are formed at each read

_current: ContextVar[tuple[Variant, ...]] = ContextVar("subspan_variants", default=())


@dataclass(eq=False, repr=False)
class Variant:
    """Coordinates of a network, what stands beside them, and θ, which is formed once.

    Coordinates have their names among the network's parameters. Beside them stand fully trained
    tensors and saved buffers. Several threads may use one object.
    """

    rows = 0  # of the batch that each have tensors of their own; 0 where all have the same
    written = False  # whether somebody has changed a tensor of it

    weights: Weights
    name: str | None  # for errors
    coordinates: dict[str, Tensor]
    beside: dict[str, Tensor]

    def __post_init__(self) -> None:
        self._formed: dict[tuple[str, torch.dtype | None], tuple[Tensor, int]] = {}
        self._versions = {name: version_of(tensor) for name, tensor in self.beside.items()}
        self._room = KEPT
        self._own: Mapping[str, Tensor] = {}

    def theta(self, tensor: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return θ of a tensor, formed at the first read; it belongs to this object."""
        kept = self._formed.get((tensor, dtype))
        if kept is not None:
            return kept[0]
        with torch.inference_mode(False), torch.no_grad(), using(self):
            if dtype is None and tensor in self.weights.groups_with:
                thetas = self.weights.form_small()
            else:
                thetas = {tensor: self.weights.form(tensor, dtype)}
        whole = torch._C._functorch.maybe_current_level() is None
        if whole and (self._room >= sum(theta.numel() for theta in thetas.values())):
            for name, theta in thetas.items():
                self._room -= theta.numel()
                self._formed[name, dtype] = theta, version_of(theta)
        return thetas[tensor]

    def follow(self, own: Mapping[str, Tensor]) -> Variant:
        """Take note of the network's own tensors as they are now, in whose place the others are."""
        self._own = own
        return self

    def lend(self, name: str, own: Tensor) -> Tensor:
        """Return what stands beside θ under a name, outside of a call not to write to."""
        tensor = self.beside.get(name)
        if tensor is None or own is not self._own.get(name):  # or given, by a functional call
            return own
        return tensor if self.weights.called() else guard_lent(tensor, name, repr(self.name))

    def lend_all(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors that a part has by name, those of the variant in place of the network's."""
        modules = {name: locate(self.weights.root, name) for name in self.beside}
        names = {id((m._parameters | m._buffers)[a]): name for name, (m, a) in modules.items()}
        for key, own in named:
            yield key, self.lend(names[id(own)], own) if id(own) in names else own

    def check_unwritten(self) -> None:
        """Refuse a forward that has written to what a variant has; θ is then formed anew."""
        formed = list(self._formed.items())
        written = [name for (name, _), (theta, was) in formed if version_of(theta) != was]
        written += [n for n, t in self.beside.items() if version_of(t) != self._versions[n]]
        if written:
            self._formed.clear()
            self.written = True
            raise SubspanError(
                f"the network changed {written[0]} during a call, which a variant would not keep: "
                "variants are for networks that read their weights and buffers only"
            )


class NotByRowError(Exception):
    """A batch of several variants must be divided: rows do not lie where they would.

    The argument says whether that holds for every batch of the network.
    """


class MixedVariant(Variant):
    """Several variants for the rows of one batch: every tensor has the rows as first dimension.

    Members without tensors of their own beside coordinates have ``own``, the network's. ``proven``
    are layers that have had rows as their first dimension, beyond doubt; a variant that ``proves``
    has some of a batch's rows, to find out which layers have them there.
    """

    def __init__(
        self,
        members: Sequence[Variant],
        own: Mapping[str, Tensor],
        proven: set[str],
        proves: bool = False,
    ) -> None:
        weights = members[0].weights
        beside = {
            name: torch.stack([member.beside.get(name, tensor) for member in members])
            for name, tensor in own.items()
        }
        super().__init__(weights, "of a batch", {}, beside)
        self.rows, self.proven, self.proves = len(members), proven, proves
        self._own = own
        self._bases = [row for row, member in enumerate(members) if not member.beside]
        with torch.inference_mode(False), torch.no_grad():
            thetas = _form_rows(weights, [member.coordinates for member in members])
        self._formed = {(name, None): (theta, version_of(theta)) for name, theta in thetas.items()}

    def follow(self, own: Mapping[str, Tensor]) -> MixedVariant:
        """Return the same where rows without tensors of their own have the network's as now."""
        self._own = own
        if not (self._bases and own):
            return self
        now = copy.copy(self)
        now._formed = dict(self._formed)
        now.beside = {name: stacked.clone() for name, stacked in self.beside.items()}
        for name, tensor in own.items():
            now.beside[name][self._bases] = tensor
        now._versions = {name: version_of(tensor) for name, tensor in now.beside.items()}
        return now


def _form_rows(weights: Weights, coordinates: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Form θ of every trained tensor for each of several coordinates, without a graph.

    w stands by its name among the network's parameters. The first dimension of what is returned is
    that of ``coordinates``.
    """
    thetas = {}
    with ordinary_tensors():
        for tensor in weights.blocks_of:
            base = dense(weights.held(tensor)).detach()
            shape = (len(coordinates), *base.shape)
            thetas[tensor] = base.expand(shape).clone(memory_format=torch.contiguous_format)
    for n, ws in enumerate(coordinates):
        rows = {tensor: theta[n].view(-1) for tensor, theta in thetas.items()}
        for block in weights.blocks:
            parts = [rows[piece.tensor][piece.start : piece.stop] for piece in block.pieces]
            w = ws[PREFIX + block.coordinates]
            add_(from_recipe(block.recipe), parts, w, weights.step, block.start)
    return thetas


def split_by_row(weights: Weights, x: Tensor, layer: str) -> Tensor:
    """Divide a layer's input into rows of a mixed batch, (rows, k, m).

    Raises:
        NotByRowError: if its first dimension is another, or if nobody has seen the layer with
            another number of rows: a table of the network's own may be as long.
    """
    variant = find_variant(weights)
    assert isinstance(variant, MixedVariant)
    if x.dim() < 2 or len(x) != variant.rows:
        raise NotByRowError(True)
    if variant.proves and variant.rows not in x.shape[1:-1]:
        variant.proven.add(layer)
    elif not variant.proves and layer not in variant.proven:
        raise NotByRowError(False)
    return x.reshape(variant.rows, -1, x.shape[-1])


@contextmanager
def using(variant: Variant) -> Iterator[None]:
    """Let this context's reads of the network give those of a variant."""
    with first_in_context(_current, variant, f"the use of variant {variant.name!r}"):
        yield


def find_variant(weights: Network) -> Variant | None:
    """Return the variant that a network has in this context; None where it is itself.

    An activation checkpoint and a trace are refused.
    """
    if is_at_base(weights):
        return None
    for variant in _current.get():
        if variant.weights is weights:
            if torch._C._is_tracing():  # a trace follows the network's own coordinates
                raise _refuse_in_use(variant, "traced")
            refuse_running_again("`with variants.use(…)`")
            return variant
    return None


def refuse_in_use(weights: Network, done: str) -> None:
    """Refuse what would mix a variant, if one is in use here, with the network's own tensors."""
    if weights.key and (variant := find_variant(weights)) is not None:
        raise _refuse_in_use(variant, done)


def _refuse_in_use(variant: Variant, done: str) -> SubspanError:
    return SubspanError(
        f"variant {variant.name!r} is in use here, and the network itself would be {done}: leave "
        "`with variants.use(…)` first"
    )


class BesideDescriptor:
    """The descriptor of a fully trained parameter, or of a buffer, of a network with variants."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        own = module._parameters.get(self.attribute, module._buffers.get(self.attribute))
        weights, name = link_of(module).weights, vars(module)[BESIDE].get(self.attribute)
        if own is None or name is None:
            return own
        if torch.compiler.is_compiling():
            return own if module.training else replaced(weights, name, own)
        variant = find_variant(weights)
        return own if variant is None else variant.lend(name, own)

    def __set__(self, module: nn.Module, value: Any) -> None:
        module.__dict__[self.attribute] = value


BESIDE = "_subspan_beside"  # in a module's __dict__: names of such tensors by attribute


def replaced(weights: Network, name: str, own: Tensor) -> Tensor:
    """Return a tensor of the network's own, or in its place that of the variant in use.

    The name of coordinates is that of their parameter.
    """
    if torch.compiler.is_compiling():
        if weights.root.training or is_exporting():
            return own  # variants are not used in training
        return in_use(own, weights.key, name, torch.is_grad_enabled() and own.requires_grad)
    variant = find_variant(weights)
    return own if variant is None else variant.coordinates[name]


# Tags: its result depends on more than its arguments, so that nobody may compute it beforehand.
@torch.library.custom_op(
    "subspan::in_use",
    mutates_args=(),
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)
def in_use(own: Tensor, key: int, name: str, recorded: bool) -> Tensor:
    """Look up a tensor when a compiled graph runs; an operator must not return what others hold."""
    for variant in _current.get():
        if variant.weights.key == key:
            if recorded:
                raise SubspanError(
                    f"variant {variant.name!r} has no gradients, and this compiled network would "
                    "compute some: call it under torch.no_grad()"
                )
            return (variant.coordinates | variant.beside).get(name, own).clone()
    return own.clone()


@in_use.register_fake
def _(own: Tensor, key: int, name: str, recorded: bool) -> Tensor:
    return torch.empty_like(own)


in_use.register_autograd(lambda ctx, grad: (grad, None, None, None))
