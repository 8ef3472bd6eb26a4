"""The rule for ranks after a step: a tolerance, or a target for the whole network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from subspan.errors import SubspanError, is_integer
from subspan.linalg import rank_of

Shapes = Mapping[str, tuple[int, int]]  # (n, m) of every layer
LEAST = {  # of what is a number of ranks or steps
    "min_rank": 1,
    "max_rank": 1,
    "rank_every": 1,
    "tolerance_warmup": 0,
    "adapt_from": 0,
    "freeze_after": 1,
}
OPTIONAL = ("max_rank", "freeze_after")


@dataclass(frozen=True)
class RankRule:
    """The steps in which ranks may change, and the ranks after them; arguments as of ``DLRT``.

    Raises:
        SubspanError: for a value that makes no sense.
    """

    tolerance: float | None = None
    target_ratio: float | None = None
    min_rank: int = 1
    max_rank: int | None = None
    tolerance_warmup: int = 0
    adapt_from: int = 0
    rank_every: int = 1
    freeze_after: int | None = None

    def __post_init__(self) -> None:
        if self.tolerance is not None and self.target_ratio is not None:
            raise SubspanError("give a tolerance or a target_ratio, not both")
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise SubspanError(f"tolerance must be in [0, 1), got {self.tolerance}")
        if self.target_ratio is not None and not 0 < self.target_ratio < 1:
            raise SubspanError(f"target_ratio must be in (0, 1), got {self.target_ratio}")
        if self.target_ratio is not None and not self.freeze_after:
            raise SubspanError("target_ratio needs freeze_after, the steps until it is reached")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if not (is_integer(value, least) or (value is None and name in OPTIONAL)):
                raise SubspanError(f"{name} must be an integer >= {least}, got {value!r}")
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise SubspanError(
                f"max_rank must be at least min_rank {self.min_rank}, got {self.max_rank}"
            )
        if self.freeze_after is not None and self.freeze_after <= self.adapt_from:
            raise SubspanError(
                f"freeze_after {self.freeze_after} must be later than adapt_from {self.adapt_from}"
            )

    @property
    def adapts(self) -> bool:
        """Whether ranks ever change."""
        return self.tolerance is not None or self.target_ratio is not None

    def may_change(self, step: int) -> bool:
        """Return whether ranks may change in a step, counted from 0."""
        frozen = self.freeze_after is not None and step >= self.freeze_after
        since = step - self.adapt_from
        return self.adapts and not frozen and since >= 0 and since % self.rank_every == 0

    def ranks(
        self, step: int, singular_values: Mapping[str, Tensor], shapes: Shapes, begun_with: int
    ) -> dict[str, int]:
        """Return the ranks after a step, counted from 0.

        Singular values are in descending order; ``begun_with`` is the sum of r (n + m) before ranks
        first changed. A ``min_rank`` that keeps the network above the target is refused.
        """

        def by(tolerance: float) -> dict[str, int]:
            return {
                name: self._bounded(rank_of(values, tolerance), len(values), shapes[name])
                for name, values in singular_values.items()
            }

        if self.target_ratio is None:
            warmth = min(1.0, (step + 1) / (self.tolerance_warmup + 1))
            return by((self.tolerance or 0.0) * warmth)
        return self._within(self._budget(step, shapes, begun_with), by, shapes)

    def _bounded(self, rank: int, available: int, shape: tuple[int, int]) -> int:
        """Return a rank within all bounds, of which the singular values available are one."""
        most = min(available, *shape)
        if self.max_rank is not None:
            most = min(most, self.max_rank)
        return min(max(rank, self.min_rank), most)

    def _budget(self, step: int, shapes: Shapes, begun_with: int) -> float:
        """Return how many numbers layers may have after a step: a cubic from first to target."""
        assert self.freeze_after is not None
        target = self._target(shapes)
        # The last of these steps is at the target itself.
        span = self.freeze_after - 1 - self.adapt_from
        last = span // self.rank_every * self.rank_every
        to_go = max(0.0, 1 - (step - self.adapt_from) / last) if last else 0.0
        return target + max(0.0, begun_with - target) * to_go**3

    def _target(self, shapes: Shapes) -> float:
        assert self.target_ratio is not None
        return (1 - self.target_ratio) * sum(math.prod(shape) for shape in shapes.values())

    def _within(
        self, budget: float, by: Callable[[float], dict[str, int]], shapes: Shapes
    ) -> dict[str, int]:
        """Return the ranks at the least common tolerance that a budget of numbers allows."""

        def numbers(tolerance: float) -> int:
            return sum(r * sum(shapes[name]) for name, r in by(tolerance).items())

        if numbers(1.0) > budget:
            raise SubspanError(
                f"target_ratio {self.target_ratio} leaves {self._target(shapes):,.0f} numbers, but "
                f"min_rank {self.min_rank} takes {numbers(1.0):,}: lower one of them"
            )
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if numbers(middle) > budget else (low, middle)
        return by(high)
