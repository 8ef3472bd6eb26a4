"""One compartment of an optimizer's weights, and both products on tensors where they lie.

Partition and streams are those of :class:`~subspan.subspace.SubspaceModel`: with a basis that is
never redrawn both train the same subspace.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from subspan.families import Projection
from subspan.families.registry import from_recipe
from subspan.families.updates import add_, gather
from subspan.subspace.blocks import Block, entries_inside, group_into_blocks
from subspan.subspace.compartments import Compartment, Piece


@dataclass(frozen=True)
class CompartmentWeights:
    """The weights of one compartment, and where its coordinates are among all."""

    compartment: Compartment  # which entries of which tensors
    projections: tuple[Projection, ...]  # one for each basis of a step
    tensors: Mapping[str, Tensor]  # by name; they are changed in place
    begin: int  # the place of the first coordinate among those of all compartments
    # Entries of some tensors that never move. They have rows of P that are not used.
    kept: Mapping[str, range] = field(default_factory=dict)

    @staticmethod
    def from_description(
        described: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> CompartmentWeights:
        """Return the compartment of :meth:`described`, over tensors by name."""
        pieces = tuple(Piece(*piece) for piece in described["pieces"])
        projections = tuple(from_recipe(recipe) for recipe in described["projections"])
        return CompartmentWeights(
            Compartment(described["name"], projections[0].in_dim, pieces),
            projections,
            {piece.tensor: tensors[piece.tensor] for piece in pieces},
            described["begin"],
            {name: range(*entries) for name, entries in described.get("kept", {}).items()},
        )

    def described(self) -> dict[str, Any]:
        """Return everything but the tensors, as JSON."""
        kept = {name: [entries.start, entries.stop] for name, entries in self.kept.items()}
        return {
            "name": self.compartment.name,
            "begin": self.begin,
            "pieces": [list(astuple(piece)) for piece in self.compartment.pieces],
            "projections": [projection.recipe for projection in self.projections],
        } | ({"kept": kept} if kept else {})

    @cached_property
    def place(self) -> slice:
        """The slice of this compartment's coordinates in the full vector."""
        return slice(self.begin, self.begin + self.compartment.dim)

    @cached_property
    def calls(self) -> tuple[Block, ...]:
        """The calls of the operator that make a product."""
        return group_into_blocks([self.compartment], self.projections[:1])

    # ---- the products ----------------------------------------------------------------------------
    #
    # They are a good part of what a step costs beside its kernels: loops here make few calls.

    def add_projected(
        self,
        coordinates: Tensor,
        vectors: Mapping[str, Tensor | None],
        basis: int,
        redraw: Tensor,
        alpha: float = 1.0,
    ) -> None:
        """Coordinates += α Pᵀ v, in place, in this compartment's slice of (d,) alone.

        The vectors are a gradient in the shape of every tensor (None: zeros), or the tensor itself.
        ``basis`` is one of the step's, and ``redraw`` its number, 0-D int64.
        """
        own, projection = self._own(coordinates), self.projections[basis]
        for call in self.calls:
            flat: list[Tensor] = []
            absent: list[int] = []
            for piece in call.pieces:
                vector = vectors[piece.tensor]
                if vector is None:
                    absent.append(len(flat))
                    vector = own  # until it is known whether zeros are needed
                else:
                    if vector.is_sparse:
                        vector = vector.to_dense()
                    if self.kept or vector.numel() != piece.stop - piece.start:
                        vector = self._entries(vector, piece)
                flat.append(vector)
            if len(absent) < len(flat):
                for i in absent:
                    flat[i] = own.new_zeros(len(call.pieces[i]))
                own.add_(gather(projection, flat, own, redraw, call.start), alpha=alpha)

    def add_weights(
        self,
        coordinates: Tensor,
        basis: int,
        redraw: Tensor,
        alpha: float = 1.0,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Weights, or other tensors by name, += α P c, in place; c is this compartment's slice.

        16-bit weights are added up in float32 and rounded once.
        """
        own, projection = self._own(coordinates), self.projections[basis]
        own = own if alpha == 1 else own * alpha
        tensors = tensors or self.tensors
        for call in self.calls:
            if whole := self._whole_tensors(call, tensors):
                add_(projection, whole, own.to(whole[0].device), redraw, call.start)
                continue
            start = call.start
            for piece in call.pieces:
                with flat(tensors[piece.tensor], piece, self._kept(piece)) as part:
                    add_(projection, [part], own.to(part.device), redraw, start)
                start += len(piece)

    def _own(self, coordinates: Tensor) -> Tensor:
        """Return this compartment's part of (d,); no slice where it is all of them."""
        return coordinates if len(coordinates) == self.compartment.dim else coordinates[self.place]

    def vectors(self, coordinates: Tensor, basis: int, redraw: Tensor) -> dict[str, Tensor]:
        """Return P c as tensors by name, in the tensors' shapes: zero outside this compartment."""
        zeros = {
            piece.tensor: torch.zeros_like(self.tensors[piece.tensor])
            for piece in self.compartment.pieces
        }
        self.add_weights(coordinates, basis, redraw, tensors=zeros)
        return zeros

    def _whole_tensors(self, call: Block, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the tensors of a call if each can be changed as it is, at once; else none."""
        whole, memories = [], set()
        for piece in call.pieces:
            name = piece.tensor
            tensor = tensors[name]
            if tensor.numel() != piece.stop - piece.start or not tensor.is_contiguous():
                return []
            if name in self.kept:
                return []
            whole.append(tensor)
            memories.add(tensor.untyped_storage().data_ptr())
        return whole if len(memories) == len(whole) else []

    def _entries(self, vector: Tensor, piece: Piece) -> Tensor:
        """Return the entries of a piece, in any shape, with zeros where weights are kept."""
        part = entries(vector, piece)
        if piece.tensor not in self.kept:
            return part
        part, kept = part.reshape(-1), self._kept(piece)
        if bool(part[kept].any()):  # seldom: the gradient of a padding row is zero
            part = part.clone()
            part[kept] = 0
        return part

    def _kept(self, piece: Piece) -> slice:
        """Return which entries of a piece are kept."""
        inside = entries_inside(self.kept.get(piece.tensor, range(0)), piece)
        return slice(inside.start, inside.stop)


@contextlib.contextmanager
def flat(tensor: Tensor, piece: Piece, kept: slice) -> Iterator[Tensor]:
    """Lend entries of a tensor in any order of memory as a contiguous vector, to be changed.

    Those that are kept are put back in the end.
    """
    tensor = tensor.detach()
    whole = tensor.contiguous().reshape(-1)  # `reshape` alone would leave a vector with gaps
    part = whole[piece.start : piece.stop]
    before = part[kept].clone() if kept.stop > kept.start else None
    yield part
    if before is not None:
        part[kept] = before
    if not tensor.is_contiguous():
        tensor.copy_(whole.view(tensor.shape))


def entries(tensor: Tensor, piece: Piece) -> Tensor:
    """Return the entries of a piece of a tensor, sparse or not; all of them in its shape."""
    dense = (tensor.to_dense() if tensor.is_sparse else tensor).detach()
    if len(piece) == dense.numel():
        return dense
    return dense.reshape(-1)[piece.start : piece.stop]
