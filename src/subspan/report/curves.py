"""The curves of a sweep's picture as plain data: scores over d, and the words beside them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from subspan.sweeps.intrinsic import IntrinsicDimension
from subspan.sweeps.result import PointRecord, SweepRecord
from subspan.training.config import title as what_on_what
from subspan.training.methods import methods
from subspan.training.records import RunRecord
from subspan.training.score import Score


@dataclass(frozen=True)
class Curve:
    """One method, or one publication."""

    label: str  # the legend's words
    dims: tuple[int, ...]  # d of every point, increasing
    scores: tuple[tuple[float, ...], ...]  # the seeds' scores at each of the dims, accuracies in %
    d_int: float | None = None  # the intrinsic dimension; None if not known
    interval: tuple[float | None, float | None] = (None, None)  # its ends; None where open
    target: float | None = None  # the score that defines it; None if not known
    published: bool = False  # whether it comes from the literature
    # Whether a line through the points says anything: not of networks of several shapes.
    joined: bool = True

    @property
    def mean(self) -> list[float]:
        """The mean over seeds at each of the dims."""
        return [sum(seeds) / len(seeds) for seeds in self.scores]


def measured_curves(sweep: SweepRecord) -> list[Curve]:
    """Return one curve for each method of the sweep that has a good run."""
    curves = []
    rows = [row for row in sweep.rows if not row.small and row.dim]
    for method in dict.fromkeys(row.method for row in rows):
        curve = _through([row for row in rows if row.method == method], method, sweep.score)
        if found := sweep.d_int.get(method):
            curve = replace(
                curve,
                label=f"{method}: {d_int_name(found.threshold)} {d_int_bound(found)}",
                d_int=found.value,
                interval=(found.low, found.high),
                target=sweep.score.scale * found.target,
            )
        curves.append(curve)
    return curves


def small_curves(sweep: SweepRecord) -> list[Curve]:
    """Return the curve of smaller networks, scores over their weights: one, or none."""
    rows = [row for row in sweep.rows if row.small]
    curve = _through(rows, "smaller networks, all weights", sweep.score)
    return [replace(curve, joined=False)] if rows else []


def _through(rows: Iterable[PointRecord], label: str, score: Score) -> Curve:
    """Return the curve through the scores of rows."""
    points = sorted((row.dim, row.test_score) for row in rows)
    scores = tuple(tuple(score.scale * value for value in seeds) for _, seeds in points)
    return Curve(label, tuple(dim for dim, _ in points), scores)


def published_curves(sweep: SweepRecord) -> list[Curve]:
    """Return one curve for each publication that the sweep is held against."""
    curves = []
    for source in sweep.published:
        if not source.dims:  # known by their labels only
            continue
        points = sorted(zip(source.dims, source.accuracy, strict=True))
        name = source.label
        if source.d_int is not None:
            name += f": {d_int_name(sweep.threshold)} = {number(source.d_int)}"
        curves.append(
            Curve(
                label=name,
                dims=tuple(dim for dim, _ in points),
                scores=tuple((100 * a,) for _, a in points),
                d_int=source.d_int,
                target=source.baseline and 100 * sweep.threshold * source.baseline,
                published=True,
            )
        )
    return curves


def d_int_name(threshold: float) -> str:
    """Return the field's name for the intrinsic dimension at a threshold: 0.9 gives ``d_int90``."""
    return f"d_int{100 * threshold:g}"


def d_int_bound(found: IntrinsicDimension) -> str:
    """Say what is known of an intrinsic dimension: ``= 234``, ``≤ 10`` or ``not reached``."""
    if found.value is None:
        return "not reached"
    return ("≤ " if found.note.startswith("upper bound") else "= ") + number(found.value)


def number(value: float) -> str:
    """Return a count for people: 7.3, 234, 61,706."""
    return f"{value:,.0f}" if value >= 10 or value == round(value) else f"{value:.2g}"


def axis_name(method: str) -> str:
    """Name what a method is varied by: "d", "tolerance"; empty if by nothing."""
    how = methods().get(method)
    axis = (how.axis if how else None) or ""
    return "d" if axis == "dim" else axis.replace("_", " ")


def point_of(run: RunRecord) -> PointRecord:
    """Return a single run as a point of a sweep: its label is the value of its method's axis."""
    how = methods().get(run.config["method"])
    options = run.config.get("options") or {}
    value = options.get(how.axis) if how and how.axis and isinstance(options, dict) else None
    return PointRecord.from_runs([run], "" if value is None else str(value))


def title(found: SweepRecord | RunRecord) -> str:
    """Net, data and D, and for a run its method and d, as far as they are known."""
    words = what_on_what(found.config)
    if isinstance(found, RunRecord):
        point = point_of(found)
        at = f" {axis_name(point.method)} = {point.label}" if point.label else ""
        words += f", {point.method}{at}"
    return f"{words}, D = {found.weights:,}" if found.weights else words
