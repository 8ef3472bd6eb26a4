"""The weights of a network that is trained in a subspace: θ = θ₀ + P w, formed when it is read.

One object for a network: it knows which weights have which coordinates, forms θ, and notices what
has become of θ₀, of flags and of the structure since the network was wrapped. How modules come to
ask it is :mod:`subspan.inplace`.
"""

from __future__ import annotations

import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from subspan import calls, slots
from subspan.calls import Call
from subspan.compartments import Compartment
from subspan.errors import SubspanError
from subspan.families import Projection
from subspan.inplace import FINGERPRINT, LINK, PREFIX, Base, Link, guarded, made

_now = threading.local()  # .calls: of every network that is being called in this thread
_plain = torch._C.DisableTorchFunctionSubclass
_level = torch._C._functorch.maybe_current_level


class Outermost:
    """A call of a network that is not inside another of it: θ that was formed is kept until its end.

    So small tensors are formed together, and a tied weight once.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights, self.level = weights, _level()
        self.formed: dict[int, tuple[tuple[Any, ...], Sequence[Tensor]]] = {}


class Weights:
    """θ of one network.

    Args:
        root: the network.
        compartments: of its trained weights.
        projections: of the compartments.
        places: slots of the trained tensors.
        requires_grad: of every tensor as the network came.
        fully: names of tensors that are trained as they are.
        kept: entries of tensors that stay at θ₀, see :func:`subspan.calls.plan`.
        fingerprint: of θ₀ and of what coordinates mean, 64 hexadecimal digits.
    """

    def __init__(
        self, root: nn.Module, compartments: Sequence[Compartment],
        projections: Sequence[Projection], places: Sequence[slots.Slot],
        requires_grad: Mapping[str, bool], fully: Iterable[str], kept: Mapping[str, range],
        fingerprint: str,
    ) -> None:  # fmt: skip
        self.root, self.compartments = root, tuple(compartments)
        self.projections, self.slots = tuple(projections), tuple(places)
        self.requires_grad, self.fingerprint = dict(requires_grad), fingerprint
        self.kept = dict(kept)
        self.calls = calls.plan(compartments, projections, kept)
        self.coordinate_names = [PREFIX + calls.key(part.name) for part in self.compartments]
        self.fully = tuple(sorted(fully))
        self.recipe: dict[str, Any] = {}
        self.init_seed: int | None = None
        self.base_buffers = {
            name: slots.digest({name: b}) for name, b in slots.saved_buffers(root).items()
        }
        self.step = torch.zeros((), dtype=torch.int64, device="cpu")
        self.ranks_checked = True
        self._traced: dict[str, Tensor] | None = None
        self._wishes: dict[str, bool] = {}
        self._found = {name: _home(root, name) for name in requires_grad}
        self._homes = {slot.tensor: self._found[slot.tensor] for slot in places}
        self._checks: dict[str, tuple[torch.dtype, int] | None] = {}
        self._owned: dict[str, Tensor] = {}
        # Where the pieces of a tensor are among all calls, and calls for this tensor alone.
        self._where: dict[str, list[tuple[int, int]]] = {}
        self._alone: dict[str, list[Call]] = {}
        for n, call in enumerate(self.calls):
            start = call.start
            for m, (piece, own) in enumerate(zip(call.pieces, call.kept, strict=True)):
                one = replace(
                    call, start=start, stop=start + len(piece), pieces=(piece,), kept=(own,)
                )
                self._where.setdefault(piece.tensor, []).append((n, m))
                self._alone.setdefault(piece.tensor, []).append(one)
                start += len(piece)

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
        changed: list[nn.Module] = []
        for module in above:
            names = tuple(inside.get(module, ()))
            try:
                module.__class__ = made(type(module), names, module is root)
            except TypeError as error:
                for done in changed:
                    done.__class__ = done._subspan_class[0]  # type: ignore[assignment,union-attr,index]
                name = next(n for n, m in root.named_modules() if m is module)
                raise SubspanError(
                    f"module {name or 'the network'} is a {type(module).__name__}, whose weights "
                    f"cannot be computed in place ({error}): exclude it"
                ) from None
            changed.append(module)
        for module in above:
            module.__dict__[LINK] = Link(self, inside.get(module, {}), list(module._parameters))
            if isinstance(module, nn.RNNBase):
                module.__dict__.pop("_flat_weights", None)
                module.__dict__["_flat_weight_refs"] = [None] * len(module._flat_weights_names)
        for name in self.requires_grad:
            self.stored(name).requires_grad_(name in self.fully)
        for tensor, (module, attribute) in self._homes.items():
            parameter = module._parameters[attribute]
            assert parameter is not None
            parameter.__class__ = Base
            parameter.home = (self, tensor)  # type: ignore[attr-defined]
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
        self.note()
        self.remember(name for name in self.requires_grad if name not in self.fully)
        _watch_optimizers()

    def detach(self, values: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Undo :meth:`attach`: ordinary parameters again, at θ₀ or at other values."""
        root = self._root()
        for name in self.coordinate_names:
            del root._parameters[name]
        del root._buffers[FINGERPRINT]
        for module in root.modules():
            if LINK in module.__dict__ and module.__dict__[LINK].weights is self:
                del module.__dict__[LINK]
                module.__class__ = module._subspan_class[0]  # type: ignore[assignment,index,union-attr]
        for tensor, (module, attribute) in self._homes.items():
            parameter = module._parameters.get(attribute)
            if type(parameter) is Base:
                with _plain():
                    if values is not None and tensor in values:
                        parameter.data = values[tensor].detach()
                    parameter.__class__ = nn.Parameter
                    del parameter.home  # type: ignore[attr-defined]
        for module in root.modules():
            if isinstance(module, nn.RNNBase) and "_flat_weights" not in module.__dict__:
                module._init_flat_weights()
        for name, flag in self.requires_grad.items():
            self.stored(name).requires_grad_(flag)
        self.root = None  # type: ignore[assignment]
        return root

    @property
    def ready(self) -> bool:
        """Whether the network is whole: not while it is copied or unpickled."""
        return "_homes" in vars(self) and "_parameters" in vars(self.root)

    # ---- forming θ ---------------------------------------------------------------------------

    def coordinates(self) -> dict[str, nn.Parameter]:
        """w of every compartment, by its key."""
        parameters = self._root()._parameters
        return {name.removeprefix(PREFIX): parameters[name] for name in self.coordinate_names}  # type: ignore[misc]

    def base_of(self, tensor: str) -> Tensor:
        """What lies in the slot of a tensor: θ₀, or what a functional call has put there."""
        module, attribute = self._homes[tensor]
        base = module._parameters[attribute]
        assert base is not None
        return base

    def trained(self) -> list[str]:
        """Names of the tensors that are trained in the subspace."""
        return list(self._homes)

    def stored(self, name: str) -> Tensor:
        """The parameter of a name: θ₀ of a trained tensor."""
        module, attribute = self._found[name]
        return module._parameters[attribute]  # type: ignore[return-value]

    def _root(self) -> nn.Module:
        if self.root is None:
            raise SubspanError(
                "this SubspaceModel was unwrapped, and its network is an ordinary one again: wrap "
                "it anew"
            )
        return self.root

    def call(self, run: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the network, or its ``forward``, as the outermost call if it is that."""
        if torch.compiler.is_compiling():
            if self._traced is not None or _to_onnx():
                return run(*args, **kwargs)
            self._traced = self.all()
            try:
                return run(*args, **kwargs)
            finally:
                self._traced = None
        if self._wishes:
            self._check_wishes()
        if not self.ranks_checked:
            self._check_ranks()
        stack = _now.__dict__.setdefault("calls", [])
        if any(outer.weights is self for outer in stack):
            return run(*args, **kwargs)
        stack.append(Outermost(self))
        try:
            return run(*args, **kwargs)
        finally:
            stack.pop()

    def read(self, tensor: str) -> Tensor:
        """θ of a tensor, for whoever reads it from its module."""
        if torch.compiler.is_compiling():
            if _to_onnx():
                return self._constant(tensor)
            return self.form(tensor) if self._traced is None else self._traced[tensor]
        for outer in reversed(_now.__dict__.get("calls", ())):
            if outer.weights is self:
                parts = [self._kept(n, outer)[m] for n, m in self._where[tensor]]
                return parts[0] if len(parts) == 1 else self._joined(tensor, parts)
        if self._wishes:
            self._check_wishes()
        theta = self.form(tensor)
        if type(theta) is not Tensor or theta.is_meta or _level() is not None:
            return theta
        return theta if torch.jit.is_tracing() else guarded(theta, tensor)

    def form(self, tensor: str) -> Tensor:
        """θ of one tensor, differentiable in w."""
        return self._joined(tensor, [self._theta(call)[0] for call in self._alone[tensor]])

    def all(self) -> dict[str, Tensor]:
        """θ of every trained tensor, differentiable in w."""
        calls = [self._theta(call) for call in self.calls]
        return {
            tensor: self._joined(tensor, [calls[n][m] for n, m in where])
            for tensor, where in self._where.items()
        }

    def _joined(self, tensor: str, parts: Sequence[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.reshape(-1) for part in parts]).view(self.base_of(tensor).shape)

    def _theta(self, call: Call) -> Sequence[Tensor]:
        w = self._root()._parameters[PREFIX + call.coordinates]
        with _plain():
            bases = []
            for piece in call.pieces:
                base = self.base_of(piece.tensor)
                if torch.compiler.is_compiling() and type(base) is Base:
                    base = base.detach()  # the graph runs without this context
                whole = len(piece) == base.numel()
                bases.append(base if whole else base.reshape(-1)[piece.start : piece.stop])
            return calls.theta(w, self.step, call, bases)  # type: ignore[arg-type]

    def _kept(self, n: int, outer: Outermost) -> Sequence[Tensor]:
        """θ of call n, formed once during an outermost call of the network.

        It is formed anew if other coordinates have come into their place, or they have changed, or
        a graph is wanted that was not; and inside a transform that began after the call.
        """
        w = self._root()._parameters[PREFIX + self.calls[n].coordinates]
        assert w is not None
        version = -1 if w.is_inference() else w._version
        state = (id(w), version, torch.is_grad_enabled())
        if n in outer.formed and outer.formed[n][0] == state:
            return outer.formed[n][1]
        thetas = self._theta(self.calls[n])
        if _level() == outer.level:
            outer.formed[n] = state, thetas
        return thetas

    def put_back(self, module: nn.Module, link: Link) -> None:
        """Undo the removal of parameters from a module."""
        there = module._parameters | {a: self._owned[t] for a, t in link.tensors.items()}
        module._parameters.clear()
        module._parameters.update({a: there.pop(a) for a in link.order if a in there} | there)

    def note(self) -> None:
        """Keep hold of the parameters, before an exporter puts stand-ins into their places."""
        there = {tensor: self.base_of(tensor) for tensor in self._homes}
        there |= {name: self.root._parameters[name] for name in self.coordinate_names}  # type: ignore[misc]
        self._owned |= {name: p for name, p in there.items() if type(p) in (Base, nn.Parameter)}

    @torch.no_grad()
    def _constant(self, tensor: str) -> Tensor:
        """θ as a number of ONNX, which knows no operator of ours.

        The exporter has put stand-ins into the modules' places; the parameters themselves are kept.
        """
        from torch._subclasses.fake_tensor import unset_fake_temporarily
        from torch.utils._python_dispatch import _disable_current_modes

        with _disable_current_modes(), unset_fake_temporarily(), _plain():
            parts = []
            for call in self._alone[tensor]:
                (piece,) = call.pieces
                base = self._owned[tensor].detach().reshape(-1)[piece.start : piece.stop]
                w = self._owned[PREFIX + call.coordinates].detach()
                parts.extend(calls.theta(w, self.step, call, [base]))
            return torch.cat(parts).view(self._owned[tensor].shape)

    # ---- what people do to θ₀, to flags, to the structure -----------------------------------------

    def wish(self, tensor: str, requires_grad: bool) -> None:
        """Somebody has set ``requires_grad`` of a frozen θ₀; whether that can be is seen later."""
        self._wishes[tensor] = requires_grad

    def _check_wishes(self) -> None:
        """A network can be frozen as a whole, compartment by compartment, but not tensor by tensor.

        Raises:
            SubspanError: if a tensor is to stay whose coordinates are trained.
        """
        for name, part in zip(self.coordinate_names, self.compartments, strict=True):
            tensors = [piece.tensor for piece in part.pieces]
            frozen = [tensor for tensor in tensors if not self._wishes.get(tensor, True)]
            w = self.root._parameters[name]
            if frozen and isinstance(w, nn.Parameter) and w.requires_grad:
                raise SubspanError(
                    f"requires_grad of {frozen[0]} was set to False, but its coordinates "
                    f"({name}) are trained: freeze those, too, or give exclude= when the network "
                    "is wrapped"
                )
        if all(self._wishes.values()):
            self._wishes.clear()

    @torch.no_grad()
    def _checksum(self, tensor: str) -> tuple[torch.dtype, int] | None:
        """The bytes of θ₀ in 32 bits; None where there is nothing to read."""
        module, attribute = self._found[tensor]
        base = module._parameters[attribute] if attribute in module._parameters else None
        if not isinstance(base, nn.Parameter) or base.is_meta:
            return None
        with _plain():
            flat = base.detach().cpu().contiguous().reshape(-1)
            return base.dtype, zlib.crc32(flat.view(torch.uint8).numpy().data)

    def remember(self, tensors: Iterable[str]) -> None:
        """Take these tensors as they are now for what they were when the network was wrapped."""
        for tensor in tensors:
            self._checks[tensor] = self._checksum(tensor)

    def changed(self, tensors: Iterable[str]) -> set[str]:
        """Those of these tensors whose θ₀ has other values by now, in the same dtype."""
        found = set()
        for tensor in tensors:
            was, now = self._checks.get(tensor), self._checksum(tensor)
            if was is not None and now is not None and was[0] == now[0] and was != now:
                found.add(tensor)
        return found

    def check_base(self) -> None:
        """Refuse to speak of coordinates around another θ₀ than the one they were trained around.

        Raises:
            SubspanError: naming what has changed since the network was wrapped.
        """
        self._root()
        if changed := sorted(self.changed(self._checks)):
            raise SubspanError(
                f"θ₀ of {', '.join(changed[:3])}{' and others' * (len(changed) > 3)} was changed "
                "after the network was wrapped, so that coordinates would mean another network "
                "elsewhere: change it before; merge() gives this network as it is"
            )
        modules = dict(self.root.named_modules(remove_duplicate=False))
        for slot in self.slots:
            path, _, attribute = slot.path.rpartition(".")
            home = self._homes[slot.tensor]
            parameter = home[0]._parameters.get(home[1])
            there = modules[path]._parameters.get(attribute) if path in modules else None
            if there is not parameter:
                raise SubspanError(
                    f"{slot.path} was replaced after the network was wrapped, so that its "
                    "coordinates mean nothing: unwrap() it, and wrap the new network; merge() gives "
                    "this network as it is"
                )

    def check_complete(self) -> None:
        """Refuse what a file of coordinates would not hold.

        Raises:
            SubspanError: naming a parameter that was added since the network was wrapped.
        """
        self.check_base()
        known = {id(self.stored(name)) for name in self.requires_grad}
        known |= {id(w) for w in self.coordinates().values()}
        for name, p in self.root.named_parameters():
            if id(p) not in known:
                raise SubspanError(
                    f"{name} was added after the network was wrapped, and a file of coordinates "
                    "would not hold it: add it before, and name it in train_fully; merge() gives "
                    "this network as it is"
                )

    # ---- states ------------------------------------------------------------------------------

    def difference(self, fingerprint: Tensor) -> str:
        """What makes coordinates under another fingerprint meaningless here; empty if nothing."""
        theirs = bytes(int(digit) % 256 for digit in fingerprint.double().round().tolist()).hex()
        if theirs[:32] != self.fingerprint[:32]:
            return "the initial weights"
        return "the projection or its compartments" if theirs[32:] != self.fingerprint[32:] else ""

    def _check_ranks(self) -> None:
        if different := self.difference(self.root._buffers[FINGERPRINT]):  # type: ignore[arg-type]
            raise SubspanError(
                f"{different} of this process differ from those of rank 0: build the model from "
                "the same seed or file and with the same options on every rank"
            )
        self.ranks_checked = True

    def for_ddp(self, prefix: str) -> list[str]:
        """Names that DDP must not send with every batch; the next call then compares ranks.

        What DDP does send first is rank 0's fingerprint.
        """
        self.ranks_checked = False
        before = [f"{compiled}{prefix}" for compiled in ("", "_orig_mod.")]
        return [f"{start}{slot.path}" for start in before for slot in self.slots]

    @torch.no_grad()
    def before_loading(self, state: dict[str, Any], prefix: str) -> None:
        """Check a state that is to be loaded, and turn one of all weights into coordinates.

        Args:
            state: changed in place.
            prefix: of the network's keys.

        Raises:
            SubspanError: if it is another model's, or its weights lie outside of the subspace.
        """
        fingerprint = state.get(prefix + FINGERPRINT)
        if fingerprint is not None and (different := self.difference(fingerprint)):
            raise SubspanError(
                f"{different} of the model that this state_dict comes from differ from this "
                "model's: build it from the same initial weights and with the same options"
            )
        weights = {path: t for path, t in self._paths() if prefix + path in state}
        names = [name for name in self.coordinate_names if prefix + name in state]
        if not weights:
            return
        if names or set(weights.values()) != set(self._homes):
            raise SubspanError(
                "this state_dict has weights beside coordinates, or some of the weights only: load "
                "that of a model in the same subspace, or a complete one of its network"
            )
        values = {t: state.pop(prefix + path) for path, t in weights.items()}
        state |= {prefix + name: w for name, w in self._coordinates_of(values).items()}
        state[prefix + FINGERPRINT] = self.root._buffers[FINGERPRINT]

    def _paths(self) -> Iterator[tuple[str, str]]:
        """Every path to a trained tensor, and the tensor's name."""
        for path, module in self.root.named_modules(remove_duplicate=False):
            link = vars(module).get(LINK)
            if link is not None and link.weights is self:
                for attribute, tensor in link.tensors.items():
                    yield f"{path}.{attribute}" if path else attribute, tensor

    def _coordinates_of(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """w whose θ are these values, to within rounding.

        Raises:
            SubspanError: if there is none.
        """
        found = {}
        for tensor, value in values.items():
            base = self.base_of(tensor)
            if value.shape != base.shape:
                raise SubspanError(
                    f"the state_dict is of another network: {tensor} has shape "
                    f"{list(value.shape)} there and {list(base.shape)} here"
                )
        for name, part, projection in zip(
            self.coordinate_names, self.compartments, self.projections, strict=True
        ):
            pieces, moved, size, eps = [], [], 0.0, 0.0
            for piece in part.pieces:
                with _plain():
                    base = self.base_of(piece.tensor).detach()
                value = values[piece.tensor].to(base.device, base.dtype)
                delta = (value.double() - base.double()).reshape(-1)[piece.start : piece.stop]
                kept = self.kept.get(piece.tensor, range(0))
                entries = torch.arange(piece.start, piece.stop, device=base.device)
                moved.append((entries < kept.start) | (entries >= kept.stop))
                pieces.append(delta)
                size = max(size, float(value.abs().max()))
                eps = max(eps, torch.finfo(base.dtype).eps)
            delta, mask = torch.cat(pieces), torch.cat(moved).double()
            w = _least_squares(projection, delta, mask)
            error = float((mask * projection.matvec(w) - delta).abs().max())
            if not error <= 8 * eps * size:
                raise SubspanError(
                    "the weights of this state_dict do not lie in this model's subspace: load them "
                    "into the network before it is wrapped, or into that of unwrap()"
                )
            found[name] = w.to(self.root._parameters[name])  # type: ignore[arg-type]
        return found


def _to_onnx() -> bool:
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def _home(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module and the attribute at the end of a parameter's path."""
    prefix, _, attribute = path.rpartition(".")
    return root.get_submodule(prefix), attribute


def _least_squares(projection: Projection, delta: Tensor, mask: Tensor) -> Tensor:
    """w with M P w ≈ δ by conjugate gradients on PᵀM P w = PᵀM δ (Hestenes and Stiefel 1952).

    PᵀP is nearly 1, or 1 exactly, so that a few steps suffice.

    Args:
        projection: P.
        delta: (D,) float64.
        mask: (D,) the diagonal of M, 0 where weights stay at θ₀, else 1.
    """
    residual = projection.rmatvec(mask * delta)
    w, along, size = torch.zeros_like(residual), residual, residual.square().sum()
    least = 1e-28 * float(size)
    for _ in range(100):
        if float(size) <= least:
            break
        image = projection.rmatvec(mask * projection.matvec(along))
        step = size / (along @ image)
        w, residual = w + step * along, residual - step * image
        last, size = size, residual.square().sum()
        along = residual + size / last * along
    return w


# ---- optimizers ----------------------------------------------------------------------------------

_known: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
_watching: list[Any] = []


def _watch_optimizers() -> None:
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_check_optimizer))


def _check_optimizer(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Refuse a step over frozen θ₀ without the coordinates that train it: it would do nothing."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if _known.get(optimizer) == len(parameters):
        return
    there = {id(p) for p in parameters}
    for p in parameters:
        if type(p) is Base:
            weights, tensor = p.home
            if weights.root is not None and not any(
                id(w) in there for w in weights.coordinates().values()
            ):
                raise SubspanError(
                    f"the optimizer has {tensor}, which is frozen since it is trained in a "
                    "subspace, and not the coordinates that train it: make it anew, of the "
                    "parameters of the SubspaceModel or of the whole network"
                )
    _known[optimizer] = len(parameters)
