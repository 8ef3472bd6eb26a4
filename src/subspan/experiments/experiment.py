"""A published experiment: what is run, and the numbers that it is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from subspan.bench import Bench
from subspan.errors import SubspanError, unknown
from subspan.sweeps.result import Published as Published
from subspan.training.config import Sweep

Budget = Literal["quick", "full"]
Choice = TypeVar("Choice")


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

    def parts(self, budget: Budget, only: Sequence[str] = ()) -> dict[str, Sweep]:
        """Return the sweeps by the name of their part.

        Args:
            budget: which.
            only: the parts that are wanted; all if it is empty.

        Raises:
            SubspanError: for a budget that is none, and for a part that the budget does not run.
        """
        parts = dict(_of_budget(self.sweeps, budget))
        for part in only:
            if part not in parts:
                raise unknown(f"part of {self.name} ({budget})", part, filter(None, parts))
        return {part: sweep for part, sweep in parts.items() if not only or part in only}


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
        """Return what to measure within a budget.

        Raises:
            SubspanError: for a budget that is none.
        """
        return _of_budget(self.benches, budget)


def _of_budget(choices: Mapping[Budget, Choice], budget: Budget) -> Choice:
    if budget not in choices:
        raise SubspanError(f"budget must be {' or '.join(choices)}, got {budget!r}")
    return choices[budget]
