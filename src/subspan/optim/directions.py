"""The random bases of a training: which weights they move, where, and when they are redrawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subspan import families
from subspan.families.operator import as_step
from subspan.optim.compartment import CompartmentWeights
from subspan.subspace.compartments import Compartment, Rules, partition


class Move(NamedTuple):
    """One step: its number, the rate of each group, and (bases, d) coordinates before the rate."""

    step: int
    rates: tuple[float, ...]
    coordinates: Tensor


@dataclass(frozen=True)
class Directions:
    """All compartments of an optimizer's weights, group by group."""

    compartments: tuple[CompartmentWeights, ...]  # their coordinates follow each other
    sizes: tuple[int, ...]  # the number of coordinates of each group
    bases: int  # how many bases a step has: 1, or one for each independent worker
    redraw_every: int | None  # steps until the next basis; None keeps the first

    @staticmethod
    def draw(
        groups: Sequence[tuple[Mapping[str, Tensor], Sequence[Compartment]]],
        family: str,
        seed: int,
        bases: int,
        redraw_every: int | None,
        options: Mapping[str, Any],
        kept: Mapping[str, range],
    ) -> Directions:
        """Draw the bases of some weights.

        Basis b of compartment k of K takes stream b·K + k: a single basis has those of a
        :class:`~subspan.subspace.SubspaceModel`. Groups are tensors by name, with their
        compartments; ``kept`` are entries of some tensors that never move.
        """
        total = sum(len(compartments) for _, compartments in groups)
        weights: list[CompartmentWeights] = []
        begin = 0
        for tensors, compartments in groups:
            for compartment in compartments:
                projections = tuple(
                    families.projection(
                        family,
                        out_dim=compartment.weights,
                        in_dim=compartment.dim,
                        seed=seed,
                        stream=basis * total + len(weights),
                        **options,
                    )
                    for basis in range(bases)
                )
                inside = {piece.tensor: tensors[piece.tensor] for piece in compartment.pieces}
                still = {name: entries for name, entries in kept.items() if name in inside}
                weights.append(CompartmentWeights(compartment, projections, inside, begin, still))
                begin += compartment.dim
        sizes = tuple(sum(part.dim for part in compartments) for _, compartments in groups)
        return Directions(tuple(weights), sizes, bases, redraw_every)

    @staticmethod
    def from_description(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Directions:
        """Return the directions of :meth:`described`, over tensors by name."""
        return Directions(
            tuple(CompartmentWeights.from_description(d, tensors) for d in described["parts"]),
            tuple(described["groups"]),
            described["bases"],
            described["redraw_every"],
        )

    def described(self) -> dict[str, Any]:
        """Return everything but the tensors, as JSON."""
        return {
            "parts": [weights.described() for weights in self.compartments],
            "groups": list(self.sizes),
            "bases": self.bases,
            "redraw_every": self.redraw_every,
        }

    def layout(self) -> str:
        """Return a digest of what coordinates mean: projections, their rows' weights, redraws."""
        described = self.described()
        text = json.dumps((described["parts"], described["redraw_every"]), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def compartments_of(self, group: int) -> list[CompartmentWeights]:
        """Return the compartments of a group."""
        begin = sum(self.sizes[:group])
        end = begin + self.sizes[group]
        return [weights for weights in self.compartments if begin <= weights.begin < end]

    def redraw(self, step: int) -> Tensor:
        """Return the number of the basis that a step is made in, 0-D int64."""
        every = self.redraw_every
        return as_step(0 if every is None else step // every)

    def move(self, move: Move, redraw: Tensor) -> None:
        """Make a step: θ ← θ − η P v, for every basis and every group with its own rate."""
        _, rates, coordinates = move
        if len(rates) == 1:
            lengths = coordinates * -rates[0]
        else:
            along = coordinates.split(self.sizes, dim=1)
            lengths = torch.cat([c * -rate for c, rate in zip(along, rates, strict=True)], dim=1)
        for basis, own in enumerate(lengths.unbind()):
            for weights in self.compartments:
                weights.add_weights(own, basis, redraw)


def divide(
    tensors: Mapping[str, Tensor], dim: int | Sequence[int] | None, rules: Rules, allocation: str
) -> tuple[Compartment, ...]:
    """Divide tensors into compartments, by :func:`subspan.subspace.compartments.partition`."""
    sizes = {name: tensor.numel() for name, tensor in tensors.items() if tensor.numel()}
    return partition(sizes, {name: [name] for name in tensors}, dim, rules, allocation)
