"""A summary of a model: which tensors are trained, and through how many numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from subspan.subspace.compartments import Compartment
from subspan.subspace.links import is_ours


@dataclass(frozen=True)
class TensorSummary:
    """One tensor of a network."""

    tensor: str  # its (first) name
    shape: tuple[int, ...]
    weights: int  # its entries
    compartment: str  # of its coordinates; "fully trained" or "frozen" where it has none
    coordinates: int  # of the compartment, for all of its tensors; own entries if fully trained

    @classmethod
    def of(
        cls, name: str, shape: torch.Size, fully: bool, parts: Sequence[Compartment]
    ) -> TensorSummary:
        """Summarise a tensor that lies in these compartments."""
        label = ", ".join(part.name for part in parts) or ("fully trained" if fully else "frozen")
        numbers = shape.numel() if fully else sum(part.dim for part in parts)
        return cls(name, tuple(shape), shape.numel(), label, numbers)


@dataclass(frozen=True)
class Summary:
    """The rows of a model; ``str`` of it is a table."""

    rows: tuple[TensorSummary, ...]
    coordinates: int

    @property
    def weights(self) -> int:
        """All weights of the network, tied ones once, frozen ones too; LoRA factors are none."""
        return sum(row.weights for row in self.rows if not is_ours(row.tensor))

    @property
    def trainable(self) -> int:
        """Coordinates and the entries of what is trained fully."""
        fully = sum(row.weights for row in self.rows if row.compartment == "fully trained")
        return self.coordinates + fully

    def line(self) -> str:
        """PEFT's line of counts."""
        share = 100 * self.trainable / self.weights
        return (
            f"trainable params: {self.trainable:,} || all params: {self.weights:,} || "
            f"trainable%: {share:.4f}"
        )

    def __str__(self) -> str:
        head = ("tensor", "shape", "weights", "compartment", "coordinates")
        body = [
            (
                r.tensor,
                "×".join(map(str, r.shape)) or "scalar",
                f"{r.weights:,}",
                r.compartment,
                f"{r.coordinates:,}",
            )
            for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        numeric = (False, False, True, False, True)
        lines = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, numeric, strict=True)
            ).rstrip()
            for row in (head, *body)
        ]
        lines.insert(1, "─" * max(map(len, lines)))
        return "\n".join([*lines, self.line(), "tensors of one compartment share its coordinates"])
