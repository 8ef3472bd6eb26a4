"""A published experiment: what is run, and the numbers that it is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from subspan.bench import Bench
from subspan.errors import SubspanError
from subspan.training.config import Sweep

Budget = Literal["quick", "full"]
Choice = TypeVar("Choice")


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published curve: accuracies (fractions) at numbers of coordinates."""

    label: str
    dims: tuple[int, ...] = ()
    """One for each accuracy; none where only ``labels`` are known."""
    labels: tuple[str, ...] = ()
    """Values of the method's axis by which points are compared, where counts are an outcome."""
    accuracy: tuple[float, ...]
    baseline: float | None = None
    d_int: int | float | None = None
    method: str | None = None
    """The one method that it is to be compared with; None for all."""

    def __post_init__(self) -> None:
        for name, points, other in (
            ("dims", self.dims, self.labels),
            ("labels", self.labels, self.dims),
        ):
            if len(points) != len(self.accuracy) and (points or not other):
                raise SubspanError(
                    f"{name} has {len(points)} entries and accuracy {len(self.accuracy)}: give "
                    "one for each"
                )
        for accuracy in (*self.accuracy, *([] if self.baseline is None else [self.baseline])):
            if not 0 <= accuracy <= 1:
                raise SubspanError(f"an accuracy is a fraction in [0, 1], got {accuracy}")
        if any(dim < 1 for dim in self.dims):
            raise SubspanError(f"dims must be at least 1, got {min(self.dims)}")

    def as_dict(self) -> dict[str, Any]:
        """As it stands in ``sweep.json``."""
        return {
            "label": self.label,
            "dims": list(self.dims),
            "accuracy": list(self.accuracy),
            "baseline": self.baseline,
            "d_int": self.d_int,
            "method": self.method,
            "labels": list(self.labels),
        }


@dataclass(frozen=True)
class Experiment:
    """One published experiment: a sweep, or several.

    Args:
        name: what people type.
        title: one line.
        source: the paper.
        differences: what is not as published, and why.
        sweeps: by budget, the sweeps by the name of their part; a single one has the name "".
            "quick" ends within ten minutes on two cores, "full" uses the published recipe.
        published: the numbers to hold ours against, by part.
        timed: whether the runs' times are a result: they run one at a time then.
        file: the user's file that it was read from; empty for one of the package.
        places: the file and line of each part, likewise.
    """

    name: str
    title: str
    source: str
    differences: str
    sweeps: Mapping[Budget, Mapping[str, Sweep]]
    published: Mapping[str, tuple[Published, ...]] = field(default_factory=dict)
    timed: bool = False
    file: str = ""
    places: Mapping[str, str] = field(default_factory=dict)

    def parts(self, budget: Budget) -> dict[str, Sweep]:
        """The sweeps by the name of their part.

        Raises:
            SubspanError: for a budget that is none.
        """
        return dict(_of_budget(self.sweeps, budget))


@dataclass(frozen=True)
class Benchmark:
    """A published measurement of times: an ordinary benchmark.

    Args:
        name: what people type.
        title: one line.
        source: the paper, and its numbers.
        differences: what is not as published, and why.
        benches: what to measure by budget.
        file: as of :class:`Experiment`.
    """

    name: str
    title: str
    source: str
    differences: str
    benches: Mapping[Budget, Bench]
    file: str = ""

    def bench(self, budget: Budget) -> Bench:
        """What to measure.

        Raises:
            SubspanError: for a budget that is none.
        """
        return _of_budget(self.benches, budget)


def _of_budget(choices: Mapping[Budget, Choice], budget: Budget) -> Choice:
    if budget not in choices:
        raise SubspanError(f"budget must be {' or '.join(choices)}, got {budget!r}")
    return choices[budget]
