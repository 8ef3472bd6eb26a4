"""How the products of a model are grouped into calls, and how a network runs with other weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from subspan.compartments import Compartment, Piece
from subspan.errors import SubspanError
from subspan.families.base import Projection

GROUP = 1 << 20  # weights up to which one call of the operator serves several tensors


@dataclass(frozen=True)
class Call:
    """One call of the operator: rows start … stop−1 of a projection, for consecutive pieces."""

    coordinates: str
    recipe: str
    start: int
    stop: int
    pieces: tuple[Piece, ...]


def plan(
    compartments: Sequence[Compartment], projections: Sequence[Projection]
) -> tuple[Call, ...]:
    """Small tensors share a call; a family that computes all rows at once is called once."""
    calls = []
    for part, projection in zip(compartments, projections, strict=True):
        limit = GROUP if projection.local else part.weights
        start = stop = 0
        group: list[Piece] = []
        for piece in (*part.pieces, None):
            if group and (piece is None or stop - start + len(piece) > limit):
                calls.append(Call(key(part.name), projection.recipe, start, stop, tuple(group)))
                start, group = stop, []
            if piece is not None:
                group.append(piece)
                stop += len(piece)
    return tuple(calls)


def key(compartment: str) -> str:
    """A compartment's name as a parameter's: dots would be read as submodules."""
    name = compartment.replace("%", "%25").replace("/", "%2F").replace(".", "/")
    return name + "/" if hasattr(nn.ParameterDict(), name) else name


def layout(
    compartments: Sequence[Compartment], projection: str, seed: int, options: Mapping[str, Any]
) -> str:
    """Digest of what w means: the family, and which weights the rows of each compartment are."""
    rows = [[part.dim, [astuple(piece) for piece in part.pieces]] for part in compartments]
    text = json.dumps([projection, seed, options, rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Method(nn.Module):
    """Any method of a module as a ``forward``, which is what ``functional_call`` calls."""

    def __init__(self, body: nn.Module, name: str) -> None:
        super().__init__()
        self.body, self.name = body, name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The method's result."""
        if self.name == "forward":
            return self.body(*args, **kwargs)  # runs hooks
        return getattr(self.body, self.name)(*args, **kwargs)


def refuse_reentrant_checkpoints(arguments: Any, out: Any) -> None:
    """Refuse what ``torch.utils.checkpoint(…, use_reentrant=True)`` made between these tensors.

    The backward pass would run those parts again, at θ₀, and θ would get no gradient from them.
    (Without reentrance torch itself notices that something else is recomputed.)
    """
    before, after = (
        {t.grad_fn for t in tree_leaves(tree) if isinstance(t, Tensor) and t.grad_fn}
        for tree in (arguments, out)
    )
    nodes, seen = list(after - before), before | after
    while nodes:
        node = nodes.pop()
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise SubspanError(
                "activation checkpointing runs the network again without its trained weights: "
                "switch it off for a SubspaceModel"
            )
        new = {before for before, _ in node.next_functions if before} - seen
        seen |= new
        nodes += new
