"""Results of others with few numbers or bytes: ``known.yaml``, whose head explains them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

import yaml

from subspan.training.schema import from_json


@dataclass(frozen=True)
class KnownResult:
    """A work of somebody else, and the points that it has in the picture."""

    name: str  # as it stands in the picture
    source: str  # where the figures are
    status: str  # "read" at their authors', or "quoted" by others
    how: str  # what the figures are, as a mean of five runs
    # Accuracy in %, the numbers that are stored, and the bytes; None where unknown.
    points: tuple[tuple[float | None, ...], ...]

    def __post_init__(self) -> None:
        if self.status not in ("read", "quoted"):
            raise ValueError(f"status must be read or quoted, got {self.status}")
        for point in self.points:
            if len(point) != 3 or point[0] is None or point[1:] == (None, None):
                raise ValueError(f"a point is [accuracy, numbers, bytes], got {list(point)}")

    def at(self, size: str) -> list[tuple[float, float]]:
        """Return size and accuracy in % of the points whose "numbers" or "bytes" are known."""
        place = {"numbers": 1, "bytes": 2}[size]
        return [
            (where, point[0])
            for point in self.points
            if (where := point[place]) is not None and point[0] is not None
        ]


@functools.cache
def known_results() -> Mapping[str, list[KnownResult]]:
    """Return what is known, by the name of the data."""
    text = resources.files(__package__).joinpath("known.yaml").read_text(encoding="utf-8")
    return from_json(dict[str, list[KnownResult]], yaml.safe_load(text))
