"""The Pareto picture: test accuracy against stored numbers and against bytes, ours and others'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from subspan.report.curves import number
from subspan.report.families import FAMILIES, family_of
from subspan.report.known import KnownResult
from subspan.report.labels import Place, place_names
from subspan.report.pictures import styled
from subspan.report.points import SIZES, MeasuredPoint, frontier

_RANGE = 40  # between the largest error of the picture and the least
_LEAST = 0.01  # % of errors that the axis can show
CAPTION = (
    "Dots are means over seeds, their bars standard deviations; what has one seed is small and "
    "pale. The line is the frontier of the library: each of its points is better, in "
    "validation and on the test set, than all of its points that are smaller. Diamonds are what "
    "others reached, and were not measured here: full where the figure was read at its authors', "
    "open where it is quoted. Numbers, bytes, and the distance of an accuracy from 100 % are on "
    "logarithmic scales. The picture shows as much as the frontier and the diamonds need, down to "
    f"{_RANGE} times the least error; the tables below have the rest."
)
TITLES = {"mnist": "MNIST", "cifar10": "CIFAR-10", "fashion_mnist": "Fashion-MNIST"}
_TICKS = (0, 20, 40, 60, 70, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9)
_INK, _SHADE = "0.1", "#EDF2F7"


class _Look(NamedTuple):
    """How points are drawn, and what the legend calls them."""

    name: str
    colour: str
    marker: str
    face: str | None = None  # where it is not the colour


_FAMILIES = {
    family: _Look(family.title, colour, marker)
    for family, colour, marker in zip(
        FAMILIES, ("#0072B2", "#CC79A7", "#D55E00", "#009E73"), "ov^s", strict=True
    )
}
_FULL = _Look("All weights trained", "0.6", "X")
_OTHER = _Look("Other methods", "#E69F00", "P")
_KNOWN = {
    "read": _Look("Others, read at the source", _INK, "D"),
    "quoted": _Look("Others, quoted", _INK, "D", "white"),
}
_LOOKS = (*_FAMILIES.values(), _FULL, _OTHER, *_KNOWN.values())
# Size, opacity and order of points on the frontier, of others, and of those with one seed.
_FIRST, _SEVERAL, _ONE = (4.6, 1.0, 4), (3.8, 0.55, 2), (2.4, 0.35, 2)


@styled
def draw(
    points: Mapping[str, Sequence[MeasuredPoint]], known: Mapping[str, Sequence[KnownResult]]
) -> Figure:
    """Draw a row for each set of data, accuracy over numbers and over bytes: see `CAPTION`.

    What was measured, and what others reached, is given by the name of the data.
    """
    figure = Figure(figsize=(6.8, 2.75 * len(points) + 0.5), layout="constrained")
    panels = figure.subplots(len(points), len(SIZES), sharey="row", squeeze=False)
    used = set[_Look]()
    for data, row in zip(points, panels, strict=True):
        row[0].set_title(TITLES.get(data, data), loc="left", fontweight="bold", fontsize=9)
        row[0].set_ylabel("test accuracy (%)")
        used |= {_look(point) for point in points[data]}
        used |= {_KNOWN[work.status] for work in known.get(data, ())}
        places = {size: _shown(points[data], known.get(data, ()), size) for size in SIZES}
        errors = [_error(accuracy) for some in places.values() for _, accuracy in some]
        worst = min(max(errors), _RANGE * min(errors))
        _scale_accuracy(row[0], min(errors), worst)
        for size, axes in zip(SIZES, row, strict=True):
            seen = [x for x, a in places[size] if _error(a) <= worst]
            _scale_sizes(axes, size, seen or [x for x, _ in places[size]])
            _draw_ours(axes, points[data], size)
            _draw_others(axes, known.get(data, ()), size)
    line = Line2D([], [], color=_INK, linewidth=1.2, label="Frontier of the library")
    entries = [line, *(_mark([], [], look) for look in _LOOKS if look in used)]
    if any(len(point.scores) == 1 for some in points.values() for point in some):
        entries.append(_mark([], [], _Look("Small and pale: one seed", _INK, "o"), _ONE))
    figure.legend(handles=entries, loc="outside lower center", ncols=3, columnspacing=1.2)
    figure.draw_without_rendering()  # names must know where everything is
    for data, row in zip(points, panels, strict=True):
        for size, axes in zip(SIZES, row, strict=True):
            _name_others(axes, points[data], known.get(data, ()), size)
    return figure


# ---- scales --------------------------------------------------------------------------------------


def _shown(points: Sequence[MeasuredPoint], known: Sequence[KnownResult], size: str) -> list[Place]:
    """Return the places that the picture is made for: the frontier's and those of others."""
    others = [place for work in known for place in work.at(size)]
    return [*_places(frontier(points, size), size), *others] or _places(points, size)


def _places(points: Sequence[MeasuredPoint], size: str) -> list[Place]:
    return [(where, p.mean) for p in points if (where := p.size(size)) is not None]


def _error(accuracy: float) -> float:
    return max(100 - accuracy, _LEAST)


def _scale_accuracy(axes: Axes, least: float, worst: float) -> None:
    """Make the axis of accuracies logarithmic in the error, between two errors."""
    axes.set_yscale(
        "function",
        functions=(
            lambda a: -np.log10(np.maximum(100 - np.asarray(a, float), _LEAST)),
            lambda y: 100 - 10 ** -np.asarray(y, float),
        ),
    )
    axes.set_ylim(100 - 1.25 * worst, 100 - least / 1.3)
    axes.yaxis.set_major_locator(FixedLocator(_TICKS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda accuracy, _: f"{accuracy:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _scale_sizes(axes: Axes, size: str, shown: Sequence[float]) -> None:
    """Make the axis of numbers or bytes logarithmic, as wide as what is shown."""
    axes.set_xlabel("stored numbers" if size == "numbers" else "size of the file")
    if not shown:
        axes.text(0.5, 0.5, f"no record tells the {size}", transform=axes.transAxes, ha="center")
        return
    axes.set_xscale("log")
    axes.set_xlim(min(shown) / 1.35, max(shown) * 1.35)
    axes.xaxis.set_major_locator(LogLocator(10))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: number(x) if size == "numbers" else _bytes(x))
    )


def _bytes(count: float) -> str:
    """Write a number of bytes as people say it."""
    for unit, name in ((1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:,.4g} {name}"
    return f"{count:,.0f} bytes"


# ---- points --------------------------------------------------------------------------------------


def _look(point: MeasuredPoint) -> _Look:
    return _FULL if point.method == "full" else _FAMILIES.get(family_of(point.method), _OTHER)


def _mark(
    x: Sequence[float],
    y: Sequence[float],
    look: _Look,
    rank: tuple[float, float, float] = _FIRST,
) -> Line2D:
    """Make the markers of a look; ours have a white edge, which keeps those that overlap apart."""
    size, alpha, order = rank
    return Line2D(
        x,
        y,
        linestyle="none",
        label=look.name,
        marker=look.marker,
        markersize=size,
        markerfacecolor=look.face or look.colour,
        markeredgecolor=look.colour if look in _KNOWN.values() else "white",
        markeredgewidth=0.5,
        alpha=alpha,
        zorder=order,
    )


def _draw_ours(axes: Axes, points: Sequence[MeasuredPoint], size: str) -> None:
    """Draw what was measured here, the frontier above the rest."""
    best = frontier(points, size)
    if best:
        x, y = zip(*_staircase(axes, best, size), strict=True)
        axes.fill_between(x, y, axes.get_ylim()[0], color=_SHADE, linewidth=0, zorder=0.5)
        axes.plot(x, y, color=_INK, linewidth=1.1, zorder=3)
    for point in points:
        if (where := point.size(size)) is None:
            continue
        look, several = _look(point), len(point.scores) > 1
        rank = _FIRST if point in best else _SEVERAL if several else _ONE
        ends = [point.mean - point.deviation, min(point.mean + point.deviation, 100 - _LEAST)]
        bar = Line2D([where] * 2, ends, color=look.colour, linewidth=0.8, solid_capstyle="butt")
        bar.set(alpha=rank[1], zorder=rank[2])
        axes.add_line(bar)
        axes.add_line(_mark([where], [point.mean], look, rank))


def _staircase(axes: Axes, best: Sequence[MeasuredPoint], size: str) -> list[Place]:
    """Return the corners of the frontier: what it reaches at a size, it reaches at all larger."""
    corners: list[Place] = []
    for where, accuracy in _places(best, size):
        corners += [(where, corners[-1][1] if corners else 0.0), (where, accuracy)]
    return [*corners, (max(axes.get_xlim()[1], corners[-1][0]), corners[-1][1])]


def _draw_others(axes: Axes, known: Sequence[KnownResult], size: str) -> None:
    """Draw diamonds; the points of a curve are joined."""
    for work in known:
        if own := sorted(work.at(size)):
            x, y = zip(*own, strict=True)
            if len(own) > 2:
                axes.plot(x, y, color=_INK, linewidth=0.5, linestyle=":", zorder=4.5)
            axes.add_line(_mark(x, y, _KNOWN[work.status], (3.6, 1.0, 5)))


def _name_others(
    axes: Axes, points: Sequence[MeasuredPoint], known: Sequence[KnownResult], size: str
) -> None:
    """Write the names of others, each at the best of its points that can be seen."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()

    def seen(place: Place) -> bool:
        return left <= place[0] <= right and low <= place[1] <= high

    best = frontier(points, size)
    lines = [[place] for place in _places(points, size) if seen(place)]
    lines += [_staircase(axes, best, size)[1:]] if best else []
    marks, names = [place for place in _places(best, size) if seen(place)], []
    for work in known:
        if own := [place for place in sorted(work.at(size)) if seen(place)]:
            marks += own
            lines += [own] if len(own) > 2 else []
            names.append((work.name, max(own, key=lambda place: place[1])))
    if names:
        place_names(axes, names, marks, lines, fontsize=6, color="0.2", zorder=6)
