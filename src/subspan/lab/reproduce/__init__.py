"""Published experiments, one file each: the source, the recipe, the published numbers.

An experiment is an ordinary sweep; what it found and what was published stand side by side in the
sweep's report. A file in this folder that makes an :class:`Experiment` has added it.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from subspan.errors import SubspanError, unknown
from subspan.lab import report
from subspan.lab.config import Sweep
from subspan.lab.sweep import Outcome, sweep

Budget = Literal["quick", "full"]

_registry: dict[str, Experiment] = {}


@dataclass(frozen=True)
class Published:
    """A published curve: accuracies (fractions) at numbers of coordinates."""

    label: str
    dims: tuple[int, ...]
    accuracy: tuple[float, ...]
    baseline: float | None = None
    d_int: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """As it stands in ``sweep.json``."""
        return {
            "label": self.label, "dims": list(self.dims), "accuracy": list(self.accuracy),
            "baseline": self.baseline, "d_int": self.d_int,
        }  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """One published experiment.

    Args:
        name: what people type.
        title: one line.
        source: the paper.
        differences: what is not as published, and why.
        published: the numbers to hold ours against.
        sweeps: the configuration by budget; "quick" ends within ten minutes on two cores, "full"
            uses the published recipe.
        timed: whether the runs' times are a result: they run one at a time then.
    """

    name: str
    title: str
    source: str
    differences: str
    published: tuple[Published, ...]
    sweeps: Mapping[Budget, Sweep]
    timed: bool = False

    def __post_init__(self) -> None:
        _registry[self.name] = self


@functools.cache
def experiments() -> dict[str, Experiment]:
    """All experiments by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(_registry.items()))


def experiment(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        SubspanError: if there is none, with the nearest names.
    """
    if name not in experiments():
        raise unknown("experiment", name, experiments())
    return experiments()[name]


def reproduce(
    name: str, out: Path, *, budget: Budget = "quick", jobs: int = -1, overwrite: bool = False,
    on_run: Callable[[Outcome, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run an experiment and write its report, published and measured side by side.

    Returns:
        The content of ``sweep.json``.

    Raises:
        SubspanError: for an unknown name or budget.
    """
    chosen = experiment(name)
    if budget not in chosen.sweeps:
        raise SubspanError(f"budget must be quick or full, got {budget!r}")
    if chosen.timed:
        if jobs > 1:
            raise SubspanError(f"{name} times its runs: one at a time, not --jobs {jobs}")
        jobs = 1
    extra = {
        "experiment": {
            "name": name, "budget": budget, "title": chosen.title,
            "source": chosen.source, "differences": chosen.differences,
        },
        "published": [curve.as_dict() for curve in chosen.published],
    }  # fmt: skip
    result = sweep(
        chosen.sweeps[budget], out, jobs=jobs, overwrite=overwrite, on_run=on_run, extra=extra
    )
    report.write(out)
    return result
