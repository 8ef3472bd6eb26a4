"""Many runs: methods × dims × learning rates × seeds, in parallel, resumed run by run.

At every point (method, dim) the learning rate is chosen by the validation accuracy of seed 0; the
other seeds run at that rate. The baseline is a point like the others.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import joblib

from subspan.cache import cache
from subspan.errors import SubspanError
from subspan.families import stored
from subspan.files import remove_unfinished
from subspan.lab import records, trackers
from subspan.lab.config import Run, Sweep
from subspan.lab.intrinsic import intrinsic_dimension
from subspan.lab.methods import method
from subspan.lab.train import completed, on_cpu, prepare, train

Outcome = tuple["Job", dict[str, Any] | str]


@dataclass(frozen=True)
class Job:
    """One run of a sweep and its folder's name."""

    name: str
    run: Run


@dataclass
class Point:
    """One method at one value of its axis, and the runs that are done there."""

    method: str
    label: str
    options: dict[str, Any]
    lrs: tuple[float, ...]
    done: dict[tuple[float, int], dict[str, Any]] = field(default_factory=dict)

    def job(self, sweep: Sweep, lr: float, seed: int) -> Job:
        """The run with this learning rate and seed."""
        at = f"-{self.label}" if self.label else ""
        name = f"{self.method}{at}-lr{lr:g}-seed{seed}"
        options = self.options
        if sweep.processes > 1:  # as the command line of each of them will read it
            options = {k: int(v) if str(v).isdecimal() else v for k, v in options.items()}
        return Job(name, Run(sweep.training, self.method, options, lr, seed))

    def best_lr(self) -> float | None:
        """The learning rate with the best validation accuracy of seed 0, the first of equals.

        None if no run succeeded.
        """
        found = {lr: self.done[lr, 0]["val_accuracy"] for lr in self.lrs if (lr, 0) in self.done}
        return max(found, key=found.__getitem__) if found else None


def sweep(
    config: Sweep, out: Path, *, jobs: int = -1, overwrite: bool = False,
    on_run: Callable[[Outcome, int], None] | None = None, extra: Mapping[str, Any] | None = None,
    log: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Run everything that is not complete in ``out``; bring ``sweep.json`` up to date as runs end.

    Args:
        config: what to run.
        out: output folder; runs are in ``out/runs``.
        jobs: processes at a time; -1 for one per core, or one in all where they take a GPU.
        overwrite: replace what another configuration left there.
        on_run: called with each outcome and the number of runs still to do.
        extra: what else ``sweep.json`` is to say.
        log: trackers that are told every epoch of every run.

    Returns:
        The content of ``sweep.json``.

    Raises:
        SubspanError: for a configuration that cannot be run, with nothing written. A run that
            fails is listed in the result, and the others go on.
    """
    if jobs != -1 and jobs < 1:
        raise SubspanError(f"jobs must be at least 1, or -1 for one per core, got {jobs}")
    if jobs == -1:
        jobs = joblib.cpu_count() if on_cpu(config.training) else 1
    trackers.check(log)
    points = _points(config)
    _check(config, points)
    records.claim(out, "sweep.json", config.as_dict(), overwrite=overwrite)
    (out / "runs").mkdir(parents=True, exist_ok=True)
    remove_unfinished(out / "sweep.json")
    failed: dict[str, str] = {}

    def write(status: str) -> dict[str, Any]:
        result = _result(config, points, failed, status) | dict(extra or {})
        records.write_json(out / "sweep.json", result)
        return result

    write("running")
    first = [(point, lr, 0) for point in points for lr in point.lrs]
    left = len(first) + len(points) * (config.seeds - 1)
    others = (
        (point, lr, seed)
        for point in points
        for seed in range(1, config.seeds)
        if (lr := point.best_lr()) is not None
    )
    # Points with many coordinates take longest: begin with them, so that none is left for the end.
    try:
        for stage in (first[::-1], others):
            by_name = {
                point.job(config, lr, seed).name: (point, lr, seed) for point, lr, seed in stage
            }
            tasks = [point.job(config, lr, seed) for point, lr, seed in by_name.values()]
            for job, outcome in _execute(
                tasks, out / "runs", jobs, overwrite=overwrite, processes=config.processes, log=log
            ):
                left -= 1
                point, lr, seed = by_name[job.name]
                if isinstance(outcome, dict):
                    point.done[lr, seed] = outcome
                else:
                    failed[job.name] = outcome
                write("running")
                if on_run:
                    on_run((job, outcome), left)
    except BaseException:
        with contextlib.suppress(OSError):
            write("interrupted")
        raise
    return write("complete")


def total_runs(config: Sweep) -> int:
    """How many runs a sweep has if none fails."""
    points = _points(config)
    return sum(len(point.lrs) for point in points) + len(points) * (config.seeds - 1)


def _points(config: Sweep) -> list[Point]:
    """The baseline first, then every method at every value of its axis."""
    points = []
    names = [config.baseline] if config.baseline else []
    for name in [*names, *(m for m in config.methods if m != config.baseline)]:
        how = method(name)
        own = {option.name for option in how.options}
        options = {key: value for key, value in config.options.items() if key in own}
        for value in [""] if how.axis is None else config.dims:
            there = options | how.at(value)
            lrs = config.lrs_of(name) or how.rates(there)
            points.append(Point(name, f"{how.axis or ''}{value}", there, lrs))
    return points


def _check(config: Sweep, points: list[Point]) -> None:
    """Everything that can be refused is refused before anything runs."""
    if config.baseline and (axis := method(config.baseline).axis):
        raise SubspanError(
            f"baseline {config.baseline!r} is varied by {axis} and has no one accuracy: use full, "
            "or null for none"
        )
    known = {option.name for name in config.methods for option in method(name).options}
    for option in config.options:
        if option not in known:
            for name in config.methods:
                method(name).check([option])
    labels: dict[tuple[str, int], str] = {}
    for point in points:
        ready = prepare(Run(config.training, point.method, point.options, point.lrs[0]))
        at = point.method, ready.method.counts(ready.model)["trainable_parameters"]
        if at in labels and not ready.method.adapts:
            raise SubspanError(
                f"{labels[at]} and {point.label} are one point of the curve of {point.method}, "
                f"{at[1]} numbers trained: leave one out"
            )
        labels[at] = point.label


def _execute(
    tasks: list[Job], runs: Path, jobs: int, *, overwrite: bool, processes: int, log: Sequence[str]
) -> Iterator[Outcome]:
    """The outcomes as they come: a record, or a sentence on what went wrong."""
    left = []
    for task in tasks:  # what is complete needs no process
        try:
            found = completed(task.run, runs / task.name, overwrite=overwrite)
        except SubspanError as error:
            yield task, str(error)
            continue
        if found:
            yield task, found
        else:
            left.append(task)
    # joblib divides the cores' threads between its processes.
    workers = max(1, min(jobs, len(left)))
    parallel = joblib.Parallel(n_jobs=workers, return_as="generator_unordered")
    outcomes = parallel(
        joblib.delayed(_one)(task, runs, overwrite, processes, log) for task in left
    )
    try:
        for outcome in outcomes:  # noqa: UP028 (closed below, not by ``yield from``)
            yield outcome
    except BrokenProcessPool:
        raise SubspanError(
            "a process was killed, for want of memory perhaps: what is complete is kept; run the "
            "same again with fewer --jobs"
        ) from None
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is given up here: after an error, the rest
            outcomes.close()


def _one(job: Job, runs: Path, overwrite: bool, processes: int, log: Sequence[str]) -> Outcome:
    """One run in a worker; nothing that it raises may stop the others."""
    folder = runs / job.name
    try:
        try:
            if processes > 1:
                return job, _together(job.run, folder, overwrite, processes, log)
            return job, train(job.run, folder, overwrite=overwrite, log=log)
        except SubspanError as error:
            return job, str(error)
    except Exception as error:
        return job, f"{type(error).__name__}: {error}"
    finally:  # or the next run in this process would count it as its own
        stored.forget()
        cache.clear()


def _together(
    run: Run, folder: Path, overwrite: bool, processes: int, log: Sequence[str]
) -> dict[str, Any]:
    """One run in several processes, as a person would start it."""
    settings = run.as_dict()
    settings |= settings.pop("options") | {"log": list(log) or None}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(settings, file)
        file.flush()
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [f"--nproc-per-node={processes}", "-m", "subspan.cli", "train"]
        options = ["--config", file.name, "--out", str(folder)] + ["--overwrite"] * overwrite
        said = subprocess.run([*launch, *command, *options], capture_output=True, text=True)
    record = completed(run, folder)
    if record is None:
        reasons = [line for line in said.stderr.splitlines() if line.startswith("subspan train:")]
        last = said.stderr.strip().splitlines()[-1:] or ["no word of why"]
        raise SubspanError((reasons or last)[0])
    return record


def _result(
    config: Sweep, points: list[Point], failed: dict[str, str], status: str
) -> dict[str, Any]:
    rows = [row for point in points if (row := _row(point)) is not None]
    baseline = next((row for row in rows if row["method"] == config.baseline), None)
    rows = [row for row in rows if row is not baseline]
    some = next((record for point in points for record in point.done.values()), {})
    return {
        "format": records.FORMAT,
        "status": status,
        "config": records.plain(config.as_dict()),
        "baseline": baseline,
        "rows": rows,
        "d_int": _intrinsic(config, rows, baseline),
        "failed": [{"run": name, "error": error} for name, error in sorted(failed.items())],
        "versions": records.versions(),
        "device": some.get("device", ""),
    }


def _row(point: Point) -> dict[str, Any] | None:
    """What the seeds measured at a point, at the chosen learning rate."""
    lr = point.best_lr()
    if lr is None:
        return None
    done = [record for (rate, _), record in sorted(point.done.items()) if rate == lr]
    seeds = [seed for rate, seed in sorted(point.done) if rate == lr]
    first = done[0]
    row: dict[str, Any] = {
        "method": point.method,
        "dim": round(statistics.fmean(record["trainable_parameters"] for record in done)),
        "label": point.label.removeprefix(method(point.method).axis or "") or point.method,
        "lr": lr,
        "seeds": seeds,
    }
    for key in ("test_accuracy", "val_accuracy", "seconds_total", "seconds_per_step",
                "peak_memory_bytes"):  # fmt: skip
        row[key] = [record[key] for record in done]
    for key in ("trainable_parameters", "stored_parameters", "weights", "checkpoint_bytes"):
        row[key] = first[key]
    if "counts" in first:
        row["counts"] = {
            name: round(statistics.fmean(record["counts"][name] for record in done))
            for name in first["counts"]
        }
        row["ranks"] = [record["ranks"] for record in done]
    row["bytes_sent_per_step"] = [record.get("bytes_sent_per_step") for record in done]
    row["mean_test_accuracy"] = statistics.fmean(row["test_accuracy"])
    row["tried_lrs"] = {
        f"{r:g}": rec["val_accuracy"] for (r, s), rec in sorted(point.done.items()) if s == 0
    }
    return row


def _intrinsic(
    config: Sweep, rows: list[dict[str, Any]], baseline: dict[str, Any] | None
) -> dict[str, Any]:
    """The intrinsic dimension by method, where there is a curve and a baseline."""
    if baseline is None or not any(baseline["test_accuracy"]):
        return {}
    found = {}
    for name in config.methods:
        how = method(name)
        own = [row for row in rows if row["method"] == name and how.axis and not how.adapts]
        if own:
            found[name] = intrinsic_dimension(
                [row["dim"] for row in own],
                [row["test_accuracy"] for row in own],
                baseline["test_accuracy"],
                threshold=config.threshold,
            ).as_dict()
    return found
