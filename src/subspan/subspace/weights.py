"""θ = θ₀ + P w of a network, formed when a weight is read.

There is one object for a network. Modules come to it by :mod:`subspan.subspace.descriptors`; how
long θ lives is :mod:`subspan.subspace.formed`; how it is computed :mod:`subspan.subspace.forming`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import _symbolic_trace as fx

from subspan.errors import SubspanError
from subspan.families.operator import transformed
from subspan.precision import autocast_dtype
from subspan.subspace import formed, forming, quantised
from subspan.subspace.at_base import is_at_base, refuse_running_again
from subspan.subspace.blocks import Block
from subspan.subspace.callers import asked_by_fsdp, asked_by_own_forward
from subspan.subspace.computed import guard_theta
from subspan.subspace.descriptors import refuse_stage
from subspan.subspace.dtensors import home_of, is_shard
from subspan.subspace.formed import Outermost, version_of
from subspan.subspace.functions import ordinary_tensors, uncounted
from subspan.subspace.links import FINGERPRINT, PREFIX, is_exporting
from subspan.subspace.network import Network
from subspan.subspace.quantised import QuantisedTensor
from subspan.subspace.theta0 import OWN, Base
from subspan.subspace.variant import NotByRowError, Variant, find_variant, refuse_in_use

_level = torch._C._functorch.maybe_current_level


class Weights(Network):
    """θ of one network."""

    def call(self, run: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the network, or its ``forward``, as the outermost call if it is that."""
        if torch.compiler.is_compiling():
            if not torch.compiler.is_dynamo_compiling():
                refuse_in_use(self, "exported")
            if self._traced is not None or self.shards is not None or _to_onnx():
                return run(*args, **kwargs)
            self._traced, self._begun = self.all(), formed.given_bases(self)
            try:
                return run(*args, **kwargs)
            finally:
                self._traced, self._begun = None, {}
        if self.changes.wishes:
            self.changes.check_flags()
        if self.shards is not None:
            self.shards.watch()
        if not self.ranks_checked:
            self._check_ranks()
        if self.network()._buffers[FINGERPRINT] is not self._known:
            self._check_given()
        if self.called():
            return run(*args, **kwargs)
        variant = self.variant()
        if variant is not None and self.root.training:
            raise SubspanError(
                f"variant {variant.name!r} is in use here, and nothing of it is trained: leave "
                "`with variants.use(…)` first, or call eval()"
            )
        outer = Outermost(self)
        stack = formed.now.__dict__.setdefault("calls", [])
        stack.append(outer)
        try:
            with outer.saving() if self.large else nullcontext():
                out = run(*args, **kwargs)
            outer.check_unwritten()
            if variant is not None:
                variant.check_unwritten()
            elif outer.first and not is_at_base(self):
                self.modes.add(outer.mode)
                for theta, tensor in outer.find_kept():
                    self._guard(theta, tensor, kept=True)
            if self.changes.wishes:  # which the network has set meanwhile
                self.changes.check_flags()
            return out
        finally:
            stack.pop()
            outer.formed.clear()  # autograd holds on to the hooks, and they to the call

    def read(
        self, tensor: str, dtype: torch.dtype | None = None, own: Tensor | None = None
    ) -> Tensor:
        """Return θ of a tensor to whoever reads it from its module, in ``dtype`` if that is given.

        Only inside of a call, and where weights are formed one by one, can a dtype be given.
        ``own`` is what the module has in its slot, which is the network's unless it is a copy.
        """
        if torch.compiler.is_compiling():
            if (given := self._given(tensor)) is not None:
                return given
            if tensor in self.adapters:
                return self._product(tensor, self.read)
            if _to_onnx():
                return self._constant(tensor)
            return self.form(tensor) if self._traced is None else self._traced[tensor]
        module, attribute = self.homes[tensor]
        base = module._parameters[attribute]
        if own is not None and own is not base:
            raise SubspanError(
                f"{tensor} is read from a module with a tensor of its own there, as one has that "
                "was copied tensor by tensor (clone_module), and would be that of the original: "
                "use copy.deepcopy, or torch.func.functional_call(model, coordinates, x)"
            )
        usual = type(base) is Base and base.home[0] is self and len(vars(base)) == len(OWN)
        special = not usual or tensor in self._renormed
        if special and is_shard(base) and home_of(base) is not None:
            return base if asked_by_fsdp(sys._getframe(2)) else self.form(tensor)  # type: ignore[return-value]
        if special and (given := self._given(tensor)) is not None:
            return given
        if self.lent.thetas and (lent := self.lent.find(tensor)) is not None:
            return lent
        if tensor in self.adapters:
            theta = self._product(tensor, self.read)
            if type(theta) is Tensor and not theta.is_meta and _level() is None:
                if inside := self.called():
                    self.reads.note(tensor, sys._getframe(2))
                self.reads.watch(tensor, theta, inside)
                theta = self._guard(theta, tensor)
            return self._dress(tensor, theta) if special else theta
        variant = self.variant()
        outer = None if is_at_base(self) else formed.find_call(self)
        if outer is not None:
            if outer.first and attribute == "weight":
                self.reads.note(tensor, sys._getframe(2))
            where = self.groups_with.get(tensor, ())
            if variant is not None:
                theta = variant.theta(tensor, dtype)
            elif not where or dtype is not None or self.shards is not None:
                theta = self._keep_passing(tensor, outer, dtype)
            elif len(where) == 1:
                theta = self._keep_group(where[0][0], outer)[where[0][1]]
            else:
                theta = self._join(tensor, [self._keep_group(n, outer)[m] for n, m in where])
            return self._dress(tensor, theta) if special else theta
        self._check_outside(tensor)
        theta = self.form(tensor, dtype) if variant is None else variant.theta(tensor, dtype)
        if type(theta) is not Tensor or theta.is_meta or _level() is not None:
            return theta
        theta = theta if torch._C._is_tracing() else self._guard(theta, tensor)
        return self._dress(tensor, theta) if special else theta

    def _check_outside(self, tensor: str) -> None:
        """Refuse to form θ of a tensor outside of a call where it would be wrong there."""
        if fx._is_fx_tracing_flag:
            raise SubspanError(
                f"{tensor} would be a constant of the graph that torch.fx traces: trace the "
                "merge() of the SubspaceModel"
            )
        refuse_stage(sys._getframe(2))
        if self.changes.wishes:
            self.changes.check_flags()

    def called(self) -> bool:
        """Return whether the network is being called in this thread."""
        return formed.find_call(self) is not None

    def variant(self) -> Variant | None:
        """Return the variant that is in use in this context; none inside of ``at_base()``."""
        return find_variant(self) if self.key else None

    def _guard(self, theta: Tensor, tensor: str, *, kept: bool = False) -> Tensor:
        """Make θ that was read outside of a call, or is kept beyond one, know if it is outdated."""
        marks = vars(self.base_of(tensor))
        if is_at_base(self) or self.variant() is not None:
            return guard_theta(theta, tensor, marks=marks)
        moved = self.adapters[tensor].factors if tensor in self.adapters else (tensor,)
        names = {PREFIX + block.coordinates for each in moved for block in self.blocks_of[each]}

        def now() -> Any:
            own = {} if self.root is None else self.root._parameters
            place = (is_at_base(self), self.variant()) if kept else ()
            return place, [_place(w) for name in names if (w := own.get(name)) is not None]

        return guard_theta(theta, tensor, now, itself=kept, marks=marks)

    def _dress(self, tensor: str, theta: Tensor) -> Tensor:
        """Give θ the attributes that people gave the parameter."""
        base = self.base_of(tensor)
        if type(base) is Base:
            vars(theta).update({k: v for k, v in vars(base).items() if k not in OWN})
        elif self.shards is not None:
            vars(theta).update(self.shards.marks.get(tensor, {}))
        return theta.clone() if tensor in self._renormed and type(theta) is Tensor else theta

    def form(self, tensor: str, dtype: torch.dtype | None = None) -> Tensor:
        """Form θ of one tensor, differentiable in w; inside of ``at_base()`` return θ₀."""
        if is_at_base(self):
            return self._rest(tensor, dtype)
        if tensor in self.adapters:
            return self._product(tensor, self.form)
        if self.shards is not None and is_shard(base := self.base_of(tensor)) and home_of(base):
            return self.shards.theta(tensor)
        parts = [self._theta([block], dtype)[0] for block in self.blocks_of[tensor]]
        return self._join(tensor, parts)

    def all(self) -> dict[str, Tensor]:
        """Form θ of every trained tensor, differentiable in w; or θ₀ as :meth:`form`."""
        # Calls have tensors of modules that are whole at other times.
        if self.shards is not None or is_at_base(self):
            return {tensor: self.form(tensor) for tensor in self.blocks_of}
        return self._form_groups([(block,) for block in self.blocks])

    def form_small(self) -> dict[str, Tensor]:
        """Form θ of the tensors that are formed together."""
        return self._form_groups(self._groups)

    def _form_groups(self, groups: Sequence[Sequence[Block]]) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {}
        for group in groups:
            pieces = [piece for block in group for piece in block.pieces]
            for piece, theta in zip(pieces, self._theta(group), strict=True):
                parts.setdefault(piece.tensor, []).append(theta)
        return {tensor: self._join(tensor, pieces) for tensor, pieces in parts.items()}

    def dense(self) -> dict[str, Tensor]:
        """Form the trained weights of an ordinary network: θ, or W + s B A of factors."""
        thetas = self.all()
        merged = {weight: self._product(weight, thetas.__getitem__) for weight in self.adapters}
        factors = self.factors
        return {name: theta for name, theta in thetas.items() if name not in factors} | merged

    def _product(self, weight: str, read: Callable[[str], Tensor]) -> Tensor:
        """Form W + s B A of a layer with factors, which are read by a function."""
        adapter = self.adapters[weight]
        if is_shard(self.stored(weight)):
            raise SubspanError(
                f"{weight} is sharded and has LoRA factors beside it: it can be read inside of a "
                "call of its module only"
            )
        if (variant := self.variant()) is not None and variant.rows:
            raise NotByRowError(True)  # a weight for each row is none
        with ordinary_tensors():
            base = quantised.dense(self.held(weight))
            # What is recorded runs elsewhere: a frozen base goes there as an ordinary tensor.
            base = base if base.requires_grad else base.detach()
        return adapter.merge(base, *map(read, adapter.factors))

    @torch.no_grad()
    def copied(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters of the ordinary network, one after the other and at θ."""
        formed = self.blocks_of.keys() | self.adapters.keys()
        for name in (name for name in self.requires_grad if name not in self.hidden):
            yield name, self.form(name) if name in formed else self.stored(name)

    def _rest(self, tensor: str, dtype: torch.dtype | None) -> Tensor:
        """Return θ₀ of one tensor, which has no gradient unless it was given with one."""
        refuse_running_again("at_base()")
        with ordinary_tensors():
            base = quantised.dense(self.held(tensor))
            base = base if base.requires_grad else base.detach()
            if tensor in self._renormed:
                base = base.clone()
            return base if dtype is None else base.to(dtype)

    def _join(self, tensor: str, parts: Sequence[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        with uncounted():
            theta = torch.cat([part.reshape(-1) for part in parts]).view(self.held(tensor).shape)
            return forming.with_dense_gradient(theta)

    def _theta(self, group: Sequence[Block], dtype: torch.dtype | None = None) -> Sequence[Tensor]:
        """Form θ of blocks with the same coordinates."""
        w = self.coordinate(group[0].coordinates)
        with ordinary_tensors(), uncounted():
            bases = [
                quantised.dense(self._base(piece)) for block in group for piece in block.pieces
            ]
            return forming.form_theta(w, self.step, group, bases, dtype)

    def _keep_group(self, n: int, outer: Outermost) -> Sequence[Tensor]:
        """Return θ of group n, which is formed once during an outermost call of the network.

        It is formed anew if other coordinates have come into their place, or they have changed, or
        a graph is wanted that was not; and inside a transform that began after the call.
        """
        group = self._groups[n]
        w = self.own_coordinate(group[0].coordinates)
        state = _state(w)
        if (thetas := outer.get(n, state)) is not None:
            return thetas
        outer.drop(n)
        thetas = self._theta(group)
        if _level() == outer.level:
            names = [piece.tensor for block in group for piece in block.pieces]
            outer.keep(n, [w], state, thetas, names)
        return thetas

    def _keep_passing(self, tensor: str, outer: Outermost, dtype: torch.dtype | None) -> Tensor:
        """Return θ of a tensor of a large network, which lives as long as its reader needs it."""
        parts = []
        for block in self.blocks_of[tensor]:
            w = self.own_coordinate(block.coordinates)
            with ordinary_tensors(), uncounted():
                parts.append((w, self.step, block, self._base(block.pieces[0])))
        dtype = dtype or self._autocast(tensor, parts[0][-1])
        state = (*(x for w, *_ in parts for x in _state(w)), dtype)
        if (kept := outer.get(tensor, state)) is not None:
            return kept[0]
        size = sum(len(block.pieces[0]) for block in self.blocks_of[tensor])
        outer.make_room(tensor, size)
        theta = self.form(tensor, dtype)
        if _level() == outer.level and type(theta) is Tensor:
            outer.keep(tensor, [w for w, *_ in parts], state, [theta], [tensor])
            outer.passing[tensor] = theta.numel()
            outer.remember(theta, tensor, parts)
        return theta

    def alone(self, tensor: str, *, outside: bool = False) -> tuple[Tensor, Block, Tensor] | None:
        """Return coordinates, block and θ₀ of a tensor whose θ would be formed alone.

        None if θ is kept, or not formed now from θ₀ as it is; or outside of calls, unless asked.
        """
        own, base, inside = self.blocks_of[tensor], self.base_of(tensor), self.called()
        ordinary = type(base) is Base and base.home[0] is self and tensor not in self.packed
        if not ordinary or len(own) > 1 or base.numel() != len(own[0].pieces[0]):
            return None
        if tensor in self.groups_with or self.shards is not None or is_at_base(self):
            return None
        lent = self.lent.thetas and self.lent.find(tensor) is not None
        if lent or torch._C._is_tracing() or transformed() or not (outside or inside):
            return None
        if not inside:
            self._check_outside(tensor)
        w = self.coordinate(own[0].coordinates)
        ours = type(w) is nn.Parameter or self.variant() is not None
        return (w, own[0], base) if ours else None

    def _autocast(self, tensor: str, base: Tensor | QuantisedTensor) -> torch.dtype | None:
        """Return the dtype to which autocast would cast θ, if its layer's own forward reads it.

        The copy would be what autograd saves, and it is not known as θ.
        """
        module, attribute = self.homes[tensor]
        dtype = autocast_dtype(base.device)
        if attribute != "weight" or dtype is None:
            return None
        reader = sys._getframe(4)  # beyond _keep_passing, read and the descriptor
        casts = asked_by_own_forward(reader, module._subspan_class[0])  # type: ignore[index,arg-type]
        return dtype if casts and base.dtype == torch.float32 else None

    @torch.no_grad()
    def _constant(self, tensor: str) -> Tensor:
        """Return θ as a constant of ONNX, which knows no operator of this library.

        The exporter has put stand-ins into the modules' places; the parameters themselves are kept.
        """
        from torch._subclasses.fake_tensor import unset_fake_temporarily
        from torch.utils._python_dispatch import _disable_current_modes

        with _disable_current_modes(), unset_fake_temporarily(), ordinary_tensors():
            parts: list[Tensor] = []
            for block in self.blocks_of[tensor]:
                (piece,) = block.pieces
                base = self.owned[tensor].detach().reshape(-1)[piece.start : piece.stop]
                w = self.owned[PREFIX + block.coordinates].detach()
                parts.extend(forming.form_theta(w, self.step, [block], [base]))
            return torch.cat(parts).view(self.owned[tensor].shape)


def _state(w: Tensor) -> tuple[Any, ...]:
    """Describe coordinates and modes as they are now."""
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return *_place(w), w.requires_grad, *modes


def _place(w: Tensor) -> tuple[Any, ...]:
    """Describe coordinates as they are now; only the address tells of ``w.data = …``."""
    return id(w), version_of(w), w.data_ptr() if type(w) is nn.Parameter else 0


def _to_onnx() -> bool:
    return is_exporting() and torch.onnx.is_in_onnx_export()
