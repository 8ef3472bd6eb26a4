"""The weights of a network that is trained in a subspace: θ = θ₀ + P w, formed when it is read.

One object for a network: it knows which weights have which coordinates, takes the network over and
gives it back, and forms θ. How modules come to ask it is :mod:`subspan.subspace.inplace`; what it
notices of other people's changes :mod:`subspan.subspace.changes`; states to load are
:mod:`subspan.subspace.states`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import _symbolic_trace as fx

from subspan.errors import SubspanError
from subspan.families import Projection
from subspan.subspace import formed, forming, quantised, states
from subspan.subspace.blocks import Block, group_into_blocks, parameter_key
from subspan.subspace.changes import Changes, watch_optimizers
from subspan.subspace.compartments import Compartment, Piece
from subspan.subspace.formed import Formula, Outermost, version_of
from subspan.subspace.guards import OWN, Base, freeze, guarded, thaw
from subspan.subspace.inplace import FINGERPRINT, LINK, PREFIX, Link, made
from subspan.subspace.parameters import Slot, digest_tensors, saved_buffers
from subspan.subspace.quantised import Stored
from subspan.subspace.sharded import Shards, asked_by_fsdp, home_of, is_shard, refuse_whole, whole

_now = threading.local()  # .calls: of every network that is being called in this thread
_plain = torch._C.DisableTorchFunctionSubclass
_level = torch._C._functorch.maybe_current_level
_ORDINARY = (Tensor, nn.Parameter)

_CAST = {  # forwards that use their weight in autocast's precision only
    kind.forward.__code__ for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
}


class Weights:
    """θ of one network.

    Args:
        root: the network.
        compartments: of its trained weights.
        projections: of the compartments.
        places: slots of the trained tensors.
        requires_grad: of every tensor as the network came.
        fully: names of tensors that are trained as they are.
        kept: entries of tensors that stay at θ₀, as for :func:`group_into_blocks`.
        fingerprint: of θ₀ and of what coordinates mean, 64 hexadecimal digits.
        packed: the kinds of all tensors that are quantised, by name.
    """

    def __init__(
        self,
        root: nn.Module,
        compartments: Sequence[Compartment],
        projections: Sequence[Projection],
        places: Sequence[Slot],
        requires_grad: Mapping[str, bool],
        fully: Iterable[str],
        kept: Mapping[str, range],
        fingerprint: str,
        packed: Mapping[str, str],
    ) -> None:
        self.root, self.compartments = root, tuple(compartments)
        self.projections, self.slots = tuple(projections), tuple(places)
        self.requires_grad, self.fingerprint = dict(requires_grad), fingerprint
        self.kept, self.packed = dict(kept), dict(packed)
        self.blocks = group_into_blocks(compartments, projections, kept)
        self.coordinate_names = [PREFIX + parameter_key(part.name) for part in self.compartments]
        self.fully = tuple(sorted(fully))
        self.recipe: dict[str, Any] = {}
        self._packing: list[nn.Module] = []
        self.init_seed: int | None = None
        self.base_buffers = {
            name: digest_tensors({name: b}) for name, b in saved_buffers(root).items()
        }
        sizes = [len(piece) for part in self.compartments for piece in part.pieces]
        self.largest, self.large = max(sizes), sum(sizes) > formed.KEPT
        self.buffer_names = frozenset(self.base_buffers)
        self.step = torch.zeros((), dtype=torch.int64, device="cpu")
        self.ranks_checked = True
        self.shards: Shards | None = None
        self._traced: dict[str, Tensor] | None = None
        self.changes = Changes(self)
        self.found = {name: _home(root, name) for name in requires_grad}
        self.homes = {slot.tensor: self.found[slot.tensor] for slot in places}
        self._owned: dict[str, Tensor] = {}
        # Embeddings that shrink rows in place before a look-up: each read has its own memory.
        self._renormed = {
            slot.tensor
            for slot in places
            if getattr(slot.find(root)[0], "max_norm", None) is not None
        }
        # Where the pieces of a tensor are among all blocks, and blocks for this tensor alone.
        self._where: dict[str, list[tuple[int, int]]] = {}
        self._alone: dict[str, list[Block]] = {}
        for n, block in enumerate(self.blocks):
            start = block.start
            for m, (piece, own) in enumerate(zip(block.pieces, block.kept, strict=True)):
                one = replace(
                    block, start=start, stop=start + len(piece), pieces=(piece,), kept=(own,)
                )
                self._where.setdefault(piece.tensor, []).append((n, m))
                self._alone.setdefault(piece.tensor, []).append(one)
                start += len(piece)
        # What is formed together and kept during a call of the network: all, or what is small.
        self._groups: list[tuple[Block, ...]] = [(block,) for block in self.blocks]
        self._groups_with = self._where
        if self.large:
            self._groups, self._groups_with = self._small()

    def _small(self) -> tuple[list[tuple[Block, ...]], dict[str, list[tuple[int, int]]]]:
        """Groups of the blocks for small tensors, and where in them a tensor is."""
        groups: dict[str, list[Block]] = {}
        for own in self._alone.values():
            if sum(len(block.pieces[0]) for block in own) <= formed.KEPT >> 9:
                for block in own:
                    groups.setdefault(block.coordinates, []).append(block)
        places: dict[str, list[tuple[int, int]]] = {}
        for n, group in enumerate(groups.values()):
            for m, block in enumerate(group):
                places.setdefault(block.pieces[0].tensor, []).append((n, m))
        return [tuple(group) for group in groups.values()], places

    # ---- taking a network over, and giving it back -------------------------------------------

    def attach(self) -> None:
        """Give the network's modules their classes, and the network its coordinates.

        Raises:
            SubspanError: if a module cannot have another class; the network is then untouched.
        """
        root, inside = self.root, dict[nn.Module, dict[str, str]]()
        for slot in self.slots:
            module, attribute = slot.find(root)
            inside.setdefault(module, {})[attribute] = slot.tensor
        above = [
            module for module in root.modules() if any(part in inside for part in module.modules())
        ]
        self._parts: list[nn.Module] = []
        for module in above:
            names = tuple(inside.get(module, ()))
            try:
                module.__class__ = made(type(module), names, module is root)
            except Exception as error:  # a class may refuse to be derived from in its own words
                for done in self._parts:
                    done.__class__ = done._subspan_class[0]  # type: ignore[assignment,index]
                name = next(n for n, m in root.named_modules() if m is module)
                raise SubspanError(
                    f"module {name or 'the network'} is a {type(module).__name__}, whose weights "
                    f"cannot be computed in place ({error}): exclude it"
                ) from None
            self._parts.append(module)
        for module in above:
            module.__dict__[LINK] = Link(self, inside.get(module, {}), list(module._parameters))
            if isinstance(module, nn.RNNBase):
                module.__dict__.pop("_flat_weights", None)
                module.__dict__["_flat_weight_refs"] = [None] * len(module._flat_weights_names)
        for name in self.requires_grad:
            self.stored(name).requires_grad_(name in self.fully)
        for tensor, (module, attribute) in self.homes.items():
            freeze(module._parameters[attribute], self, tensor)
        like = self.base_of(self.compartments[0].pieces[0].tensor)
        with torch.inference_mode(False), torch.no_grad():
            dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
            for name, part in zip(self.coordinate_names, self.compartments, strict=True):
                w = torch.zeros(part.dim, device=like.device, dtype=dtype)
                nn.Module.register_parameter(root, name, nn.Parameter(w))
            digits = list(bytes.fromhex(self.fingerprint))
            # Small integers as floats: the mean of equal ones is the same again.
            number = torch.tensor(digits, dtype=torch.float32, device=like.device)
            root.register_buffer(FINGERPRINT, number)
        if root.get_buffer(FINGERPRINT).device != like.device:
            self.detach()
            raise SubspanError(
                "parameters that are made here go to another device (by init_empty_weights of "
                "accelerate, say): wrap the network outside of that context"
            )
        self._packing = quantised.keep_packing(root)
        self.note()
        self.changes.remember(name for name in self.requires_grad if name not in self.fully)
        watch_optimizers()

    def detach(self, values: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Undo :meth:`attach`: ordinary parameters again, at θ₀ or at other values."""
        root = self.network()
        refuse_whole(self, "unwrapped or merged")
        for name in self.coordinate_names:
            del root._parameters[name]
        del root._buffers[FINGERPRINT]
        for module in self._parts:
            if LINK in vars(module):
                del module.__dict__[LINK]
                module.__class__ = module._subspan_class[0]  # type: ignore[assignment,index]
        for tensor, (module, attribute) in self.homes.items():
            parameter = module._parameters.get(attribute)
            if isinstance(parameter, Base) and parameter.home[0] is self:
                if values is not None and tensor in self.packed:
                    self._make_dense(tensor, values[tensor])
                    continue
                with _plain():
                    if values is not None and tensor in values:
                        parameter.data = values[tensor].detach()
                    thaw(parameter)
        for module in self._parts:
            if isinstance(module, nn.RNNBase) and "_flat_weights" not in module.__dict__:
                module._init_flat_weights()
        for name, flag in self.requires_grad.items():
            self.stored(name).requires_grad_(flag)
        quantised.let_pack(self._packing)
        if values is not None and self.packed:
            quantised.unmark(root)
        self.root = None  # type: ignore[assignment]
        return root

    def _make_dense(self, tensor: str, value: Tensor) -> None:
        """Put θ into the places of a quantised tensor, whose layers become ordinary ones."""
        module, attribute = self.homes[tensor]
        found = self.held(tensor)
        assert isinstance(found, Stored)
        dtype = quantised.resting_dtype(module, found, self.root)
        parameter = nn.Parameter(value.detach().to(dtype), False)
        for slot in self.slots:
            if slot.tensor == tensor:
                module, attribute = slot.find(self.root)
                module._parameters[attribute] = parameter
                quantised.plain(module)

    @property
    def ready(self) -> bool:
        """Whether the network is whole: not while it is copied or unpickled."""
        return "homes" in vars(self) and "_parameters" in vars(self.root)

    # ---- forming θ ---------------------------------------------------------------------------

    def coordinates(self) -> dict[str, nn.Parameter]:
        """W of every compartment, by its key."""
        parameters = self.network()._parameters
        return {name.removeprefix(PREFIX): parameters[name] for name in self.coordinate_names}  # type: ignore[misc]

    def base_of(self, tensor: str) -> Tensor:
        """Return the content of a tensor's slot: θ₀, or what a functional call has put there."""
        module, attribute = self.homes[tensor]
        base = module._parameters[attribute]
        assert base is not None
        return base

    def trained(self) -> list[str]:
        """Names of the tensors that are trained in the subspace."""
        return list(self.homes)

    def stored(self, name: str) -> Tensor:
        """The parameter of a name: θ₀ of a trained tensor."""
        module, attribute = self.found[name]
        return module._parameters[attribute]  # type: ignore[return-value]

    def held(self, name: str) -> Tensor | Stored:
        """What is in a tensor's slot, a quantised one with all that belongs to it."""
        p = self.stored(name)
        if name not in self.packed or (type(p) in _ORDINARY and p.is_floating_point()):
            return p  # or a dense one, which a functional call has put there
        like = p if isinstance(p, Base) else self._owned.get(name, p)
        return quantised.known(self.packed[name], p, self.found[name][0], like)

    def resting(self, name: str) -> Tensor:
        """The dense weights of a tensor without P w."""
        return quantised.dense(self.held(name)).detach()

    def network(self) -> nn.Module:
        """The network.

        Raises:
            SubspanError: if it has been unwrapped.
        """
        if self.root is None:
            raise SubspanError(
                "this SubspaceModel was unwrapped, and its network is an ordinary one again: wrap "
                "it anew"
            )
        return self.root

    def call(self, run: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the network, or its ``forward``, as the outermost call if it is that."""
        if torch.compiler.is_compiling():
            if self._traced is not None or self.shards is not None or _to_onnx():
                return run(*args, **kwargs)
            self._traced = self.all()
            try:
                return run(*args, **kwargs)
            finally:
                self._traced = None
        if self.changes.wishes:
            self.changes.check_flags()
        if self.shards is not None:
            self.shards.watch()
        if not self.ranks_checked:
            self._check_ranks()
        stack = _now.__dict__.setdefault("calls", [])
        if stack and any(outer.weights is self for outer in stack):
            return run(*args, **kwargs)
        outer = Outermost(self)
        stack.append(outer)
        try:
            if self.large:
                with outer.saving():
                    out = run(*args, **kwargs)
            else:
                out = run(*args, **kwargs)
            outer.check_unwritten()
            if self.changes.wishes:  # which the network has set meanwhile
                self.changes.check_flags()
            return out
        finally:
            stack.pop()
            outer.formed.clear()  # autograd holds on to the hooks, and they to the call

    def read(self, tensor: str, dtype: torch.dtype | None = None) -> Tensor:
        """θ of a tensor, for whoever reads it from its module; rounded once to ``dtype``, if given.

        Outside of calls, and where weights are not computed one by one, it may have its own.
        """
        if torch.compiler.is_compiling():
            if _to_onnx():
                return self._constant(tensor)
            return self.form(tensor) if self._traced is None else self._traced[tensor]
        module, attribute = self.homes[tensor]
        base = module._parameters[attribute]
        known = type(base) is Base and base.home[0] is self and len(vars(base)) == len(OWN)
        special = not known or tensor in self._renormed
        if special and is_shard(base) and home_of(base) is not None:
            return base if asked_by_fsdp(sys._getframe(2)) else self.form(tensor)  # type: ignore[return-value]
        if special and (given := self._given(tensor)) is not None:
            return given
        for outer in reversed(_now.__dict__.get("calls", ())):
            if outer.weights is self:
                where = self._groups_with.get(tensor, ())
                if not where or dtype is not None or self.shards is not None:
                    theta = self._passing(tensor, outer, dtype)
                elif len(where) == 1:
                    theta = self._kept(where[0][0], outer)[where[0][1]]
                else:
                    parts = [self._kept(n, outer)[m] for n, m in where]
                    theta = self._joined(tensor, parts)
                return self._dressed(tensor, theta) if special else theta
        if fx._is_fx_tracing_flag:
            raise SubspanError(
                f"{tensor} would be a constant of the graph that torch.fx traces: trace the "
                "merge() of the SubspaceModel"
            )
        if self.changes.wishes:
            self.changes.check_flags()
        theta = self.form(tensor, dtype)
        if type(theta) is not Tensor or theta.is_meta or _level() is not None:
            return theta
        theta = theta if torch._C._is_tracing() else guarded(theta, tensor)
        return self._dressed(tensor, theta) if special else theta

    def _given(self, tensor: str) -> Tensor | None:
        """The weight that a functional call, or somebody else, has put into a slot for θ.

        Where coordinates are given, too, the slot holds a base: so do all parameters together.
        """
        base = self.base_of(tensor)
        home = home_of(base)
        if home is not None and home[0] is self:
            return None
        names = {PREFIX + block.coordinates for block in self._alone[tensor]}
        own = all(type(self.root._parameters[name]) is nn.Parameter for name in names)
        return base if own and not is_shard(base) else None

    def _dressed(self, tensor: str, theta: Tensor) -> Tensor:
        """θ with the attributes that people gave the parameter."""
        base = self.base_of(tensor)
        if type(base) is Base:
            vars(theta).update({k: v for k, v in vars(base).items() if k not in OWN})
        elif self.shards is not None:
            vars(theta).update(self.shards.marks.get(tensor, {}))
        return theta.clone() if tensor in self._renormed and type(theta) is Tensor else theta

    def form(self, tensor: str, dtype: torch.dtype | None = None) -> Tensor:
        """θ of one tensor, differentiable in w."""
        if self.shards is not None and is_shard(base := self.base_of(tensor)) and home_of(base):
            return self.shards.theta(tensor)
        parts = [self._theta([block], dtype)[0] for block in self._alone[tensor]]
        return self._joined(tensor, parts)

    def all(self) -> dict[str, Tensor]:
        """θ of every trained tensor, differentiable in w."""
        if self.shards is not None:  # calls have tensors of modules that are whole at other times
            return {tensor: self.form(tensor) for tensor in self._where}
        thetas = [self._theta([block]) for block in self.blocks]
        return {
            tensor: self._joined(tensor, [thetas[n][m] for n, m in where])
            for tensor, where in self._where.items()
        }

    def _joined(self, tensor: str, parts: Sequence[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        theta = torch.cat([part.reshape(-1) for part in parts]).view(self.held(tensor).shape)
        return forming.with_dense_gradient(theta)

    def _theta(self, group: Sequence[Block], dtype: torch.dtype | None = None) -> Sequence[Tensor]:
        """θ of blocks with the same coordinates."""
        w = self.network()._parameters[PREFIX + group[0].coordinates]
        with _plain():
            bases = [
                quantised.dense(self._base(piece)) for block in group for piece in block.pieces
            ]
            return forming.form_theta(w, self.step, group, bases, dtype)  # type: ignore[arg-type]

    def _base(self, piece: Piece) -> Tensor | Stored:
        """θ₀ of a piece of a tensor."""
        base = self.base_of(piece.tensor)
        whole = len(piece) == base.numel()
        if whole and type(base) is Base and piece.tensor not in self.packed:  # mostly
            return base
        if piece.tensor in self.packed:
            found = self.held(piece.tensor)
            if isinstance(found, Stored):
                return found if len(piece) == found.numel() else found.cut(piece.start, piece.stop)
        if type(base) is not Base and self._given(piece.tensor) is not None:
            base = self._owned[piece.tensor]
        if is_shard(base):
            raise SubspanError(
                f"{piece.tensor} was spread over processes after the network was wrapped, by "
                "something else than fully_shard, and a subspace needs it whole"
            )
        return base if whole else base.reshape(-1)[piece.start : piece.stop]

    def _kept(self, n: int, outer: Outermost) -> Sequence[Tensor]:
        """θ of group n, formed once during an outermost call of the network.

        It is formed anew if other coordinates have come into their place, or they have changed, or
        a graph is wanted that was not; and inside a transform that began after the call.
        """
        group = self._groups[n]
        w = self.network()._parameters[PREFIX + group[0].coordinates]
        assert w is not None
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        state = (*_state(w), *modes)
        if (thetas := outer.get(n, state)) is not None:
            return thetas
        outer.drop(n)
        thetas = self._theta(group)
        if _level() == outer.level:
            names = [piece.tensor for block in group for piece in block.pieces]
            outer.keep(n, [w], state, thetas, names)
        return thetas

    def _passing(self, tensor: str, outer: Outermost, dtype: torch.dtype | None) -> Tensor:
        """θ of a tensor of a large network, which lives as long as who has read it needs it."""
        parts = []
        for block in self._alone[tensor]:
            w = self.network()._parameters[PREFIX + block.coordinates]
            assert w is not None
            with _plain():
                parts.append((w, self.step, block, self._base(block.pieces[0])))
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        dtype = dtype or self._autocast(tensor, parts[0][-1])
        state = (*(x for w, *_ in parts for x in _state(w)), dtype, *modes)
        if (known := outer.get(tensor, state)) is not None:
            return known[0]
        size = sum(len(block.pieces[0]) for block in self._alone[tensor])
        outer.make_room(tensor, size)
        theta = self.form(tensor, dtype)
        if _level() == outer.level and type(theta) is Tensor:
            outer.keep(tensor, [w for w, *_ in parts], state, [theta], [tensor])
            outer.passes(tensor, theta, Formula.of(tensor, parts, theta.dtype))
        return theta

    def _autocast(self, tensor: str, base: Tensor | Stored) -> torch.dtype | None:
        """The dtype to which autocast would cast a copy of θ, if its layer's own forward reads it.

        The copy would be what autograd saves, and it is not known as θ.
        """
        module, attribute = self.homes[tensor]
        kind = base.device.type
        casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if attribute != "weight" or not casts:
            return None
        reader = sys._getframe(4).f_code  # beyond _passing, read and the descriptor
        own = reader in _CAST and module._subspan_class[0].forward.__code__ is reader  # type: ignore[union-attr,index]
        return torch.get_autocast_dtype(kind) if own and base.dtype == torch.float32 else None

    def put_back(self, module: nn.Module, link: Link) -> None:
        """Undo the removal of parameters from a module."""
        there: dict[str, Any] = module._parameters | {
            a: self._owned[t] for a, t in link.tensors.items()
        }
        module._parameters.clear()
        module._parameters.update({a: there.pop(a) for a in link.order if a in there} | there)

    def note(self) -> None:
        """Keep hold of the parameters, before an exporter puts stand-ins into their places."""
        marks = {} if self.shards is None else self.shards.marks
        there = {tensor: self.base_of(tensor) for tensor in self.homes if tensor not in marks}
        there |= {name: self.network()._parameters[name] for name in self.coordinate_names}  # type: ignore[misc]
        self._owned |= {
            name: p for name, p in there.items() if isinstance(p, Base) or type(p) is nn.Parameter
        }

    @torch.no_grad()
    def _constant(self, tensor: str) -> Tensor:
        """θ as a number of ONNX, which knows no operator of ours.

        The exporter has put stand-ins into the modules' places; the parameters themselves are kept.
        """
        from torch._subclasses.fake_tensor import unset_fake_temporarily
        from torch.utils._python_dispatch import _disable_current_modes

        with _disable_current_modes(), unset_fake_temporarily(), _plain():
            parts: list[Tensor] = []
            for block in self._alone[tensor]:
                (piece,) = block.pieces
                base = self._owned[tensor].detach().reshape(-1)[piece.start : piece.stop]
                w = self._owned[PREFIX + block.coordinates].detach()
                parts.extend(forming.form_theta(w, self.step, [block], [base]))
            return torch.cat(parts).view(self._owned[tensor].shape)

    # ---- other processes ---------------------------------------------------------------------

    def difference(self, fingerprint: Tensor) -> str:
        """Name what makes coordinates under another fingerprint meaningless here, or return ""."""
        theirs = bytes(int(digit) % 256 for digit in fingerprint.double().round().tolist()).hex()
        if theirs[:32] != self.fingerprint[:32]:
            return "the initial weights"
        return "the projection or its compartments" if theirs[32:] != self.fingerprint[32:] else ""

    def _check_ranks(self) -> None:
        if self.shards is not None:
            self.shards.check_ranks()
        elif different := self.difference(self.root._buffers[FINGERPRINT]):  # type: ignore[arg-type]
            raise SubspanError(
                f"{different} of this process differ from those of rank 0: build the model from "
                "the same seed or file and with the same options on every rank"
            )
        self.ranks_checked = True

    def parameters_digest(self) -> str:
        """A digest of θ₀ without buffers."""
        if self.shards is not None and self.shards.digest is not None:
            return self.shards.digest
        names = [name for name in self.requires_grad if name not in self.fully]
        with _plain():
            return digest_tensors(
                {
                    name: self.held(name) if name in self.packed else whole(self.stored(name))
                    for name in names
                }
            )

    @torch.no_grad()
    def take_fingerprint(self, base: str) -> None:
        """Take θ₀'s digest from a file that has all buffers, which are then stored again."""
        self.fingerprint, self.base_buffers = base + self.fingerprint[32:], {}
        number = self.root.get_buffer(FINGERPRINT)
        number.copy_(torch.tensor(list(bytes.fromhex(self.fingerprint))))

    def before_loading(self, state: dict[str, Any], prefix: str) -> None:
        """See :func:`subspan.subspace.states.before_loading`."""
        states.before_loading(self, state, prefix)

    def for_ddp(self, prefix: str) -> list[str]:
        """Names that DDP must not send with every batch; the next call then compares ranks.

        What DDP does send first is rank 0's fingerprint.
        """
        self.ranks_checked = False
        before = [f"{compiled}{prefix}" for compiled in ("", "_orig_mod.")]
        return [f"{start}{slot.path}" for start in before for slot in self.slots]


def _state(w: Tensor) -> tuple[Any, ...]:
    """What coordinates are now; only their address tells that ``w.data = …`` changed them."""
    place = w.data_ptr() if type(w) is nn.Parameter else 0
    return id(w), version_of(w), w.requires_grad, place


def _to_onnx() -> bool:
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def _home(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module and the attribute at the end of a parameter's path."""
    prefix, _, attribute = path.rpartition(".")
    return root.get_submodule(prefix), attribute
