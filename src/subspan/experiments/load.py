"""Experiments in YAML: ``docs/add-an-experiment.md`` says what a file holds.

One rule makes a sweep of a file. These are looked at in turn, from the general to the special, and
a key that is given again replaces what was given before, whole: ``sweep``, the part, the budget,
the part within the budget.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

from subspan.bench import Bench
from subspan.errors import unknown
from subspan.experiments.experiment import Benchmark, Budget, Experiment, Published
from subspan.experiments.located import Located, read
from subspan.sweeps.sweep import total_runs
from subspan.training import nets
from subspan.training.config import Sweep, Training
from subspan.training.methods import Method, method
from subspan.training.tasks import kind

SWEEP = ("title", "source", "differences", "published", "timed", "sweep", "parts", "budgets")
BENCH = ("title", "source", "differences", "bench", "budgets")
BUDGETS: tuple[Budget, ...] = get_args(Budget)
_TRAINING = {f.name for f in fields(Training)} - {"task_options"}
_OF_SWEEP = {f.name for f in fields(Sweep)} - {"training", "options"}


def load(path: Path, *, file: str = "") -> Experiment | Benchmark:
    """Read an experiment, whose name is that of its file.

    A user's file is named as the user gave it (``file``), and data that begins with ./ or ../ lies
    beside it. A file that cannot be used is refused with the line and the nearest right key.
    """
    content = read(path, file or str(path))
    timing = "bench" in content
    kind = "an experiment with a bench" if timing else "an experiment"
    content.check_keys(f"key of {kind}", BENCH if timing else SWEEP)
    about = {
        name: " ".join(content.fit(name, str).split()) if name in content else ""
        for name in ("title", "source", "differences")
    } | {"name": path.stem, "file": file}
    for name in ("title", "source"):
        if not about[name]:
            raise content.error(f"an experiment needs a {name}")
    budgets = content.mapping("budgets")
    budgets.check_keys("budget", BUDGETS)
    if timing:
        usual = content.mapping("bench")
        benches = {b: usual.replaced_by(budgets.mapping(b)).make(Bench, "bench") for b in BUDGETS}
        return Benchmark(**about, benches=benches)
    if "sweep" not in content:
        raise content.error("an experiment needs a sweep, or a bench")
    parts = content.mapping("parts")
    for part in parts:
        if not re.fullmatch(r"\w[\w.-]*", part):
            raise parts.error(f"a part is the name of a folder, got {part!r}", part)
    sweeps = {
        budget: _sweeps(content.mapping("sweep"), parts, budgets.mapping(budget), file)
        for budget in BUDGETS
    }
    for part in parts:
        if not any(part in run for run in sweeps.values()):
            raise parts.error(f"no budget runs the part {part}: name it, or leave it out", part)
    places = {part: f"{parts.place(part)}, {part}" for part in parts}
    return Experiment(
        **about,
        sweeps=sweeps,
        published=_published(content, parts or ("",)),
        timed=content.fit("timed", bool) if "timed" in content else False,
        places=(places or {"": content.place("sweep")}) if file else {},
    )


def _sweeps(general: Located, parts: Located, budget: Located, file: str) -> dict[str, Sweep]:
    """Return the parts that a budget runs; one that is called "" where there are none."""
    special = budget.mapping("parts")
    special.check_keys("part", parts)
    run = budget.fit("only", tuple[str, ...]) if "only" in budget else tuple(parts) or ("",)
    if not run:
        raise budget.error("only names no part: name one, or leave it out", "only")
    for part in run:
        if part not in (parts or ("",)):
            raise budget.error(unknown("part", part, parts), "only")
    of_all = budget.only(budget.keys() - {"only", "parts"})
    return {
        part: _sweep(general.replaced_by(parts.mapping(part), of_all, special.mapping(part)), file)
        for part in run
    }


def _sweep(values: Located, file: str) -> Sweep:
    """Return the sweep that a part's keys describe."""
    if not values:
        raise values.error("a sweep is empty: say what to train, such as net, data and dims")
    chosen = [*_methods(values, "methods"), *_methods(values, "baseline")]
    options: dict[str, Any] = {}
    for how in chosen:
        for option in how.options:
            if option.name != how.axis:  # whose values are dims
                options[option.name] = options.get(option.name, option.type) | option.type
    name = values.fit("task", str) if values.get("task") is not None else None
    with values.naming("task"):
        task = kind(name)
    of_task = {option.name: option.type for option in task.options}
    values.check_keys("key of a sweep", {*_TRAINING, *_OF_SWEEP, *options, *of_task})
    own = _given(values, of_task)
    training = values.only(_TRAINING).make(Training, "training", task_options=own)
    with values.naming():
        task.check(own)
    for key in ("net", "small") if training.task is None else ():
        for name in _names(values, key):
            if ":" not in name and not nets.is_builtin(name):
                raise values.error(unknown("net", name, nets.names()), key)
    if file and re.match(r"\.\.?(/|$)", training.data or ""):
        place = os.path.normpath(Path(file).parent / (training.data or ""))
        # With ./ in front, a folder that is not there is not taken for a name.
        training = replace(training, data=place if os.path.isabs(place) else f"./{place}")
    given = _given(values, options)
    sweep = values.only(_OF_SWEEP).make(Sweep, "a sweep", training=training, options=given)
    with values.naming():  # of a value that only a method knows to be wrong
        total_runs(sweep)
    return sweep


def _given(values: Located, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of those keys that are there, and not null."""
    return {key: values.fit(key, kinds[key]) for key in kinds if values.get(key) is not None}


def _names(values: Located, key: str) -> tuple[str, ...]:
    return _given(values, {key: tuple[str, ...]}).get(key, ())


def _methods(values: Located, key: str) -> list[Method]:
    names = _names(values, key)
    with values.naming(key):
        return [method(name) for name in names]


def _published(content: Located, parts: Collection[str]) -> dict[str, tuple[Published, ...]]:
    """Return the curves of each part: a list is of all of them."""
    if "published" not in content:
        return {}
    found = content["published"]
    curves = found if isinstance(found, Located) else dict.fromkeys(parts, found)
    if isinstance(found, Located):
        found.check_keys("part", parts)
    for own in curves.values():
        if not isinstance(own, list) or not all(isinstance(curve, Located) for curve in own):
            raise content.error(
                "published must be a list of curves, or one of each part", "published"
            )
    return {part: tuple(map(_curve, own)) for part, own in curves.items()}


def _curve(values: Located) -> Published:
    _methods(values, "method")  # refuses an unknown one
    return values.make(Published, "a published curve")
