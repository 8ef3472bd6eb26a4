"""Experiments that were run, one exhibit each, from the records that they left in a folder."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from subspan.bench import FILE as BENCH
from subspan.bench.table import of_bench
from subspan.errors import SubspanError
from subspan.experiments import Benchmark, Budget, Experiment, experiments
from subspan.report import bars, read, tables
from subspan.report.curves import d_int_bound, d_int_name, number, title
from subspan.report.families import FAMILIES, OTHERS, Family, family_of
from subspan.sweeps.growth import Growth
from subspan.sweeps.result import Provenance, SweepRecord
from subspan.training.config import Sweep, Training
from subspan.training.records import differences, plain, read_json
from subspan.training.tasks import option_names


@dataclass(frozen=True)
class Exhibit:
    """An experiment as the gallery shows it."""

    folder: Path  # where its records are
    family: Family  # the section that it belongs to
    title: str  # one line
    source: str  # the paper; empty for a sweep of one's own
    differences: str  # what is not as published; likewise
    effort: str  # budget, seeds and epochs, in a sentence
    notes: tuple[str, ...]  # what was found, and what is missing, in sentences
    command: str  # what made it
    table: tables.Table  # published and measured side by side
    pictures: tuple[Path, ...]  # PNG files; each has an SVG beside it
    reports: Mapping[str, Path]  # pages by the name of their part


def exhibits(folder: Path, damaged: list[str] | None = None) -> list[Exhibit]:
    """Return the experiments of a folder, in the order of its folders' names.

    A folder in it with a ``sweep.json`` is an experiment, as is one with a ``bench.json``, and one
    whose folders have a ``sweep.json`` each is an experiment of several parts, or a comparison of
    networks; if these are neither, each is for itself. It is an error if there is none. So is a
    damaged record, unless the list ``damaged`` is there to get a sentence on it.
    """
    if not folder.is_dir():
        raise SubspanError(f"{folder} is no folder: give the one with the experiments' folders")
    found = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        try:
            found += _exhibits(place)
        except SubspanError as error:
            if damaged is None:
                raise
            damaged.append(str(error))
    if not found and not damaged:
        raise SubspanError(
            f"no folder in {folder} has a sweep.json or bench.json: give the one with the "
            "experiments' folders"
        )
    return found


def _exhibits(place: Path) -> list[Exhibit]:
    """Make the exhibits of a folder, none if it holds no experiment."""
    try:
        if (place / BENCH).is_file():
            return [_of_bench(place)]
        if (place / SweepRecord.FILE).is_file():
            return [_of_sweeps(place, {"": place})]
        parts = {path.parent.name: path.parent for path in place.glob(f"*/{SweepRecord.FILE}")}
        if parts and _are_one([_sweep(path) for path in parts.values()]):
            return [_of_sweeps(place, dict(sorted(parts.items())))]
        return [_of_sweeps(path, {"": path}) for _, path in sorted(parts.items())]
    except SubspanError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise SubspanError(
            f"a record in {place} is damaged ({error!r}): run the command that wrote it again"
        ) from error


# ---- sweeps --------------------------------------------------------------------------------------


def _sweep(place: Path) -> SweepRecord:
    found = read(place)
    assert isinstance(found, SweepRecord)  # read prefers sweep.json, and it is there
    return found


def _are_one(sweeps: Sequence[SweepRecord]) -> bool:
    """Return whether sweeps are parts of one experiment, or compare networks under one command."""
    if sweeps[0].experiment:
        return len({sweep.experiment and sweep.experiment.name for sweep in sweeps}) == 1
    configs = [sweep.config | dict.fromkeys(("net", "small")) for sweep in sweeps]
    return not any(differences(configs[0], config) for config in configs)


def _of_sweeps(folder: Path, places: Mapping[str, Path]) -> Exhibit:
    sweeps = {part: _sweep(place) for part, place in places.items()}
    first = next(iter(sweeps.values()))
    told = first.experiment or Provenance("", "", "", "", "")
    name, budget = told.name, told.budget
    planned = _planned(name, budget)
    order = list(planned)  # of the experiment; what it does not have any more comes last
    sweeps = dict(sorted(sweeps.items(), key=lambda item: [*order, item[0]].index(item[0])))
    known = experiments().get(name)
    timed = isinstance(known, Experiment) and known.timed
    configs = [sweep.config for sweep in sweeps.values()]
    compared = f"{', '.join(str(config.get('net')) for config in configs)} at equal d"
    ours = title(first) if len(sweeps) == 1 else compared
    whole = [
        path for name in ("summary", "comparison") if (path := folder / f"{name}.png").is_file()
    ]
    pictures = whole or [
        places[part] / "curve.png" for part, sweep in sweeps.items() if _says_more(sweep)
    ]
    left = [part for part in planned if part not in sweeps]
    notes = [f"Not run, of its parts: {', '.join(left)}."] if left else []
    for part, sweep in sweeps.items():
        notes += [f"{part}: {note}" if part else note for note in (*_d_int(sweep), *_lacks(sweep))]
    if timed:
        notes.append(f"Timed on {first.device}.")
    return Exhibit(
        folder=folder,
        family=_family(sweeps.values(), name),
        title=told.title or ours,
        source=told.source,
        differences=told.differences,
        effort=_effort(sweeps.values(), budget),
        notes=tuple(notes),
        command=_reproduce(first, told, planned) if first.experiment else sweep_command(*configs),
        table=tables.of_sweeps(sweeps, timed=timed),
        pictures=tuple(path for path in pictures if path.is_file()),
        reports={part: page for part in sweeps if (page := places[part] / "report.html").is_file()},
    )


def _family(sweeps: Iterable[SweepRecord], name: str) -> Family:
    """Choose the family of most of the methods; where none has one, that of the name."""
    found = Counter(family_of(row.method) for sweep in sweeps for row in sweep.rows)
    for family, _ in found.most_common():
        if family is not OTHERS:
            return family
    return next((family for family in FAMILIES if name.startswith(family.prefix)), OTHERS)


def _says_more(sweep: SweepRecord) -> bool:
    """Return whether the picture of a sweep shows more than its table."""
    dims = [row.dim for row in sweep.rows]
    return bool(dims) and (
        bars.suits(sweep) or sweep.baseline is not None or max(dims) > 1.5 * min(dims)
    )


def _effort(sweeps: Iterable[SweepRecord], budget: str) -> str:
    """Say how much was spent, and what that means for the numbers."""
    seeds = _range(len(row.test_score) for sweep in sweeps for row in sweep.rows)
    lengths = {"epoch": list[int](), "step": list[int]()}  # how long each sweep trained
    for sweep in sweeps:
        unit = "step" if sweep.config.get("steps") else "epoch"
        lengths[unit].append(int(sweep.config.get(f"{unit}s", 0)))
    trained = [_counted(_range(numbers), unit) for unit, numbers in lengths.items() if numbers]
    words = f"Budget {budget}: " if budget else ""
    words += f"{_counted(seeds or 'no', 'seed')}, {' and '.join(trained)}"
    if seeds == "1":
        words += ", so that no standard deviation is known and small differences mean nothing"
    stages = _range(n for sweep in sweeps if (n := sweep.config.get("stage_epochs")))
    if stages:
        words += f" for all weights, {_counted(stages, 'epoch')} at each d"
    return f"{words}."


def _counted(count: str, unit: str) -> str:
    return f"{count} {unit}{'s' * (count != '1')}"


def _range(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return " to ".join(map(str, dict.fromkeys((found[0], found[-1])))) if found else ""


def _d_int(sweep: SweepRecord) -> list[str]:
    """Write the intrinsic dimensions, measured and published."""
    found = []
    for method, ours in sweep.d_int.items():
        if ours.value is not None and not ours.note.startswith("upper bound"):
            ends = [number(end) for end in (ours.low, ours.high) if end is not None]
            between = f" ({' to '.join(ends)} over seeds)" if len(ends) == 2 else ""
            found.append(f"{method} {d_int_bound(ours)}{between}")
    found += [
        f"{number(source.d_int)} published ({source.label})"
        for source in sweep.published
        if source.d_int is not None
    ]
    name = d_int_name(sweep.threshold)
    return [f"Intrinsic dimension, {name}: {'; '.join(found)}."] if found else []


def _lacks(sweep: SweepRecord) -> list[str]:
    """Say what a sweep lacks: its end, or runs."""
    lacks = [] if sweep.status == "complete" else [f"Its status is {sweep.status!r}."]
    if sweep.failed:
        runs, first = _counted(str(len(sweep.failed)), "run"), sweep.failed[0]
        lacks.append(f"{runs} failed; {first.run}: {first.error}")
    return lacks


def _planned(name: str, budget: str) -> dict[str, Sweep]:
    """Return the sweeps of a published experiment by part; none if it is unknown here."""
    known = experiments().get(name)
    if not isinstance(known, Experiment) or budget not in known.sweeps:
        return {}
    return known.parts(cast(Budget, budget))


def _reproduce(sweep: SweepRecord, told: Provenance, planned: Mapping[str, Sweep]) -> str:
    """Return the command of a published experiment, on other data if they are others."""
    words = [f"subspan reproduce {shlex.quote(told.file or told.name)}"]
    if told.budget == "full":
        words.append("--budget full")
    own = planned.get(told.part)
    data = str(sweep.config.get("data", ""))
    if own and own.training.data != data:
        words.append(f"--data {shlex.quote(data)}")
    return " ".join(words)


def sweep_command(config: Mapping[str, Any], *others: Mapping[str, Any]) -> str:
    """Write the command of a sweep's configuration, or of many networks'."""
    if "stage_epochs" in config:  # d grew
        words, usual = ["subspan intrinsic"], Growth(Training()).as_dict()
        always: tuple[str, ...] = ("net", "data")
    else:
        words, usual = ["subspan sweep"], Sweep(Training()).as_dict() | {"small": []}
        always = ("net", "data", "methods", "dims")
    if others:
        words.append(f"--nets {_word([each.get('net') for each in (config, *others)])}")
        auto = any(each.get("small") != config.get("small") for each in others)
        config = {**config, "net": None} | ({"small": "auto"} if auto else {})
    usual |= {name: None for name in option_names() if name in config}
    for name in (*always, *(key for key in usual if key not in always)):
        value = config.get(name, usual[name])
        if name == "options":
            words += [f"{_flag(option)} {_word(given)}" for option, given in value.items()]
        elif value != usual[name] if name not in always else value is not None:
            words.append(f"{_flag(name)} {_word(value)}")
    return " ".join(words)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _word(value: Any) -> str:
    """Return a value on the command line: a list with commas, what is nested as JSON."""
    if isinstance(value, list | tuple) and not any(isinstance(v, list | dict) for v in value):
        return shlex.quote(",".join(map(str, value)))
    return shlex.quote(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


# ---- benchmarks ----------------------------------------------------------------------------------


def _of_bench(folder: Path) -> Exhibit:
    record = read_json(folder / BENCH)
    assert record is not None  # it is there
    known, budget = _benchmark(record["config"])
    parts = record["config"].get("parts", ())
    unfinished = record["status"] != "complete"
    picture = folder / "bench.png"
    return Exhibit(
        folder=folder,
        family=next((family for family in FAMILIES if [family.part] == list(parts)), OTHERS),
        title=known.title if known else f"Benchmark of {', '.join(parts)}",
        source=known.source if known else "",
        differences=known.differences if known else "",
        effort=(f"Budget {budget}. " if budget else "")
        + f"Medians of calls in turns, on {record['machine']['device']}.",
        notes=(f"Its status is {record['status']!r}.",) * unfinished,
        command=f"subspan reproduce {known.name}" + " --budget full" * (budget == "full")
        if known
        else f"subspan bench --parts {','.join(parts)}",
        table=of_bench(record),
        pictures=(picture,) * picture.is_file(),
        reports={},
    )


def _benchmark(config: Mapping[str, Any]) -> tuple[Benchmark | None, str]:
    """The experiment that a benchmark's configuration is of: its record does not name it."""
    for known in experiments().values():
        if isinstance(known, Benchmark):
            for budget, bench in known.benches.items():
                ours = plain(asdict(bench))
                if all(ours.get(key) == value for key, value in config.items()):
                    return known, budget
    return None, ""
