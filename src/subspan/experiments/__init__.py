"""Published experiments, one file each: the source, the recipe, the published numbers.

An experiment is an ordinary sweep; what it found and what was published stand side by side in the
sweep's report. A file in this folder that makes an :class:`Experiment` has added it.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from subspan import report
from subspan.bench import Bench, bench, picture
from subspan.errors import SubspanError, unknown
from subspan.experiments import published
from subspan.experiments.many import sweep_parts
from subspan.sweeps import backends
from subspan.sweeps.job import Outcome
from subspan.sweeps.result import Provenance
from subspan.sweeps.result import Published as Published
from subspan.training.config import Sweep

Budget = Literal["quick", "full"]
Choice = TypeVar("Choice")

_registry: dict[str, Experiment | Timing] = {}


def _register(experiment: Experiment | Timing) -> None:
    if experiment.name in _registry:
        raise TypeError(f"an experiment named {experiment.name!r} is registered already")
    _registry[experiment.name] = experiment


@dataclass(frozen=True)
class Experiment:
    """One published experiment.

    Args:
        name: what people type.
        title: one line.
        source: the paper.
        differences: what is not as published, and why.
        published: the numbers to hold ours against; by part, if there are parts.
        sweeps: the configuration by budget; "quick" ends within ten minutes on two cores, "full"
            uses the published recipe. An experiment of several parts has a sweep for each by name.
        timed: whether the runs' times are a result: they run one at a time then.
    """

    name: str
    title: str
    source: str
    differences: str
    published: tuple[Published, ...] | Mapping[str, tuple[Published, ...]]
    sweeps: Mapping[Budget, Sweep | Mapping[str, Sweep]]
    timed: bool = False

    def __post_init__(self) -> None:
        _register(self)

    def parts(self, budget: Budget) -> dict[str, Sweep]:
        """The sweeps by the name of their part; a single one has none.

        Raises:
            SubspanError: for a budget that is none.
        """
        found = _of_budget(self.sweeps, budget)
        return {"": found} if isinstance(found, Sweep) else dict(found)

    def published_of(self, part: str) -> tuple[Published, ...]:
        """What a part is held against."""
        found = self.published
        return found.get(part, ()) if isinstance(found, Mapping) else found


@dataclass(frozen=True)
class Timing:
    """A published measurement of times: an ordinary benchmark.

    Args:
        name: what people type.
        title: one line.
        source: the paper, and its numbers.
        differences: what is not as published, and why.
        benches: what to measure by budget.
    """

    name: str
    title: str
    source: str
    differences: str
    benches: Mapping[Budget, Bench]

    def __post_init__(self) -> None:
        _register(self)

    def bench(self, budget: Budget) -> Bench:
        """What to measure.

        Raises:
            SubspanError: for a budget that is none.
        """
        return _of_budget(self.benches, budget)


def _of_budget(choices: Mapping[Budget, Choice], budget: Budget) -> Choice:
    if budget not in choices:
        raise SubspanError(f"budget must be quick or full, got {budget!r}")
    return choices[budget]


@functools.cache
def experiments() -> dict[str, Experiment | Timing]:
    """All experiments by name."""
    for module in pkgutil.iter_modules(published.__path__):
        importlib.import_module(f"{published.__name__}.{module.name}")
    return dict(sorted(_registry.items()))


def experiment(name: str) -> Experiment | Timing:
    """The experiment of that name.

    Raises:
        SubspanError: if there is none, with the nearest names.
    """
    if name not in experiments():
        raise unknown("experiment", name, experiments())
    return experiments()[name]


def reproduce(
    name: str,
    out: Path,
    *,
    budget: Budget = "quick",
    data: str | None = None,
    jobs: int = -1,
    overwrite: bool = False,
    on_run: Callable[[Outcome, int], None] | None = None,
    done: Callable[[str], None] = lambda what: None,
    backend: str = "loky",
    ray_address: str | None = None,
    say: Callable[[str], None] = lambda what: None,
    log: Sequence[str] = (),
) -> dict[str, Any]:
    """Run an experiment and write its report, published and measured side by side.

    An experiment of several parts has a folder for each, and ``summary.png`` over them.

    Args:
        name: of the experiment.
        out: output folder.
        budget: "quick" or "full".
        data: in place of the published data set, another of as large images; then no published
            numbers stand beside ours.
        jobs: as of :func:`subspan.sweeps.sweep.sweep`.
        overwrite: replace what another configuration left there.
        on_run: called after each run, with how many are left.
        done: called after each measurement of a benchmark.
        backend: as of :func:`subspan.sweeps.sweep.sweep`.
        ray_address: likewise.
        say: likewise.
        log: likewise.

    Returns:
        What ``sweep.json`` says of each part, by its name; a single part has none, nor has a
        benchmark, of which it is the content of ``bench.json``.

    Raises:
        SubspanError: for an unknown name or budget, data or trackers for a benchmark, or Ray for
            times.
    """
    chosen = experiment(name)
    backends.check(backend, ray_address, jobs)
    if backend != "loky" and (isinstance(chosen, Timing) or chosen.timed):
        raise SubspanError(
            f"{name} measures times: on this machine alone, not with --backend {backend}"
        )
    if isinstance(chosen, Timing):
        if data is not None:
            raise SubspanError(f"{name} is a benchmark, it has no data to replace by {data!r}")
        if log:
            raise SubspanError(f"{name} is a benchmark, it has no runs to log: leave out --log")
        record = bench(chosen.bench(budget), out, overwrite=overwrite, done=done)
        picture.write(record, out)
        return {"": record}
    parts, title = chosen.parts(budget), chosen.title
    if data is not None:
        title += f"; here with {data}"
        parts = {
            part: replace(config, training=replace(config.training, data=data))
            for part, config in parts.items()
        }
    if chosen.timed:
        if jobs > 1:
            raise SubspanError(f"{name} times its runs: one at a time, not --jobs {jobs}")
        jobs = 1

    def extra(part: str) -> dict[str, Any]:
        return {
            "experiment": Provenance(
                name=name,
                budget=budget,
                title=title,
                source=chosen.source,
                differences=chosen.differences,
                part=part,
            ),
            "published": () if data else chosen.published_of(part),
        }

    results = sweep_parts(
        parts,
        out,
        jobs=jobs,
        backend=backend,
        ray_address=ray_address,
        on_run=on_run,
        extra=extra,
        overwrite=overwrite,
        say=say,
        log=log,
    )
    if len(parts) > 1:
        report.write_summary(out, {part: out / part for part in parts}, title)
    return results
