"""The weights of an optimizer as compartments, and both products on tensors where they lie.

The same partition and streams as :class:`~subspan.subspace.SubspaceModel`'s: with a basis that is
never redrawn both train the same subspace.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from subspan import families
from subspan.errors import SubspanError
from subspan.families import Projection
from subspan.families.operator import as_step
from subspan.families.registry import from_recipe
from subspan.families.updates import add_, gather
from subspan.subspace.blocks import Block, group_into_blocks
from subspan.subspace.compartments import Compartment, Piece, Rules, partition
from subspan.subspace.computed import Computed


@dataclass(frozen=True)
class Part:
    """One compartment of the weights, and where its coordinates are among all."""

    compartment: Compartment
    projections: tuple[Projection, ...]  # of every basis of a step
    calls: tuple[Block, ...]
    tensors: Mapping[str, Tensor]
    begin: int
    # Entries of tensors that stay where they are: they have rows of P that nothing is done with.
    kept: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def place(self) -> slice:
        """The slice of this part's coordinates in the full vector."""
        return slice(self.begin, self.begin + self.compartment.dim)

    def described(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON."""
        kept = {name: list(entries) for name, entries in self.kept.items()}
        return {
            "name": self.compartment.name,
            "begin": self.begin,
            "pieces": [list(astuple(piece)) for piece in self.compartment.pieces],
            "projections": [projection.recipe for projection in self.projections],
        } | ({"kept": kept} if kept else {})

    # ---- the products ----------------------------------------------------------------------------

    def add_projected(
        self,
        coordinates: Tensor,
        vectors: Mapping[str, Tensor | None],
        *,
        basis: int,
        step: int | Tensor,
        alpha: float = 1.0,
    ) -> None:
        """Coordinates += α Pᵀ v, in place.

        Args:
            coordinates: all of them; only this part's change.
            vectors: for every tensor a gradient in its shape (None: zeros), or the tensor itself.
            basis: which of the step's bases.
            step: which redraw.
            alpha: a factor.
        """
        own, projection, redraw = coordinates[self.place], self.projections[basis], as_step(step)
        for call in self.calls:
            found = [vectors[piece.tensor] for piece in call.pieces]
            if all(vector is None for vector in found):
                continue
            flat = [
                own.new_zeros(len(piece)) if vector is None else self._entries(vector, piece)
                for piece, vector in zip(call.pieces, found, strict=True)
            ]
            own.add_(gather(projection, flat, own, redraw, call.start), alpha=alpha)

    def add_weights(
        self, coordinates: Tensor, *, basis: int, step: int | Tensor, alpha: float = 1.0
    ) -> None:
        """Weights += α P c, in place; 16-bit weights are added up in float32 and rounded once.

        Args:
            coordinates: all of them; only this part's count.
            basis: which of the step's bases.
            step: which redraw.
            alpha: a factor.
        """
        own, projection, redraw = coordinates[self.place], self.projections[basis], as_step(step)
        own = own if alpha == 1 else own * alpha
        for call in self.calls:
            if tensors := self._as_they_are(call):
                add_(projection, tensors, own.to(tensors[0].device), redraw, call.start)
                continue
            start = call.start
            for piece in call.pieces:
                flat = Flat(self.tensors[piece.tensor], piece, self._kept(piece))
                add_(projection, [flat.part], own.to(flat.part.device), redraw, start)
                flat.close()
                start += len(piece)

    def vectors(self, coordinates: Tensor, *, basis: int, step: int | Tensor) -> dict[str, Tensor]:
        """P c as tensors by name, in the tensors' shapes: zero outside of this compartment."""
        found = {
            piece.tensor: torch.zeros_like(self.tensors[piece.tensor])
            for piece in self.compartment.pieces
        }
        replace(self, tensors=found).add_weights(coordinates, basis=basis, step=step)
        return found

    def _as_they_are(self, call: Block) -> list[Tensor]:
        """The tensors of a call, if all of each can be changed at once; else none."""
        tensors, memories = [], set()
        for piece in call.pieces:
            tensor = self.tensors[piece.tensor]
            whole = len(piece) == tensor.numel() and piece.tensor not in self.kept
            if not whole or not tensor.is_contiguous():
                return []
            tensors.append(tensor)
            memories.add(tensor.untyped_storage().data_ptr())
        return tensors if len(memories) == len(tensors) else []

    def _entries(self, vector: Tensor, piece: Piece) -> Tensor:
        """The entries of a piece, in any shape; zeros where weights are kept."""
        if piece.tensor not in self.kept:
            return entries(vector, piece)
        found, kept = entries(vector, piece).reshape(-1), self._kept(piece)
        if bool(found[kept].any()):  # seldom: the gradient of a padding row is zero
            found = found.clone()
            found[kept] = 0
        return found

    def _kept(self, piece: Piece) -> slice:
        """Which entries of a piece are kept."""
        start, stop = self.kept.get(piece.tensor, (0, 0))
        return slice(max(start - piece.start, 0), max(min(stop, piece.stop) - piece.start, 0))


class Flat:
    """Entries of a tensor as a contiguous vector ``part``, that is changed in place and closed.

    Args:
        tensor: in any order of memory.
        piece: which of its entries.
        kept: which of these are put back in the end.
    """

    def __init__(self, tensor: Tensor, piece: Piece, kept: slice) -> None:
        self.tensor, self.kept = tensor.detach(), kept
        self.copied = not self.tensor.is_contiguous()
        # `reshape` alone would leave a vector with gaps as it is.
        self.whole = self.tensor.contiguous().reshape(-1)
        self.part = self.whole[piece.start : piece.stop]
        self.before = self.part[kept].clone() if kept.stop > kept.start else None

    def close(self) -> None:
        """Put back what is kept, and the whole into a tensor in another order of memory."""
        if self.before is not None:
            self.part[self.kept] = self.before
        if self.copied:
            self.tensor.copy_(self.whole.view(self.tensor.shape))


def entries(tensor: Tensor, piece: Piece) -> Tensor:
    """The entries of a piece, in the tensor's shape if they are all; of a sparse one, too."""
    dense = (tensor.to_dense() if tensor.is_sparse else tensor).detach()
    if len(piece) == dense.numel():
        return dense
    return dense.reshape(-1)[piece.start : piece.stop]


def overlaps(tensor: Tensor) -> bool:
    """Whether two entries may lie in one place, as those of an expanded tensor do."""
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += step * (size - 1)
    return False


def padding_rows(net: nn.Module) -> dict[int, tuple[int, int]]:
    """Entries start … stop−1 of padding rows, by the id of the embedding's table.

    Their gradient is zero and an ordinary optimizer never moves them, unless another layer shares
    the table.
    """
    found: dict[int, tuple[int, int]] = {}
    shared: set[int] = set()
    for module in net.modules():
        for tensor in module._parameters.values():
            row = getattr(module, "padding_idx", None)
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and row is not None:
                length = module.embedding_dim
                found[id(tensor)] = row * length, (row + 1) * length
            else:
                shared.add(id(tensor))
    return {key: row for key, row in found.items() if key not in shared}


def refuse_computed(params: Sequence[Any]) -> None:
    """Refuse weights that are computed when they are read, alone or in pairs with a name.

    Raises:
        SubspanError: if there is one.
    """
    for given in params:
        tensor = given[-1] if isinstance(given, tuple) and given else given
        if isinstance(tensor, Computed):
            raise SubspanError(
                f"{tensor.weight_name} is computed from coordinates: give the coordinates, which "
                "are among parameters() of the SubspaceModel"
            )


def leave_frozen(group: dict[str, Any], number: int) -> None:
    """Keep of a group only the tensors that require a gradient, and their names.

    Raises:
        SubspanError: if none does.
    """
    trained = [tensor.requires_grad for tensor in group["params"]]
    if not any(trained):
        raise SubspanError(
            f"there is nothing to train in group {number} of the parameters: no tensor in it "
            "requires a gradient"
        )
    for key in {"params", "param_names"} & set(group):
        group[key] = list(compress(group[key], trained))


def named_tensors(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
    """The parameters of every group by name; by running numbers where they have none."""
    found: list[dict[str, Tensor]] = []
    number = 0
    for group in groups:
        names = group.get("param_names") or [str(number + i) for i in range(len(group["params"]))]
        number += len(names)
        found.append(dict(zip(names, group["params"], strict=True)))
    names = [name for group in found for name in group]
    if len(set(names)) < len(names):  # of two networks
        return [{f"{n}/{name}": t for name, t in g.items()} for n, g in enumerate(found)]
    return found


def divide(
    tensors: Mapping[str, Tensor], dim: int | Sequence[int] | None, rules: Rules, allocation: str
) -> tuple[Compartment, ...]:
    """The compartments of some tensors.

    Raises:
        SubspanError: see :func:`subspan.subspace.compartments.partition`.
    """
    sizes = {name: tensor.numel() for name, tensor in tensors.items() if tensor.numel()}
    return partition(sizes, {name: [name] for name in tensors}, dim, rules, allocation)


def parts(
    groups: Sequence[tuple[Mapping[str, Tensor], Sequence[Compartment]]],
    family: str,
    seed: int,
    bases: int,
    options: Mapping[str, Any],
    kept: Mapping[str, tuple[int, int]],
) -> tuple[Part, ...]:
    """The parts of all groups, one after another.

    Args:
        groups: tensors by name, and the compartments of these.
        family: of the projections.
        seed: of all of them.
        bases: how many each compartment has at a step.
        options: of the family.
        kept: entries start … stop−1 of some tensors that never move.

    Basis b of compartment k of K takes stream b·K + k: a single basis has those of a
    :class:`~subspan.subspace.SubspaceModel`.
    """
    total = sum(len(compartments) for _, compartments in groups)
    found: list[Part] = []
    begin = 0
    for tensors, compartments in groups:
        for compartment in compartments:
            projections = tuple(
                families.projection(
                    family,
                    out_dim=compartment.weights,
                    in_dim=compartment.dim,
                    seed=seed,
                    stream=basis * total + len(found),
                    **options,
                )
                for basis in range(bases)
            )
            own = {piece.tensor: tensors[piece.tensor] for piece in compartment.pieces}
            plan = group_into_blocks([compartment], projections[:1])
            held = {name: entries for name, entries in kept.items() if name in own}
            found.append(Part(compartment, projections, plan, own, begin, held))
            begin += compartment.dim
    return tuple(found)


def layout(found: Sequence[Part]) -> str:
    """Digest of what coordinates mean: the projections, and which weights their rows are."""
    text = json.dumps([part.described() for part in found], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def from_description(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Part:
    """The part of :meth:`Part.described`, over tensors by name."""
    pieces = tuple(Piece(*piece) for piece in described["pieces"])
    projections = tuple(from_recipe(recipe) for recipe in described["projections"])
    compartment = Compartment(described["name"], projections[0].in_dim, pieces)
    own = {piece.tensor: tensors[piece.tensor] for piece in pieces}
    plan = group_into_blocks([compartment], projections[:1])
    kept = {name: (start, stop) for name, (start, stop) in described.get("kept", {}).items()}
    return Part(compartment, projections, plan, own, described["begin"], kept)
