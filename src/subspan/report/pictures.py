"""The pictures of a report, drawn to be read at a paper's column width (3.5 in) and on a screen.

They are drawn with matplotlib's defaults and `STYLE`, whatever the user's own settings are, and
through its object interface: no window system, no global figure.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from subspan.files import write_atomically
from subspan.report.curves import (
    Curve,
    measured_curves,
    number,
    published_curves,
    small_curves,
    title,
)
from subspan.sweeps.result import PointRecord, SweepRecord
from subspan.training.records import RunRecord

STYLE = {
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.92",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.4,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.handletextpad": 0.6,
    "text.parse_math": False,  # a "$" in a user's name is a "$"
    "svg.fonttype": "none",  # text stays text, set in the reader's font
    "svg.hashsalt": "subspan",  # the same data gives the same file
}
styled = style.context(["default", STYLE])

# Okabe and Ito's colours, told apart by the colour-blind, with wine and olive for their black and
# yellow; seven markers, so that a pair repeats only after 56 methods.
_COLOURS = [
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#882255", "#999933"),
]
_MARKERS = "os^DvPX"
_GREYS = ("0.3", "0.5", "0.65")
_INK = "0.2"
_WIDTH = 3.5  # inches
_TITLE_COLUMN, _LEGEND_COLUMN = 46, 60  # characters that fit into the width

CAPTION = (
    "Test {score} against d. Lines join the means over seeds, dots are the seeds and bands "
    "their range. A vertical line marks an intrinsic dimension, the bar at its top the interval."
)


@styled
def sweep_figure(sweep: SweepRecord) -> Figure:
    """Test score against d, one line per method, with the intrinsic dimensions marked.

    Lines join the means over seeds, dots are the seeds and bands their range. An intrinsic
    dimension is dropped to the axis, a bar at its top is its interval. Dashed grey is published.
    """
    measured = measured_curves(sweep) + small_curves(sweep)
    published = published_curves(sweep)
    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(textwrap.fill(title(sweep), _TITLE_COLUMN))
    rows = [row for row in sweep.rows if not row.small]
    head = max((row.head_parameters for row in rows), default=0)
    trained = all(row.trainable_parameters - row.head_parameters == row.dim for row in rows)
    axes.set_xlabel("subspace dimension d" + (" (numbers trained)" if trained else ""))
    if head:
        axes.set_xlabel(f"numbers trained, without the head's {head:,}")
    if any(row.ranks for row in sweep.rows):
        axes.set_xlabel("numbers trained, on average over seeds")
    axes.set_ylabel(f"test {sweep.score.name}{sweep.score.unit}")

    lines = [
        _draw(axes, curve, palette[i % len(palette)], _MARKERS[i % len(_MARKERS)])
        for curves, palette in ((measured, _COLOURS), (published, _GREYS))
        for i, curve in enumerate(curves)
    ]
    levels = _draw_baseline(axes, sweep.baseline, sweep) if sweep.baseline else []
    levels += [_draw_head(axes, row, sweep) for row in rows if not row.dim]
    if not measured:
        axes.text(0.5, 0.5, "no run succeeded", transform=axes.transAxes, ha="center")
    _scale_dims(axes, [d for curve in measured + published for d in curve.dims])
    axes.set_ylim(axes.get_ylim())  # what follows ends at the axis and must not move it
    for curve, line in zip(measured + published, lines, strict=True):
        _mark(axes, curve, line)
    _legend_below(figure, lines + levels)
    return figure


@styled
def comparison_figure(sweeps: Mapping[str, SweepRecord]) -> Figure:
    """Return the curves of several networks at equal d; stars are all their weights.

    A network has a colour, a method a marker.
    """
    first = next(iter(sweeps.values()))
    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    names = [str(sweep.config.get("net")) for sweep in sweeps.values()]
    data = first.config.get("data") or first.config.get("task")
    axes.set_title(textwrap.fill(f"{', '.join(names)} on {data}", _TITLE_COLUMN))
    axes.set_xlabel("numbers trained; stars: all weights")
    axes.set_ylabel(f"test {first.score.name}{first.score.unit}")
    lines: list[Line2D] = []
    dims: list[int] = []
    for i, (net, sweep) in enumerate(sweeps.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        for j, curve in enumerate(measured_curves(sweep)):
            shown = replace(curve, label=f"{net}, {curve.label}")
            lines.append(_draw(axes, shown, colour, _MARKERS[j % len(_MARKERS)]))
            dims += curve.dims
        if sweep.baseline:
            size = sweep.baseline.trainable_parameters
            scores = [sweep.score.scale * score for score in sweep.baseline.test_score]
            mean = sum(scores) / len(scores)
            axes.plot([size], [mean], marker="*", markersize=7, color=colour, linestyle="none")
            dims.append(size)
    _scale_dims(axes, dims)
    _legend_below(figure, lines)
    return figure


def _draw(axes: Axes, curve: Curve, colour: str, marker: str) -> Line2D:
    """Draw one curve: a line through the means, a band and dots for the seeds."""
    (line,) = axes.plot(
        curve.dims,
        curve.mean,
        color=colour,
        marker=marker,
        label=curve.label,
        linestyle=("--" if curve.published else "-") if curve.joined else "none",
        markerfacecolor="white" if curve.published else colour,
        markeredgewidth=0.8,
        zorder=2.5 if curve.published else 3,
    )
    if any(len(seeds) > 1 for seeds in curve.scores):
        low, high = [min(s) for s in curve.scores], [max(s) for s in curve.scores]
        axes.fill_between(curve.dims, low, high, color=colour, alpha=0.15, linewidth=0)
        x = [d for d, seeds in zip(curve.dims, curve.scores, strict=True) for _ in seeds]
        y = [a for seeds in curve.scores for a in seeds]
        axes.plot(x, y, linestyle="none", marker=".", markersize=1.8, color=colour, alpha=0.6)
    return line


def _draw_baseline(axes: Axes, baseline: PointRecord, sweep: SweepRecord) -> list[Line2D]:
    """Draw the score of training all weights, and the share of it that counts as solved."""
    score, scores = sweep.score, baseline.test_score
    mean = sum(scores) / len(scores)
    solved = score.share(mean, sweep.threshold)
    span = [score.scale * end for end in (min(scores), max(scores))]
    axes.axhspan(*span, color=_INK, alpha=0.12, linewidth=0)
    label = f"{baseline.label}: {score.show(mean, 1)}"
    goal = f"{100 * sweep.threshold:g} % of {baseline.label}"
    return [
        axes.axhline(score.scale * mean, color=_INK, linewidth=0.9, label=label),
        axes.axhline(score.scale * solved, color=_INK, linewidth=0.9, linestyle=":", label=goal),
    ]


def _draw_head(axes: Axes, row: PointRecord, sweep: SweepRecord) -> Line2D:
    """Draw the score of training nothing but the head: it has no place on the axis of d."""
    mean = sum(row.test_score) / len(row.test_score)
    label = f"{row.method}: {sweep.score.show(mean, 1)}"
    return axes.axhline(
        sweep.score.scale * mean, color=_INK, linewidth=0.9, linestyle="-.", label=label
    )


def _mark(axes: Axes, curve: Curve, line: Line2D) -> None:
    """Drop a line from a curve's crossing to the axis, under a bar as wide as its interval."""
    if curve.d_int is None or curve.target is None:
        return
    axes.plot(
        [curve.d_int, curve.d_int],
        [axes.get_ylim()[0], curve.target],
        color=line.get_color(),
        linestyle=line.get_linestyle(),
        linewidth=0.7,
    )
    low, high = curve.interval
    if low is not None and high is not None:
        axes.hlines(curve.target, low, high, colors=line.get_color(), linewidth=3.5, alpha=0.45)


def _scale_dims(axes: Axes, dims: Sequence[int]) -> None:
    """Make the axis of dims logarithmic, with few and plain numbers on it."""
    low, high = (min(dims), max(dims)) if dims else (1, 1000)
    room = max((high / low) ** 0.04, 1.1)
    low, high = low / room, high * room
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(dimension_ticks(low, high, dims)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda d, _: number(d)))
    axes.xaxis.set_minor_locator(NullLocator())


def dimension_ticks(low: float, high: float, dims: Sequence[int]) -> list[int]:
    """Return a few numbers to write on an axis from low to high.

    Powers of ten; with 2 and 5 times them where they alone are fewer than three; the dims
    themselves where even those are.
    """
    powers = [10**e for e in range(math.ceil(math.log10(high)) + 1)]
    decades = [p for p in powers if low <= p <= high]
    finer = [lead * p for p in powers for lead in (1, 2, 5) if low <= lead * p <= high]
    if len(decades) < 3 <= len(finer):
        return finer
    ticks = decades if len(decades) >= 3 else sorted(set(dims))
    return ticks[:: max(1, math.ceil(len(ticks) / 6))]


def _legend_below(figure: Figure, entries: Sequence[Line2D]) -> None:
    """Draw the legend under the axes, in two columns if they fit; the figure grows by it."""
    labels = [str(entry.get_label()) for entry in entries]
    half = math.ceil(len(labels) / 2)
    widths = [max(map(len, column), default=0) for column in (labels[:half], labels[half:])]
    columns = 2 if len(labels) > 2 and sum(widths) <= _LEGEND_COLUMN else 1
    figure.set_size_inches(_WIDTH, 2.35 + 0.135 * math.ceil(len(labels) / columns))
    if entries:
        figure.legend(entries, labels, loc="outside lower center", ncols=columns, columnspacing=1)


@styled
def run_figure(run: RunRecord) -> Figure:
    """Losses and validation score of one run, by epoch, and what its method tells besides.

    Of random bases, what they catch of the gradient; of factored layers their ranks, and below the
    singular values at the end.
    """
    bases = any(line.alignment for line in run.history)
    ranks = any(line.ranks for line in run.history)
    spectra = any(line.singular_values for line in run.history)
    more = [draw for there, draw in ((bases, _draw_alignment), (ranks, _draw_ranks)) if there]
    panels = 2 + len(more)
    figure = Figure(figsize=(_WIDTH, 1.6 * (panels + spectra)), layout="constrained")
    by_epoch, *below = figure.subfigures(
        1 + spectra, height_ratios=[panels, 1.1][: 1 + spectra], squeeze=False
    )[:, 0]
    losses, accuracy, *rest = by_epoch.subplots(panels, sharex=True)
    epochs = [line.epoch for line in run.history]
    losses.set_title(textwrap.fill(title(run), _TITLE_COLUMN))
    train = [line.train_loss for line in run.history]
    valid = [line.val_loss for line in run.history]
    losses.plot(epochs, train, color=_COLOURS[0], marker="o", label="training")
    losses.plot(epochs, valid, color=_COLOURS[1], marker="s", label="validation")
    losses.set_ylabel("loss")
    shown = [run.score.scale * line.val_score for line in run.history]
    accuracy.plot(epochs, shown, color=_COLOURS[1], marker="s", label="validation")
    if run.test_score is not None:
        label, level = run.score.show(run.test_score, 1), run.score.scale * run.test_score
        dots = {"color": _INK, "linewidth": 0.9, "linestyle": ":"}
        accuracy.axhline(level, label=f"test, at the end: {label}", **dots)
    accuracy.set_ylabel(f"{run.score.name}{run.score.unit}")
    for axes, draw in zip(rest, more, strict=True):
        draw(axes, run)
    if below:
        singular = below[0].subplots()
        _draw_spectra(singular, run)
        singular.legend(ncols=2)
    lowest = rest[-1] if rest else accuracy
    lowest.set_xlabel("epoch")
    lowest.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not epochs:
        losses.text(0.5, 0.5, "no epoch was finished", transform=losses.transAxes, ha="center")
    figure.align_ylabels()
    for axes in (losses, accuracy, *rest):
        axes.legend()
    return figure


def _draw_alignment(axes: Axes, run: RunRecord) -> None:
    """Draw the share of the gradient that bases catch, for as many compartments as have colours."""
    names = list(dict.fromkeys(name for line in run.history for name in line.alignment))
    shown = [name for name in names if name != "all"][: len(_COLOURS) - 1]
    if len(shown) < 2:
        shown = []  # it is all there is
    for name, colour in zip(["all", *shown], [_INK, *_COLOURS], strict=False):
        lines = [line for line in run.history if name in line.alignment]
        epochs = [line.epoch for line in lines]
        cosine = [line.alignment[name].cosine for line in lines]
        share = [line.alignment[name].share for line in lines]
        axes.plot(epochs, cosine, color=colour, marker="o", label=f"{name}: cosine")
        if name == "all":
            axes.plot(epochs, share, color=colour, linestyle=":", label="all: share of its norm")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("gradient in the basis")


def _draw_ranks(axes: Axes, run: RunRecord) -> None:
    """Draw the ranks of factored layers, of as many as have colours."""
    lines = [line for line in run.history if line.ranks]
    for name, colour in zip(lines[0].ranks, _COLOURS, strict=False):
        known = [line for line in lines if name in line.ranks]
        ranks = [line.ranks[name] for line in known]
        axes.plot([line.epoch for line in known], ranks, color=colour, marker="o", label=name)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("rank")


def _draw_spectra(axes: Axes, run: RunRecord) -> None:
    """Draw the singular values of factored layers after the last epoch, largest first."""
    last = [line for line in run.history if line.singular_values][-1]
    for (name, values), colour in zip(last.singular_values.items(), _COLOURS, strict=False):
        axes.plot(range(1, len(values) + 1), values, color=colour, marker=".", label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda s, _: f"{s:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"number of the singular value, after epoch {last.epoch}")
    axes.set_ylabel("singular value")


def write(figure: Figure, out: Path, name: str) -> list[Path]:
    """Write ``NAME.png`` and ``NAME.svg`` in a folder; returns the files."""
    files = {out / f"{name}.png": png(figure), out / f"{name}.svg": svg(figure)}
    for path, content in files.items():
        write_atomically(path, content)
    return list(files)


@styled
def png(figure: Figure) -> bytes:
    """Return the figure as a picture of 300 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=300)
    return buffer.getvalue()


@styled
def svg(figure: Figure) -> bytes:
    """Return the figure as vectors; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    return buffer.getvalue()
