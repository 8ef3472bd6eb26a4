"""A network in a subspace whose θ₀ lies in shards: ``fully_shard`` of PyTorch (FSDP2).

FSDP keeps a shard of each parameter in the module's slot, and puts the whole parameter there for
the length of the module's call, and again for its backward pass. θ is formed of what stands there.
Coordinates are whole in every process, their gradient is averaged: d numbers. Outside of its
module's call a weight is the shard of θ that belongs to the shard of θ₀, formed without messages.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from subspan.errors import SubspanError
from subspan.subspace import forming
from subspan.subspace.blocks import entries_inside
from subspan.subspace.dtensors import mark
from subspan.subspace.links import digits_of, link_of
from subspan.subspace.parameters import saved_buffers
from subspan.subspace.theta0 import OWN, Base

if TYPE_CHECKING:
    from subspan.subspace.weights import Weights

TAKEN = "_subspan_taken"  # by FSDP: of parameters that it puts into slots


class Shards:
    """The part of :class:`~subspan.subspace.weights.Weights` that begins when FSDP takes a tensor.

    All are whole then; the mesh are the processes over which the first is about to be spread.
    """

    def __init__(self, weights: Weights, mesh: Any) -> None:
        self.weights, self.mesh = weights, mesh
        self.marks: dict[str, dict[str, Any]] = {}  # that people made on parameters, by tensor
        self._averaged: dict[str, weakref.ref[nn.Parameter]] = {}  # what has the hook
        # Files name it where there are buffers, and later no process has all of θ₀.
        saved = saved_buffers(weights.root)
        self.digest = weights.parameters_digest() if saved else None
        with torch.no_grad():
            for name in weights.coordinate_names:
                w = weights.root._parameters[name]
                if w is not None and w.device.type != mesh.device_type:
                    w.data = w.data.to(mesh.device_type)  # where FSDP brings the parameters
        weights.ranks_checked = False
        self.watch()

    # ---- slots -------------------------------------------------------------------------------

    @classmethod
    def put(cls, module: nn.Module, attribute: str, value: nn.Parameter) -> None:
        """Put a parameter of FSDP's into a slot; its processes must be those of the others."""
        link = link_of(module)
        tensor, weights = link.tensors.get(attribute), link.weights
        before = module._parameters[attribute]
        if tensor is not None and type(before) is Base:
            mesh = value.device_mesh  # type: ignore[attr-defined]
            if weights.shards is None:
                weights.shards = cls(weights, mesh)
            elif weights.shards.mesh != mesh:
                raise SubspanError(
                    f"{tensor} would be sharded over other processes than the tensors before it, "
                    "and the gradient of coordinates is averaged over all of one mesh: give every "
                    "fully_shard the same mesh"
                )
            kept = {k: v for k, v in vars(before).items() if k not in (*OWN, "_fsdp_orig_uid")}
            weights.shards.marks[tensor] = kept
            weights.owned.pop(tensor, None)  # or θ₀ would stay whole
            weights.changes.lost |= weights.changes.changed({tensor})
        setattr(value, TAKEN, True)
        if tensor is not None:
            mark(value, weights, tensor)
        module._parameters[attribute] = value
        if tensor is not None and type(before) is Base:
            weights.changes.remember({tensor})

    # ---- θ of shards -------------------------------------------------------------------------

    def theta(self, tensor: str) -> Tensor:
        """θ where θ₀ lies in shards of rows, spread in the same way; each process forms its own."""
        from torch.distributed.tensor import DTensor, Replicate, Shard
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as place

        weights = self.weights
        base: Any = weights.base_of(tensor)
        if not all(p == Shard(0) or type(p) is Replicate for p in base.placements):
            raise SubspanError(
                f"{tensor} is sharded along another dimension than the first, and can be read "
                "inside of a call of its module only"
            )
        shard = base.detach()._local_tensor
        _, (first, *_) = place(base.shape, base.device_mesh, base.placements)
        begin = first * (base.numel() // max(1, base.shape[0]))
        parts: list[Tensor] = []
        for block in weights.blocks_of[tensor]:
            (piece,) = block.pieces
            start, stop = max(piece.start, begin), min(piece.stop, begin + shard.numel())
            if start >= stop:
                continue
            inside = replace(piece, start=start, stop=stop)
            row = block.start + start - piece.start
            cut = replace(
                block,
                start=row,
                stop=row + stop - start,
                pieces=(inside,),
                kept=(entries_inside(weights.kept.get(tensor, range(0)), inside),),
            )
            rows = shard.reshape(-1)[start - begin : stop - begin]
            w = weights.own_coordinate(cut.coordinates)
            parts.extend(forming.form_theta(w, weights.step, [cut], [rows]))
        if not parts:  # of a process without rows, which takes part in the average all the same
            w = weights.own_coordinate(weights.blocks_of[tensor][0].coordinates)
            parts = [w[:0].to(shard)]
        theta = torch.cat(parts).view(shard.shape)
        mesh = base.device_mesh
        shards = math.prod(mesh.size(n) for n, p in enumerate(base.placements) if p.is_shard())
        if theta.requires_grad:  # each process has its rows' part of the gradient, not the mean
            theta.register_hook(lambda grad: grad * shards)
        spread = DTensor.from_local(
            theta, mesh, base.placements, run_check=False, shape=base.shape, stride=base.stride()
        )
        mark(spread, weights, tensor, theta=True)
        return spread

    # ---- coordinates -------------------------------------------------------------------------

    def watch(self) -> None:
        """See to it that the gradients of all that is trained whole will be averaged."""
        for name, w in self._trained():
            # Once; but a state that was loaded by assign=True has other parameters.
            if w.requires_grad and self._averaged.get(name, lambda: None)() is not w:
                w.register_hook(self._average)
                self._averaged[name] = weakref.ref(w)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Coordinates, and what is trained fully and FSDP does not have."""
        for name in self.weights.coordinate_names:
            w = self.weights.root._parameters[name]
            if type(w) is nn.Parameter:
                yield name, w
        for name in self.weights.fully:
            p = self.weights.stored(name)
            if type(p) is nn.Parameter and not hasattr(p, TAKEN):
                yield name, p

    def _average(self, grad: Tensor) -> Tensor:
        """Average the gradient of one backward pass over all processes."""
        import torch.distributed as dist

        if grad.requires_grad:
            raise SubspanError(
                "a gradient of coordinates that is to be differentiated again (create_graph=True) "
                "is not averaged over the processes that share a sharded network: take it in one "
                "process"
            )
        total = grad.clone(memory_format=torch.contiguous_format)
        for n in range(self.mesh.ndim):
            dist.all_reduce(total, group=self.mesh.get_group(n))
        return total.div_(self._divisor())

    def _divisor(self) -> float:
        """Return the number of processes, or the factor of ``set_gradient_divide_factor``."""
        factors = set()
        for module in self.weights.root.modules():
            state = getattr(module, "_get_fsdp_state", lambda: None)()
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:  # PyTorch 2.11 has one group in a module
                groups = (getattr(state, "_fsdp_param_group", None),)
            for group in filter(None, groups):
                factors.add(getattr(group, "gradient_divide_factor", None))
        if len(factors) > 1:
            raise SubspanError(
                "set_gradient_divide_factor differs between parts of the network, whose "
                "coordinates are the same: set it for the whole network"
            )
        return float(next(iter(factors), None) or self.mesh.size())

    @torch.no_grad()
    def check_ranks(self) -> None:
        """Refuse, in all processes, a first call where one has other weights: all must ask."""
        fingerprint = digits_of(self.weights.fingerprint)
        digits = torch.tensor(fingerprint, dtype=torch.float64, device="cpu")
        base, layout = digits.chunk(2)
        numbers = {
            "initial weights": [base],
            "projections or compartments": [layout],
            "coordinates, or other parameters that are trained": [
                w.detach().reshape(-1).double() for _, w in self._trained()
            ],
        }
        for what, own in numbers.items():
            if self._differs(own):
                raise SubspanError(
                    f"the processes that share this network have different {what}: build and load "
                    "it in the same way in every process before fully_shard"
                )

    def _differs(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these numbers are others in another process; all get the same answer."""
        import torch.distributed as dist

        if not tensors:  # coordinates that are given, by functional_call say
            return False
        numbers = torch.cat([tensor.to(self.mesh.device_type) for tensor in tensors]).nan_to_num()
        most, least = numbers.clone(), numbers.clone()
        for n in range(self.mesh.ndim):
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self.mesh.get_group(n))
            dist.all_reduce(least, dist.ReduceOp.MIN, group=self.mesh.get_group(n))
        return not torch.equal(most, least)


AROUND = (
    "subspan.save() its coordinates, and subspan.load() them around the whole network as it was "
    "before"
)


def refuse_whole(weights: Weights, what: str, instead: str = AROUND) -> None:
    """Refuse what needs all of θ₀ in one process: ``what`` cannot be done, and ``instead`` can."""
    if weights.shards is not None:
        raise SubspanError(
            f"a network whose weights are sharded over processes cannot be {what}: {instead}"
        )
