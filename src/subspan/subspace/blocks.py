"""Blocks: the rows of P that are computed together, for consecutive pieces of tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

from torch import nn

from subspan.families.base import Projection
from subspan.subspace.compartments import Compartment, Piece

GROUP = 1 << 20  # weights up to which a block has the rows of several tensors


@dataclass(frozen=True)
class Block:
    """Rows start … stop−1 of a projection, one row for each weight of consecutive pieces."""

    coordinates: str
    recipe: str
    start: int
    stop: int
    pieces: tuple[Piece, ...]
    kept: tuple[range, ...]
    """Entries of each piece that stay at θ₀ whatever the coordinates are; empty for most."""


def group_into_blocks(
    compartments: Sequence[Compartment],
    projections: Sequence[Projection],
    kept: Mapping[str, range] | None = None,
) -> tuple[Block, ...]:
    """Group rows of P: small tensors share a block; a family that is not local has one block.

    ``kept`` has the entries of flattened tensors that stay at θ₀.
    """
    kept = kept or {}
    blocks = []
    for part, projection in zip(compartments, projections, strict=True):
        limit = GROUP if projection.local else part.weights
        start = stop = 0
        group: list[Piece] = []
        for piece in (*part.pieces, None):
            if group and (piece is None or stop - start + len(piece) > limit):
                inside = tuple(entries_inside(kept.get(p.tensor, range(0)), p) for p in group)
                blocks.append(
                    Block(
                        parameter_key(part.name),
                        projection.recipe,
                        start,
                        stop,
                        tuple(group),
                        inside,
                    )
                )
                start, group = stop, []
            if piece is not None:
                group.append(piece)
                stop += len(piece)
    return tuple(blocks)


def split_by_tensor(blocks: Sequence[Block]) -> dict[str, list[Block]]:
    """Return blocks for each tensor alone, one for each of its pieces."""
    alone: dict[str, list[Block]] = {}
    for block in blocks:
        start = block.start
        for piece, kept in zip(block.pieces, block.kept, strict=True):
            stop = start + len(piece)
            one = replace(block, start=start, stop=stop, pieces=(piece,), kept=(kept,))
            alone.setdefault(piece.tensor, []).append(one)
            start = stop
    return alone


def slice_of(block: Block, entries: range) -> Block:
    """Return the rows of a block for some entries of the one piece that it has."""
    (piece,), (kept,) = block.pieces, block.kept
    start, stop = piece.start + entries.start, piece.start + entries.stop
    own = Piece(piece.tensor, start, stop)
    inside = entries_inside(range(piece.start + kept.start, piece.start + kept.stop), own)
    start, stop = block.start + entries.start, block.start + entries.stop
    return replace(block, start=start, stop=stop, pieces=(own,), kept=(inside,))


def group_small(alone: Mapping[str, Sequence[Block]], limit: int) -> list[tuple[Block, ...]]:
    """Group blocks with the same coordinates, of tensors of at most ``limit`` weights."""
    groups: dict[str, list[Block]] = {}
    for blocks in alone.values():
        if sum(len(block.pieces[0]) for block in blocks) <= limit:
            for block in blocks:
                groups.setdefault(block.coordinates, []).append(block)
    return [tuple(group) for group in groups.values()]


def find_in_groups(groups: Sequence[Sequence[Block]]) -> dict[str, list[tuple[int, int]]]:
    """For every tensor: the groups that have its pieces, and which results of them are these."""
    places: dict[str, list[tuple[int, int]]] = {}
    for n, group in enumerate(groups):
        pieces = [piece for block in group for piece in block.pieces]
        for m, piece in enumerate(pieces):
            places.setdefault(piece.tensor, []).append((n, m))
    return places


def entries_inside(kept: range, piece: Piece) -> range:
    """Return the kept entries that lie in a piece of a tensor, counted from its start."""
    start, stop = max(kept.start, piece.start), min(kept.stop, piece.stop)
    return range(start - piece.start, stop - piece.start) if start < stop else range(0)


def parameter_key(compartment: str) -> str:
    """Turn a compartment's name into that of a parameter, where a dot would mean a submodule."""
    name = compartment.replace("%", "%25").replace("/", "%2F").replace(".", "/")
    return name + "/" if hasattr(nn.ParameterDict(), name) else name


def digest_layout(
    compartments: Sequence[Compartment], projection: str, seed: int, options: Mapping[str, Any]
) -> str:
    """Digest what w means: the family, and which weights the rows of each compartment belong to."""
    rows = [[part.dim, [astuple(piece) for piece in part.pieces]] for part in compartments]
    text = json.dumps([projection, seed, options, rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
