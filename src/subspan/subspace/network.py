"""A network in a subspace: where its tensors are, its coordinates, its fingerprint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch.utils._python_dispatch import _disable_current_modes

from subspan.errors import SubspanError
from subspan.families import Projection
from subspan.subspace import blocks, formed, quantised
from subspan.subspace.adapted import Adapter
from subspan.subspace.changes import Changes
from subspan.subspace.compartments import Compartment, Piece
from subspan.subspace.dtensors import home_of, is_shard, whole
from subspan.subspace.functions import ordinary_tensors
from subspan.subspace.links import (
    FINGERPRINT,
    PREFIX,
    Link,
    digits_of,
    is_exporting,
    locate,
    missing,
)
from subspan.subspace.parameters import Slot, digest_buffers, digest_tensors
from subspan.subspace.quantised import QuantisedTensor
from subspan.subspace.reads import Reads
from subspan.subspace.sharded import Shards
from subspan.subspace.theta0 import Base
from subspan.subspace.variant import replaced

_ORDINARY = (Tensor, nn.Parameter)


class _Shared(set[str]):
    """Names that a network has in common with its copies."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


@dataclass(eq=False, repr=False)
class Network:
    """A network in a subspace, and what is known of its tensors."""

    root: nn.Module
    compartments: tuple[Compartment, ...]  # of its trained weights
    projections: tuple[Projection, ...]  # of the compartments
    slots: Sequence[Slot]  # of the trained tensors, and of weights that have trained factors
    requires_grad: Mapping[str, bool]  # of every tensor as the network came
    fully: Sequence[str]  # names of tensors that are trained as they are
    kept: Mapping[str, range]  # entries of tensors that stay at θ₀
    fingerprint: str  # of θ₀ and of what coordinates mean, 64 hexadecimal digits
    packed: Mapping[str, str]  # the kinds of all tensors that are quantised, by name
    adapters: Mapping[str, Adapter]  # of layers with factors, by the name of the weight
    meaning: dict[str, Any]  # what the layout's digest holds beside the compartments
    recipe: dict[str, Any]

    def __post_init__(self) -> None:
        root, parts = self.root, self.compartments
        self.coordinate_names = [PREFIX + blocks.parameter_key(part.name) for part in parts]
        self._listed = _Shared(self.fully)
        self.lora: dict[str, Any] = {}  # how the factors were made, for files
        self.wrapped: list[nn.Module] = []  # modules whose class was changed
        self.packing: list[nn.Module] = []  # those that bitsandbytes must not pack anew meanwhile
        self.init_seed: int | None = None
        self.base_buffers = digest_buffers(root)
        sizes = [len(piece) for part in parts for piece in part.pieces]
        self.largest, self.large = max(sizes), sum(sizes) > formed.KEPT
        self.buffer_names = frozenset(self.base_buffers)
        self.step = torch.zeros((), dtype=torch.int64, device="cpu")
        self.ranks_checked = True
        self.modes = set[bool]()  # of training or not, in which the network has been called
        self.lent, self.reads = formed.Lent(), Reads()
        self._known: Tensor | None = None  # the fingerprint's buffer that was compared last
        self.shards: Shards | None = None
        self._traced: dict[str, Tensor] | None = None
        self._begun: dict[str, Tensor] = {}  # as `Outermost.bases`, while it is compiled
        self.changes = Changes(self)
        self.locations = {name: locate(root, name) for name in self.requires_grad}
        self.homes = {slot.tensor: self.locations[slot.tensor] for slot in self.slots}
        # Factors are no weights of an ordinary network: its own methods and parts have W + s B A.
        self.hidden = {
            factor
            for weight, adapter in self.adapters.items()
            if weight in self.homes
            for factor in adapter.factors
        }
        self.owned: dict[str, Tensor] = {}
        # Embeddings that shrink rows in place before a look-up: each read has its own memory.
        self._renormed = {
            slot.tensor
            for slot in self.slots
            if getattr(slot.find(root)[0], "max_norm", None) is not None
        }
        self.lay_out(parts, self.projections)

    def lay_out(
        self, compartments: Sequence[Compartment], projections: Sequence[Projection]
    ) -> None:
        """Take compartments of these weights with their projections, and make blocks of them."""
        self.compartments, self.projections = tuple(compartments), tuple(projections)
        self.blocks = blocks.group_into_blocks(compartments, projections, self.kept)
        self.blocks_of = blocks.split_by_tensor(self.blocks)
        # What is formed together and kept during a call of the network: all, or what is small.
        small = formed.KEPT >> 9
        self._groups = (
            blocks.group_small(self.blocks_of, small) if self.large else [(b,) for b in self.blocks]
        )
        self.groups_with = blocks.find_in_groups(self._groups)

    key = 0  # a number of its own, once the network has variants

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "key"}

    @property
    def has_stand_ins(self) -> bool:
        """Whether the places of its parameters hold others, as those of an exporter."""
        return not isinstance(self.base_of(next(iter(self.homes))), Base)

    @property
    def ready(self) -> bool:
        """Whether the network is whole: not while it is copied or unpickled."""
        return "homes" in vars(self) and "_parameters" in vars(self.root)

    # ---- what is trained ---------------------------------------------------------------------

    @property
    def factors(self) -> set[str]:
        """The names of all LoRA factors."""
        return {name for adapter in self.adapters.values() for name in adapter.factors}

    def lists(self, name: str, p: nn.Parameter) -> bool:
        """Return whether a parameter is listed as one that is trained directly.

        One that was listed stays so, and copies list it, too: a copy that is frozen, or was made
        before the original was unfrozen, is paired with it in order.
        """
        if home_of(p) is not None:
            return False
        if p.requires_grad and name not in self._listed:
            self._listed.add(name)
        return name in self._listed

    def listed(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield coordinates, and what is trained directly.

        All that is trained by now is known before the first of them is used: whoever goes through a
        copy in step with this has the same from there.
        """
        for name in self.requires_grad.keys() - self.homes.keys() - self._listed:
            if (p := self.find(name)) is not None:
                self.lists(name, p)
        own = self.network()._parameters
        yield from ((name, own[name]) for name in self.coordinate_names)  # type: ignore[misc]
        for name, p in nn.Module.named_parameters(self.root):
            if name not in self.coordinate_names and self.lists(name, p):
                yield name, p

    def at_rest(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the keys of parameters that nobody trains: states go without them, as without θ₀.

        A tied one has several.
        """
        found = ((name, self.find(name)) for name in self.requires_grad if name not in self.homes)
        names = {id(p): name for name, p in found if p is not None and not self.lists(name, p)}
        for path, module in self.root.named_modules(remove_duplicate=False):
            for attribute, p in module._parameters.items():
                if id(p) in names:
                    yield (f"{path}.{attribute}" if path else attribute), p

    # ---- tensors -----------------------------------------------------------------------------

    def coordinates(self) -> dict[str, nn.Parameter]:
        """Return w of every compartment, by its key."""
        parameters = self.network()._parameters
        return {name.removeprefix(PREFIX): parameters[name] for name in self.coordinate_names}  # type: ignore[misc]

    def own_coordinate(self, key: str) -> nn.Parameter:
        """Return the network's own w of a compartment."""
        return self.network()._parameters[PREFIX + key]  # type: ignore[return-value]

    def coordinate(self, key: str) -> Tensor:
        """Return w of a compartment: the network's own, or that of the variant in use."""
        own = self.own_coordinate(key)
        return replaced(self, PREFIX + key, own) if self.key else own

    def state(self) -> tuple[Any, ...]:
        """Describe θ₀ as it is now: θ that is kept is right as long as this is the same."""
        with ordinary_tensors():
            bases = [self.base_of(tensor) for tensor in self.homes]
            places = [base.data_ptr() if type(base) is Base else 0 for base in bases]
            return tuple(
                (id(base), formed.version_of(base), base.dtype, place)
                for base, place in zip(bases, places, strict=True)
            )

    def base_of(self, tensor: str) -> Tensor:
        """Return the content of a tensor's slot: θ₀, or what a functional call has put there."""
        module, attribute = self.homes[tensor]
        base = module._parameters[attribute]
        assert base is not None
        return base

    def find(self, name: str) -> nn.Parameter | None:
        """Return the parameter of a name; None if its module has lost it."""
        module, attribute = self.locations[name]
        if attribute not in module._parameters:  # which of TorchScript's has no get()
            return None
        return module._parameters[attribute]

    def stored(self, name: str) -> Tensor:
        """Return the parameter of a name, θ₀ of a trained tensor; refuse one that was taken out."""
        if (parameter := self.find(name)) is None:
            raise missing(name)
        return parameter

    def held(self, name: str) -> Tensor | QuantisedTensor:
        """Return the content of a tensor's slot, of a quantised one with all that belongs to it."""
        p = self.stored(name)
        if name not in self.packed or (type(p) in _ORDINARY and p.is_floating_point()):
            return p  # or a dense one, which a functional call has put there
        like = p if isinstance(p, Base) else self.owned.get(name, p)
        return quantised.read_kind(self.packed[name], p, self.locations[name][0], like)

    def resting(self, name: str) -> Tensor:
        """Return the dense weights of a tensor without P w."""
        return quantised.dense(self.held(name)).detach()

    def network(self) -> nn.Module:
        """Return the network; refuse one that was unwrapped."""
        if self.root is None:
            raise SubspanError(
                "this SubspaceModel was unwrapped, and its network is an ordinary one again: wrap "
                "it anew"
            )
        return self.root

    def _given(self, tensor: str) -> Tensor | None:
        """Return the weight that a functional call, or somebody else, has put into a slot for θ.

        Where coordinates are given, too, what the slot held when the call began is a base: so do
        all parameters together. What comes into it later is a weight.
        """
        base = self.base_of(tensor)
        home, frozen = home_of(base), isinstance(base, nn.Parameter) and not base.requires_grad
        if (home is not None and home[0] is self) or (frozen and is_exporting()):
            return None  # exporters have stand-ins for θ₀
        moved = self.adapters[tensor].factors[0] if tensor in self.adapters else tensor
        names = {PREFIX + block.coordinates for block in self.blocks_of[moved]}
        ours = all(isinstance(self.root._parameters[name], nn.Parameter) for name in names)
        later = ours or base is not self.begun_with(tensor, base)
        return base if later and not is_shard(base) else None

    def begun_with(self, tensor: str, otherwise: Tensor) -> Tensor:
        """Return the content of a tensor's slot when a call with given coordinates began."""
        if torch.compiler.is_compiling():
            return self._begun.get(tensor, otherwise)
        outer = formed.find_call(self)
        return otherwise if outer is None else outer.bases.get(tensor, otherwise)

    def base_or_given(self, tensor: str) -> tuple[Tensor, bool]:
        """Return W of a layer with factors, or what a functional call has put there for its θ."""
        base = self.base_of(tensor)
        if type(base) is Base:
            with ordinary_tensors():
                return base.detach(), False
        return base, self._given(tensor) is not None

    def _base(self, piece: Piece) -> Tensor | QuantisedTensor:
        base = self.base_of(piece.tensor)
        whole = len(piece) == base.numel()
        if whole and type(base) is Base and piece.tensor not in self.packed:  # mostly
            return base
        if piece.tensor in self.packed:
            held = self.held(piece.tensor)
            if isinstance(held, QuantisedTensor):
                return held if len(piece) == held.numel() else held.cut(piece.start, piece.stop)
        given = type(base) is not Base and self._given(piece.tensor) is not None
        if given and not is_exporting():  # where nobody reads what is formed of it
            base = self.begun_with(piece.tensor, self.owned[piece.tensor])
        if is_shard(base):
            raise SubspanError(
                f"{piece.tensor} was spread over processes after the network was wrapped, by "
                "something else than fully_shard, and a subspace needs it whole"
            )
        size = sum(len(block.pieces[0]) for block in self.blocks_of[piece.tensor])
        if base.numel() != size:
            raise SubspanError(
                f"{piece.tensor} has the shape {list(base.shape)} now, and had {size} entries when "
                "the network was wrapped: unwrap() it first, then change it and wrap it again"
            )
        return base if whole else base.reshape(-1)[piece.start : piece.stop]

    def put_back(self, module: nn.Module, link: Link) -> None:
        """Undo the removal of parameters from a module."""
        every: dict[str, Any] = module._parameters | {
            a: self.owned[t] for a, t in link.tensors.items()
        }
        module._parameters.clear()
        module._parameters.update({a: every.pop(a) for a in link.order if a in every} | every)

    def note(self) -> None:
        """Keep hold of the parameters, before an exporter puts stand-ins into their places."""
        marks = {} if self.shards is None else self.shards.marks
        every = {tensor: self.base_of(tensor) for tensor in self.homes if tensor not in marks}
        every |= {name: self.network()._parameters[name] for name in self.coordinate_names}  # type: ignore[misc]
        self.owned |= {
            name: p for name, p in every.items() if isinstance(p, Base) or type(p) is nn.Parameter
        }

    # ---- fingerprint and other processes -----------------------------------------------------

    def difference(self, fingerprint: Tensor, base: bool = True) -> str:
        """Name what makes coordinates under another fingerprint meaningless here, or return "".

        Without ``base`` θ₀ may be another one.
        """
        theirs = bytes(int(digit) % 256 for digit in fingerprint.double().round().tolist()).hex()
        if base and theirs[:32] != self.fingerprint[:32]:
            return "the initial weights"
        if theirs[32:] == self.fingerprint[32:]:
            return ""
        if "fixed_matrices" in self.meaning:
            return "the projection, its compartments or the fixed matrices of layers"
        return "the projection or its compartments"

    def _check_ranks(self) -> None:
        if self.shards is not None:
            self.shards.check_ranks()
        elif different := self.difference(self.root._buffers[FINGERPRINT]):  # type: ignore[arg-type]
            raise SubspanError(
                f"{different} of this process differ from those of rank 0: build the model from "
                "the same seed or file and with the same options on every rank"
            )
        self.ranks_checked = True

    def _check_given(self) -> None:
        """Refuse a call with another model's coordinates, whose buffers a functional call has put.

        A batch of models (``torch.func.stack_module_state``) brings a fingerprint for each.
        """
        number: Any = self.root._buffers[FINGERPRINT]
        rows = number
        with _disable_current_modes():
            while functorch.is_functorch_wrapped_tensor(rows):
                dim, rows = functorch.maybe_get_bdim(rows), functorch.get_unwrapped(rows)
                rows = rows.movedim(dim, 0) if dim >= 0 else rows
            if type(rows) not in _ORDINARY or rows.is_meta:  # an exporter's stand-in
                return
            base = any(home_of(self.base_of(tensor)) for tensor in self.homes)  # θ₀ is not given
            rows = rows.reshape(-1, len(self.fingerprint) // 2)
            found = {self.difference(row, base) for row in rows}
        if different := max(found):
            raise SubspanError(
                f"{different} of the models whose coordinates and buffers this call is given "
                "differ from this model's, by which it would compute them all: call each by "
                "itself, or make them of copies of one network and with the same options"
            )
        if not functorch.is_functorch_wrapped_tensor(number):
            self._known = number

    def parameters_digest(self) -> str:
        """Return a digest of θ₀ without buffers."""
        if self.shards is not None and self.shards.digest is not None:
            return self.shards.digest
        names = [name for name in self.requires_grad if name not in self.fully]
        with ordinary_tensors():
            return digest_tensors(
                {
                    name: self.held(name) if name in self.packed else whole(self.stored(name))
                    for name in names
                }
            )

    @torch.no_grad()
    def take_fingerprint(self, base: str = "", layout: str = "") -> None:
        """Take another digest of θ₀, or of what coordinates mean, into the network's buffer."""
        self.fingerprint = (base or self.fingerprint[:32]) + (layout or self.fingerprint[32:])
        number = self.root.get_buffer(FINGERPRINT)
        number.copy_(number.new_tensor(digits_of(self.fingerprint)))

    def for_ddp(self, prefix: str) -> list[str]:
        """Names that DDP must not send with every batch; the next call then compares ranks.

        What DDP does send first is rank 0's fingerprint.
        """
        self.ranks_checked = False
        before = [f"{compiled}{prefix}" for compiled in ("", "_orig_mod.")]
        return [f"{start}{slot.path}" for start in before for slot in self.slots]
