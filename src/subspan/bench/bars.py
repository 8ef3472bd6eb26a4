"""Horizontal bars of ratios, each with its number."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from subspan.report.bars import show_number

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
COLOURS = (BLUE, ORANGE, GREEN)
Bars = tuple[Sequence[float | None], str, str]  # a value for each row, the colour, the label


def draw_bars(axes: Axes, names: Sequence[str], bars: Sequence[Bars]) -> None:
    """Draw bars that begin at 1, on a logarithmic axis; rows, by name, from top to bottom.

    There is one set of bars for each colour; a row without a value has no bar.
    """
    height = 0.8 / len(bars)
    for n, (values, colour, label) in enumerate(bars):
        known = [(row + n * height, value) for row, value in enumerate(values) if value]
        axes.barh(
            [y for y, _ in known],
            [value - 1 for _, value in known],
            height,
            left=1,
            color=colour,
            label=label,
        )
        for y, value in known:
            axes.annotate(
                show_number(value),
                (value, y),
                xytext=(2 if value >= 1 else -2, 0),
                textcoords="offset points",
                va="center",
                ha="left" if value >= 1 else "right",
                fontsize=5,
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: show_number(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    axes.set_xlim(low / 2, high * 2)
    axes.axvline(1, color="0.3", linewidth=0.8)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names)
    axes.grid(False, axis="y")
    axes.invert_yaxis()
