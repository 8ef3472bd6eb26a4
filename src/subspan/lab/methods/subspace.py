"""Fixed random subspaces, θ = θ₀ + P w (Li 2018, Minut 2023): one method per family of projections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from subspan.errors import SubspanError
from subspan.families import Projection, projections
from subspan.lab.methods import Method, Option
from subspan.subspace import SubspaceModel

PATTERNS = str | list[str] | None

COMMON = (
    Option("dim", int | str, "d, the coordinates in all; or 600+250: those of each compartment"),
    Option(
        "compartments", str | dict[str, int],
        "global | layer | tensor | uniform:k, or {pattern: dimension}",
    ),
    Option("allocation", str, "how d is divided between compartments: sqrt of their size, equal, size"),
    Option("targets", PATTERNS, "patterns of the parameters to train; the others keep θ₀"),
    Option("exclude", PATTERNS, "patterns of parameters that keep θ₀"),
    Option("train_fully", PATTERNS, "patterns of parameters to train and store as they are"),
)  # fmt: skip
FAMILY = {
    "s": Option("s", float | str, "rows per nonzero: 3 (Achlioptas), sqrt_d or sqrt_D (Li 2006)"),
    "of": Option("of", str, "the family whose matrix is stored"),
    "layout": Option("layout", str, "dense, coo, csr or csc"),
    "qr": Option("qr", bool, "orthonormalise the columns"),
}


class Subspace(Method):
    """A :class:`SubspaceModel` with one family of projections."""

    axis = "dim"
    # Columns have norm 1, so one step moves θ by lr at most in every direction of the basis.
    lrs = (0.03, 0.1, 0.3)

    def __init__(self, family: type[Projection]) -> None:
        first_line = (family.__doc__ or "").partition("\n")[0]
        super().__init__(family.family, f"θ₀ + P w: {first_line}")
        own = {f.name for f in fields(family)} - {f.name for f in fields(Projection)}
        self.options = COMMON + tuple(option for name, option in FAMILY.items() if name in own)

    def wrap(self, net: nn.Module, seed: int, options: Mapping[str, Any]) -> SubspaceModel:
        """Put the network into the subspace."""
        options = dict(options)
        if "dim" in options:
            options["dim"] = parse_dim(options["dim"])
        elif not isinstance(options.get("compartments"), Mapping):
            raise SubspanError(f"method {self.name!r} needs --dim, the number of coordinates")
        return SubspaceModel(net, projection=self.name, seed=seed, **options)

    def counts(self, model: nn.Module) -> dict[str, int]:
        """Coordinates, what is trained fully, and buffers that training changed."""
        assert isinstance(model, SubspaceModel)
        summary = model.summary()
        buffers = sum(b.numel() for b in model.changed_buffers().values())
        return {
            "trainable_parameters": summary.trainable,
            "stored_parameters": summary.trainable + buffers,
            "weights": summary.weights,
        }


def parse_dim(text: object) -> int | list[int]:
    """750 → 750, "600+250" → [600, 250].

    Raises:
        SubspanError: for anything that is no positive integer or sum of such.
    """
    try:
        dims = [int(part) for part in str(text).split("+")]
    except ValueError:
        dims = []
    if not dims or min(dims) < 1:
        raise SubspanError(
            f"dim must be a positive integer, or a sum such as 600+250 of those of the compartments, "
            f"got {text!r}"
        )
    return dims if "+" in str(text) else dims[0]


for _family in projections().values():
    Subspace(_family)
