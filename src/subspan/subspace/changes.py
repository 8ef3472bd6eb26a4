"""Noticing and naming what people change in a network that is in a subspace.

Whoever holds a network may change θ₀ in place, freeze parameters one by one, replace layers, or
have an optimizer that knows nothing of coordinates. None of this can be forbidden where it happens;
but coordinates that would mean another function are not saved, and no step is made in vain.
"""

from __future__ import annotations

import functools
import weakref
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from subspan.distributed import find_ddp, has_share
from subspan.errors import SubspanError
from subspan.subspace.callers import freezes_all
from subspan.subspace.dtensors import home_of, is_shard, local
from subspan.subspace.functions import ordinary_tensors
from subspan.subspace.links import missing
from subspan.subspace.parameters import bytes_of, digest_tensors, saved_buffers
from subspan.subspace.quantised import read_quantised
from subspan.subspace.variant import refuse_in_use

if TYPE_CHECKING:
    from subspan.subspace.network import Network


BLOCKS = 256  # into which a tensor's sum is divided
AT_ONCE = 1 << 20  # entries of a tensor that are summed together
ROUNDING = 1e-5  # of a tensor's norm: what averages of equal tensors may differ by


@dataclass(frozen=True)
class Sketch:
    """A tensor in a few numbers: a checksum of its bytes, sums of its blocks, and its norm."""

    shape: torch.Size
    number: int
    sums: Tensor
    norm: float

    @classmethod
    def exact(cls, shape: torch.Size, number: int) -> Sketch:
        """Make the sketch of numbers that have no average: they are the same, or they are not."""
        return cls(
            shape, number, torch.tensor([number % 2**52], dtype=torch.float64, device="cpu"), 0.0
        )

    def is_like(self, other: Sketch) -> bool:
        """Return whether the other tensor is equal, but for the rounding of averages."""
        if self.shape != other.shape or self.number == other.number:
            return self.shape == other.shape
        return bool((self.sums - other.sums).norm() <= ROUNDING * self.norm)


class Changes:
    """Keeps what is known of a network since it was wrapped."""

    def __init__(self, weights: Network) -> None:
        self.weights = weights
        self.wishes: dict[str, bool] = {}
        self._sums: dict[tuple[str, Any], Sketch] = {}
        self.lost: set[str] = set()  # that were changed before they were spread over processes

    def check_flags(self) -> None:
        """Refuse flags of tensors that say something else than those of their coordinates.

        ``wishes`` holds what was set of frozen θ₀: a loop over all parameters sets the flag of
        coordinates, too, so that only afterwards it is known whether all of them were frozen. A
        loop that unfreezes all has unfrozen what is to stay at θ₀, too, and training would move it.
        """
        if any(self.wishes.values()):
            for name in self.weights.requires_grad:
                left_out = name not in self.weights.homes and name not in self.weights.fully
                p = self.weights.find(name) if left_out else None
                if p is not None and p.requires_grad and p.numel():
                    raise SubspanError(
                        f"requires_grad of {name}, which stays at θ₀, was set to True with those "
                        "of others: set the flags of the SubspaceModel's parameters(), or name it "
                        "in train_fully= when the network is wrapped"
                    )
        for name, part in zip(
            self.weights.coordinate_names, self.weights.compartments, strict=True
        ):
            w = self.weights.root._parameters[name]
            if not isinstance(w, nn.Parameter):  # but what a functional call has put there
                continue
            for tensor in (piece.tensor for piece in part.pieces):
                wish = self.wishes.get(tensor, w.requires_grad)
                if w.requires_grad and not wish:
                    raise SubspanError(
                        f"requires_grad of {tensor} was set to False, but its coordinates ({name}) "
                        "are trained: freeze those, too, or give exclude= when the network is "
                        "wrapped"
                    )
                if wish and not w.requires_grad:
                    raise SubspanError(
                        f"requires_grad of {tensor} was set to True, but its coordinates ({name}) "
                        "are frozen: unfreeze them; a part alone is trained by targets= or "
                        "exclude= when the network is wrapped"
                    )
        if all(self.wishes.values()):
            self.wishes.clear()

    def check_freezing(self, frame: FrameType) -> None:
        """Refuse that PEFT freezes trained coordinates, which it takes for those of a base."""
        if not freezes_all(frame):
            return
        if any(w.requires_grad for w in self.weights.coordinates().values()):
            raise SubspanError(
                "prepare_model_for_kbit_training would freeze the coordinates, and nothing would "
                "be trained: call it before the network is wrapped; or first "
                "requires_grad_(False), if adapters alone are to be trained"
            )

    @torch.no_grad()
    def _sketch(self, tensor: str) -> tuple[Any, Sketch] | None:
        """Return of what kind θ₀, or its shard here, is, and its sketch; None if it has none."""
        module, attribute = self.weights.locations[tensor]
        if attribute not in module._parameters:  # which of TorchScript's has no get()
            return None
        base = module._parameters[attribute]
        if base is None or base.is_meta:
            return None
        if (packed := read_quantised(module, attribute)) is not None:
            number = int(digest_tensors({tensor: packed}), 16)
            return packed.dtype, Sketch.exact(packed.shape, number)
        with ordinary_tensors():
            if base.layout != torch.strided:
                return base.dtype, Sketch.exact(base.shape, int(digest_tensors({tensor: base}), 16))
            kind = (base.dtype, local(base).shape) if is_shard(base) else base.dtype
            stored = bytes_of(local(base))
            number = zlib.crc32(stored.numpy().data)
            if not (base.is_floating_point() or base.is_complex()):
                return kind, Sketch.exact(base.shape, number)
            flat = stored.view(base.real.dtype)
            blocks = flat[: len(flat) // BLOCKS * BLOCKS].view(BLOCKS, -1)
            # A few blocks at a time: PyTorch makes a copy in float64 of what it sums so.
            few = blocks.split(max(1, AT_ONCE // max(1, blocks.shape[1])))
            sums = [part.sum(dim=1, dtype=torch.float64) for part in few]
            rest = flat[len(flat) // BLOCKS * BLOCKS :].double()
            norm = sum(float(part.double().square().sum()) for part in (*few, rest)) ** 0.5
            return kind, Sketch(base.shape, number, torch.cat([*sums, rest]), norm)

    def remember(self, tensors: Iterable[str]) -> None:
        """Take these tensors for what they were, where nothing is known in their type."""
        for tensor in tensors:
            sketch = self._sketch(tensor)
            if sketch is not None:
                self._sums.setdefault((tensor, sketch[0]), sketch[1])

    def dtype_before(self, tensor: str) -> torch.dtype:
        """Return the dtype that a tensor had when the network was wrapped."""
        kinds = (kind for name, kind in self._sums if name == tensor)
        return next(kinds, self.weights.stored(tensor).dtype)

    def changed(self, tensors: Iterable[str]) -> set[str]:
        """Return the tensors whose θ₀ has other values by now, by more than rounding."""
        changed = self.lost.intersection(tensors := list(tensors))
        for tensor in tensors:
            now = self._sketch(tensor)
            was = None if now is None else self._sums.get((tensor, now[0]))
            if now is not None and was is not None and not was.is_like(now[1]):
                changed.add(tensor)
        return changed

    def check_base(self) -> None:
        """Refuse to speak of coordinates around another θ₀ than that of their training."""
        root = self.weights.network()
        if changed := sorted(self.changed({tensor for tensor, _ in self._sums})):
            raise SubspanError(
                f"θ₀ of {', '.join(changed[:3])}{' and others' * (len(changed) > 3)} was changed "
                "after the network was wrapped, so that coordinates would mean another network "
                "elsewhere: change it before; merge() gives this network as it is"
            )
        coordinates = self.weights.coordinates().values()
        for projection, w in zip(self.weights.projections, coordinates, strict=True):
            projection.check_coordinates(w)
        modules = dict(root.named_modules(remove_duplicate=False))
        for slot in self.weights.slots:
            path, _, attribute = slot.path.rpartition(".")
            home = self.weights.homes[slot.tensor]
            parameter = home[0]._parameters.get(home[1])
            now = modules[path]._parameters.get(attribute) if path in modules else None
            if now is not parameter:
                raise SubspanError(
                    f"{slot.path} was replaced after the network was wrapped, so that its "
                    "coordinates mean nothing: unwrap() it, and wrap the new network; merge() "
                    "gives this network as it is"
                )

    def check_complete(self) -> None:
        """Refuse what a file of coordinates would not hold: what was added, or taken out."""
        refuse_in_use(self.weights, "saved")
        self.check_base()
        for name in saved_buffers(self.weights.root):
            if name not in self.weights.buffer_names:
                raise SubspanError(
                    f"buffer {name} was added after the network was wrapped, and the network that "
                    "the file is loaded around has none: add it before; merge() gives this network "
                    "as it is"
                )
        own = {name: id(self.weights.stored(name)) for name in self.weights.requires_grad}
        modules = self.weights.root.modules()
        present = {id(p) for module in modules for p in module._parameters.values()}
        stored = set(own.values())
        stored |= {id(w) for w in self.weights.coordinates().values()}
        for name, p in self.weights.root.named_parameters():
            if id(p) not in stored:
                raise SubspanError(
                    f"{name} was added after the network was wrapped, and a file of coordinates "
                    "would not hold it: add it before, and name it in train_fully; merge() gives "
                    "this network as it is"
                )
        for name, identity in own.items():
            if identity not in present:
                raise missing(name)


# ---- optimizers ----------------------------------------------------------------------------------

_known: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
_watching: list[Any] = []
_OUTGROWN = "_subspan_outgrown"
_replaced = WeakIdKeyDictionary()  # by the parameters of a layer, that which has its place


def outgrow(w: nn.Parameter, why: str) -> None:
    """Note that coordinates are the network's no more; whoever still uses them is refused.

    ``why`` is the end of a sentence that begins with "coordinates".
    """
    setattr(w, _OUTGROWN, why)
    _known.clear()
    if w.requires_grad:
        w.register_hook(functools.partial(_refuse_gradient, why))
    for ddp in find_ddp(w):
        ddp.register_forward_pre_hook(functools.partial(_refuse_ddp, why))


def note_replaced(old: nn.Module, new: nn.Module) -> None:
    """Note that a layer has another one's place; who goes on to train the other one is refused.

    Gradients of before go: a layer that has one later is still used, in another network.
    """
    for p in old.parameters():
        _replaced[p] = new
    for p in new.parameters():
        _replaced.pop(p, None)
    for p in old.parameters():
        if p in _replaced:
            p.grad = None
    watch_optimizers()


def _goes_on(p: nn.Parameter, given: set[int]) -> bool:
    """Return whether an optimizer has parameters of what has the place of a parameter's layer."""
    now = _replaced[p].parameters()
    return any(id(q) in given or (q in _replaced and _goes_on(q, given)) for q in now)


def _refuse_gradient(why: str, grad: Tensor) -> None:
    raise SubspanError(
        f"this loss was computed with coordinates {why}, and nothing would learn from its "
        "gradient: call backward() before that"
    )


def _refuse_ddp(why: str, ddp: nn.Module, args: Any) -> None:
    raise SubspanError(
        f"DDP averages coordinates {why}, and processes would come to different weights: give it "
        "the network anew, DistributedDataParallel(…)"
    )


def watch_optimizers() -> None:
    """Look at every optimizer's parameters before its first step from now on."""
    _known.clear()  # whose parameters may be θ₀ by now
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_check_optimizer))


def _check_optimizer(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Refuse a step over frozen θ₀ without the coordinates that train it: it would do nothing.

    Kernels of fused optimizers do not count as changes, by which θ of before is told: they do here.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fused = any(group.get("fused") for group in optimizer.param_groups)
    if fused and not torch.compiler.is_compiling():
        increment_version([p for p in parameters if not p.is_inference()])
    if _known.get(optimizer) == len(parameters):
        return
    if why := next((getattr(p, _OUTGROWN) for p in parameters if hasattr(p, _OUTGROWN)), ""):
        raise SubspanError(
            f"the optimizer trains coordinates {why}: give it to grow(), or make it anew"
        )
    given = {id(p) for p in parameters}
    for p in parameters:
        unused = p.requires_grad and p.grad is None and p in _replaced
        if unused and not _goes_on(p, given):
            raise SubspanError(
                "the optimizer has parameters of a layer that another one has taken the place of, "
                "and none of that one, which no step would train: make it anew, of the network as "
                "it is"
            )
        if (home := home_of(p)) is not None:
            weights, tensor = home
            if weights.root is not None and not (
                any(id(w) in given for w in weights.coordinates().values())
                or has_share(optimizer)  # of all that was looked at before
            ):
                raise SubspanError(
                    f"the optimizer has {tensor}, which is frozen since it is trained in a "
                    "subspace, and not the coordinates that train it: make it anew, of the "
                    "parameters of the SubspaceModel or of the whole network"
                )
    _known[optimizer] = len(parameters)
