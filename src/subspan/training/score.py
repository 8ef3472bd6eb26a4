"""A score: the number that judges a task, its direction, and the zero that shares count from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from subspan.errors import SubspanError


@dataclass(frozen=True)
class Score:
    """A score's name, its direction, and where it begins.

    Attributes:
        name: in words, as they stand on an axis.
        higher_is_better: its direction.
        zero: what is reached by doing nothing: 0 is accuracy's, by the definition of Li 2018; of a
            relative error it is 1. A share of a score is a share of the way from there.
        percent: whether it is a fraction that people read in per cent.
    """

    name: str = "accuracy"
    higher_is_better: bool = True
    zero: float = 0.0
    percent: bool = True

    def checked(self, given: Any) -> float:
        """Check that a value is finite and, where this score is a fraction, lies in [0, 1].

        Raises:
            SubspanError: for any other.
        """
        try:
            value = float(given)
        except (TypeError, ValueError, RuntimeError):
            raise SubspanError(f"the task's score must be a number, got {given!r}") from None
        if not math.isfinite(value):
            raise SubspanError(
                f"the task's score must be a finite number, got {value}: where a training has "
                "spoiled its weights, lower the learning rate (--lr)"
            )
        if self.percent and self.higher_is_better and not 0 <= value <= 1:
            raise SubspanError(
                f"the task's score, {self.name}, must be a fraction in [0, 1] where people read "
                f"it in per cent, got {value}: divide it, or give Score(percent=False)"
            )
        return value

    def better(self, one: float, other: float) -> bool:
        """Return whether one score is better than another."""
        return one > other if self.higher_is_better else one < other

    def share(self, of: float, share: float) -> float:
        """Return the score that is a share of another: that share of the way from zero to it."""
        return self.zero + share * (of - self.zero)

    @property
    def scale(self) -> float:
        """The factor between a score and the number that people read, 100 for percentages."""
        return 100.0 if self.percent else 1.0

    @property
    def unit(self) -> str:
        """The text after the name, on an axis or above a column."""
        return " (%)" if self.percent else ""

    def summary(self, values: Sequence[float]) -> str:
        """Show the mean of one or more scores, and of several the standard deviation."""
        digits = "{:.2f}" if self.percent else "{:.4g}"
        mean = digits.format(self.scale * statistics.fmean(values))
        if len(values) == 1:
            return mean
        return f"{mean} ± {digits.format(self.scale * statistics.stdev(values))}"

    def show(self, value: float, digits: int = 2) -> str:
        """Show a score to people: 98.85 %, or 0.0123 where it is no fraction."""
        return f"{100 * value:.{digits}f} %" if self.percent else f"{value:.{digits + 2}g}"


ACCURACY = Score()
