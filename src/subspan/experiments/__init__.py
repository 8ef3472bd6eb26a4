"""Published experiments: the source, the recipe, the published numbers.

An experiment is an ordinary sweep; what it found and what was published stand side by side in the
sweep's report. Each is a YAML file: those of the package are in ``published/``, and a user's own is
named on the command line (``docs/add-an-experiment.md``).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from subspan.bench import bench, picture
from subspan.errors import SubspanError, unknown
from subspan.experiments.experiment import Benchmark as Benchmark
from subspan.experiments.experiment import Budget as Budget
from subspan.experiments.experiment import Experiment as Experiment
from subspan.experiments.experiment import Published as Published
from subspan.experiments.load import load
from subspan.experiments.many import sweep_parts
from subspan.report import bars, pictures
from subspan.sweeps.result import Provenance
from subspan.sweeps.running import Running
from subspan.training import own
from subspan.training.schema import fitting

FOLDER = Path(__file__).parent / "published"
ALL = "all"  # no experiment's name: it stands for all of them

_registry: dict[str, Experiment | Benchmark] = {}


def register(experiment: Experiment | Benchmark) -> None:
    """Add an experiment that a module of the user's makes in Python.

    Raises:
        TypeError: if there is one of that name.
    """
    if experiment.name in _registry or (FOLDER / f"{experiment.name}.yaml").is_file():
        raise TypeError(f"an experiment named {experiment.name!r} is registered already")
    _registry[experiment.name] = experiment


@functools.cache
def _published() -> dict[str, Experiment | Benchmark]:
    return {path.stem: load(path) for path in FOLDER.glob("*.yaml")}


def experiments() -> dict[str, Experiment | Benchmark]:
    """Return all experiments by name: those of the package, and those that were registered."""
    return dict(sorted((_published() | _registry).items()))


def experiment(name: str) -> Experiment | Benchmark:
    """Return the experiment of that name, or in that YAML file.

    A name that ends in .yaml or .yml, or has a slash, is a file's.

    Raises:
        SubspanError: if there is none, with the nearest names; or if the file cannot be used, or
            has the name of another experiment.
    """
    path, known = Path(name), experiments()
    if path.suffix not in (".yaml", ".yml") and "/" not in name:
        if name not in known:
            raise unknown("experiment", name, known)
        return known[name]
    found = load(path, file=name)
    if found.name in (*known, ALL):
        raise SubspanError(
            f"{name} has the name of another experiment, {found.name!r}: rename the file"
        )
    return found


def reproduce(
    which: str | Experiment | Benchmark,
    out: str | os.PathLike[str],
    running: Running | None = None,
    *,
    budget: Budget = "quick",
    data: str | None = None,
    only: Sequence[str] = (),
    done: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Run an experiment and write its report, published and measured side by side.

    An experiment of several parts has a folder for each, and ``summary.png`` over them.

    Args:
        which: an experiment, or the name or the file of one, as of :func:`experiment`. What a
            user's file names, data that begins with ./ and modules, is looked for beside it first.
        out: output folder.
        running: how the runs are carried out; by default one per core, in silence.
        budget: "quick" or "full".
        data: in place of the published data set, another of as large images; then no published
            numbers stand beside ours.
        only: parts to run now, by name; the others are left for another call.
        done: called after each measurement of a benchmark.

    Returns:
        What ``sweep.json`` says of each part, by its name; a single part has none, nor has a
        benchmark, of which it is the content of ``bench.json``.

    Raises:
        SubspanError: for an unknown name, budget or part, data or trackers for a benchmark, or Ray
            for times.
    """
    chosen = experiment(which) if isinstance(which, str) else which
    chosen = fitting(Experiment | Benchmark, chosen, "which")
    running, out = fitting(Running, running or Running(), "running"), Path(out)
    name = chosen.name
    if running.backend != "loky" and (isinstance(chosen, Benchmark) or chosen.timed):
        raise SubspanError(
            f"{name} measures times: on this machine alone, not with --backend {running.backend}"
        )
    if isinstance(chosen, Benchmark):
        if data is not None:
            raise SubspanError(f"{name} is a benchmark, it has no data to replace by {data!r}")
        if only:
            raise SubspanError(f"{name} is a benchmark, it has no parts: leave out --only")
        if running.log:
            raise SubspanError(f"{name} is a benchmark, it has no runs to log: leave out --log")
        record = bench(chosen.bench(budget), out, overwrite=running.overwrite, done=done)
        picture.write(record, out)
        return {"": record}
    if chosen.timed:
        if running.jobs > 1:
            raise SubspanError(f"{name} times its runs: one at a time, not --jobs {running.jobs}")
        running = replace(running, jobs=1)
    parts, title = chosen.parts(budget, only), chosen.title
    if data is not None:
        title += f"; here with {data}"
        parts = {
            part: replace(config, training=replace(config.training, data=data))
            for part, config in parts.items()
        }
    about = Provenance(
        name=name,
        budget=budget,
        title=title,
        source=chosen.source,
        differences=chosen.differences,
        file=chosen.file,
    )

    with own.modules_beside(chosen.file) if chosen.file else nullcontext():
        results = sweep_parts(
            parts,
            out,
            running,
            experiment=about,
            published={} if data else chosen.published,
            places=chosen.places,
        )
    if len(parts) > 1:
        pictures.write(bars.summary(results, title), out, "summary")
    return results
