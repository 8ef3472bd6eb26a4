"""The picture of a sweep with one d: what each method reaches and costs there, side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from subspan.report.curves import title
from subspan.report.pictures import styled
from subspan.sweeps.result import PointRecord, SweepRecord
from subspan.training.score import ACCURACY

CAPTION = (
    "What each method reaches and costs at this d: means over seeds, dots are the seeds. Costs "
    "that are far apart stand on logarithmic axes; training on all weights is grey."
)
_MEASURED, _BASELINE, _PUBLISHED = "#0072B2", "0.55", "#D55E00"
_COSTS = (  # field of a row, what is written under its panel, and its unit
    ("peak_memory_bytes", "peak memory (MB)", 1e-6),
    ("seconds_per_step", "time of a step (ms)", 1e3),
    ("seconds_total", "total time (s)", 1.0),
)


def suits(sweep: SweepRecord) -> bool:
    """Return whether there are several methods, and none that a curve could be drawn of."""
    return len({row.dim for row in sweep.rows}) == 1 and len(sweep.methods) > 1


@styled
def figure(sweep: SweepRecord) -> Figure:
    """Bars of score, memory, step time and total time: see `CAPTION`."""
    rows = sweep.points
    figure = Figure(figsize=(7.2, 0.9 + 0.17 * len(rows)), layout="constrained")
    dims = sweep.rows[0].label
    figure.suptitle(textwrap.fill(f"{title(sweep)}, d = {dims}", 100), fontsize=7.5)
    score = sweep.score
    shown = (("test_score", f"test {score.name}{score.unit}", score.scale), *_COSTS)
    panels = figure.subplots(1, len(shown), sharey=True)
    colours = [_colour(row, sweep) for row in rows]
    for axes, (name, words, unit) in zip(panels, shown, strict=True):
        values = [[unit * value for value in getattr(row, name)] for row in rows]
        _panel(axes, colours, values)
        axes.set_xlabel(words)
        if name != "test_score":
            _logarithmic(axes)
    names = [row.method for row in rows]
    panels[0].set_yticks(range(len(rows)), names)
    panels[0].invert_yaxis()
    return figure


@styled
def summary(parts: Mapping[str, SweepRecord], title: str) -> Figure:
    """Test scores of several sweeps, of one kind: discs are means over seeds, dots the seeds.

    Diamonds are published, training on all weights is grey. There are no bars: they would have to
    begin at zero, and hide in their length what the rows differ by. Where processes sent each other
    anything, a second panel shows how much.
    """
    lines = [(part, sweep, row) for part, sweep in parts.items() for row in sweep.points]
    rows = [row for *_, row in lines]
    colours = [_colour(row, sweep) for _, sweep, row in lines]
    sent = any(any(row.bytes_sent) for row in rows)
    figure = Figure(figsize=(7.2 if sent else 5.0, 0.9 + 0.17 * len(lines)), layout="constrained")
    axes, *others = figure.subplots(1, 1 + sent, sharey=True, squeeze=False)[0]
    figure.suptitle(textwrap.fill(title, 70), fontsize=7.5)
    score = lines[0][1].score if lines else ACCURACY
    published = [
        # Sources of one paper share a baseline.
        list(dict.fromkeys(score.scale * found for *_, found in sweep.published_for(row)))
        for _, sweep, row in lines
    ]
    scores = [[score.scale * a for a in row.test_score] for row in rows]
    _panel(axes, colours, scores, published, bars=False)
    for right in others:
        _panel(right, colours, [row.bytes_sent for row in rows])
        _logarithmic(right)
        right.set_xlabel("bytes that a process sends per step")
    labels = []
    for part, sweep, row in lines:
        at = f" at {row.label}" if row.ranks else f", d = {row.label}"
        if row.label.isdecimal() and int(row.label) != row.dim:  # p atoms, and other numbers
            at = f", {row.dim:,} numbers"
        name = f"{row.small}, all weights" if row.small else row.method
        alone = row is sweep.baseline or row.small or row.label == row.method  # without a d
        labels.append(f"{part}: {name}" + ("" if alone else at))
    axes.set_yticks(range(len(lines)), labels)
    axes.set_ylim(len(lines) - 0.5, -0.5)  # from above, each row with room for its points
    axes.set_xlabel(
        f"test {score.name}{score.unit}" + ("; diamonds: published" if any(published) else "")
    )
    return figure


def _colour(row: PointRecord, sweep: SweepRecord) -> str:
    return _BASELINE if row is sweep.baseline else _MEASURED


def _panel(
    axes: Axes,
    colours: Sequence[str],
    values: Sequence[Sequence[float]],
    published: Sequence[Sequence[float]] = (),
    *,
    bars: bool = True,
) -> None:
    """Draw a bar or a disc for every point, diamonds for published values, and the numbers.

    Those of diamonds have their colour: the row's own number may stand beside one.
    """
    for place, (colour, seeds) in enumerate(zip(colours, values, strict=True)):
        known = published[place] if published else []
        for value in known:
            axes.plot(value, place, "D", color=_PUBLISHED, markersize=3)
        if not seeds:
            continue
        if bars:
            axes.barh(place, mean(seeds), 0.7, color=colour)
        else:
            axes.plot(mean(seeds), place, "o", color=colour, markersize=4)
        behind, offset = max([*seeds, *known]), 4.0
        for value, shade in [(mean(seeds), "black"), *((value, _PUBLISHED) for value in known)]:
            axes.annotate(
                show_number(value),
                (behind, place),
                (offset, 0),
                textcoords="offset points",
                va="center",
                fontsize=5.5,
                color=shade,
            )
            # In points, as wide as digits are at this size:
            offset += 3.2 * len(show_number(value)) + 3
        if len(seeds) > 1:
            axes.plot(seeds, [place] * len(seeds), ".", color="0.2", markersize=1.8)
    axes.margins(x=0.22)
    axes.grid(False, axis="y")


def _logarithmic(axes: Axes) -> None:
    """Make the axis logarithmic where bars are too unlike for one from zero."""
    widths = [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)]
    if widths and 0 < 20 * min(widths) <= max(widths):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(10, numticks=4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: show_number(x)))
        axes.xaxis.set_minor_formatter(NullFormatter())


def show_number(x: float) -> str:
    """Show three digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
