"""The picture of a benchmark: bars of ratios, one panel for each table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from subspan.bench import candidates
from subspan.bench.lowrank import break_even
from subspan.files import write_atomically
from subspan.report import pictures
from subspan.training.records import grouped

_FORWARD, _BACKWARD, _ONE = "#0072B2", "#E69F00", "#009E73"


def write(record: dict[str, Any], out: Path) -> list[Path]:
    """Write ``bench.png`` and ``bench.svg`` beside the record; returns the files."""
    figure = draw(record)
    files = {"bench.png": pictures.png(figure), "bench.svg": pictures.svg(figure)}
    for name, content in files.items():
        write_atomically(out / name, content)
    return [out / name for name in files]


@pictures.styled
def draw(record: dict[str, Any]) -> Figure:
    """Products as multiples of the stored matrix, steps and memory as multiples of plain Adam."""
    panels: list[tuple[Callable[..., None], str, list[dict[str, Any]]]] = []
    for (out_dim, in_dim), rows in grouped(record.get("products", ()), "out_dim", "in_dim"):
        panels.append((_products, f"P w and Pᵀ g, D = {out_dim:,}, d = {in_dim:,}", rows))
    for (net, weights), rows in grouped(record.get("steps", ()), "net", "weights"):
        title = f"training step, {net} ({weights:,} weights), d = {rows[0]['dim']:,}"
        panels.append((_steps, title, rows))
    for (net, weights), rows in grouped(record.get("optimizers", ()), "net", "weights"):
        title = f"step in redrawn bases, {net} ({weights:,} weights), d = {rows[0]['dim']:,}"
        panels.append((_steps, title, rows))
    for (out_dim, in_dim), rows in grouped(record.get("memory", ()), "out_dim", "in_dim"):
        panels.append((_memory, f"peak memory, D = {out_dim:,}, d = {in_dim:,}", rows))
    for (width,), rows in grouped(record.get("lowrank", ()), "width"):
        title = f"five layers of {width:,}, batch {rows[0]['batch_size']}: time by rank"
        panels.append((_by_rank, title, rows))
    for (what,), rows in grouped(record.get("sums", ()), "what"):
        panels.append((_steps, f"{what}, batch {rows[0]['batch_size']}", rows))
    for (net, name), rows in grouped(record.get("laboratory", ()), "net", "method"):
        panels.append((_steps, f"epoch of {net}, {name}, batch {rows[0]['batch_size']}", rows))
    for (_, batch, allocator), rows in grouped(
        record.get("blocks", ()), "blocks", "batch_size", "allocator"
    ):
        title = f"{rows[0]['weights']:,} weights, batch {batch}, memory {allocator}"
        panels.append((_large, title, rows))
    for (dtype, tokens), rows in grouped(record.get("transformer", ()), "dtype", "tokens"):
        title = f"decoder of {rows[0]['weights']:,} weights, {dtype}, {tokens} tokens"
        panels.append((_large, title, rows))
    columns = min(2, max(1, len(panels)))
    lines = -(-max(1, len(panels)) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * lines), layout="constrained")
    for number, (function, title, rows) in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, number)
        axes.set_title(title)
        function(axes, rows)
    figure.suptitle(record["machine"]["device"], fontsize=6.5, color="0.4")
    return figure


def _products(axes: Axes, rows: list[dict[str, Any]]) -> None:
    base = next((row for row in rows if row["projection"] == candidates.DENSE), {})
    bars = []
    for key, colour, label in (("forward", _FORWARD, "P w"), ("backward", _BACKWARD, "Pᵀ g")):
        whole = base[key]["median"] if key in base else 1e-3
        bars.append(
            ([row[key]["median"] / whole if key in row else None for row in rows], colour, label)
        )
    _bars(axes, rows, bars)
    unit = "times the product with a stored matrix" if "forward" in base else "milliseconds"
    axes.set_xlabel(unit)
    axes.legend(loc="upper right")


def _steps(axes: Axes, rows: list[dict[str, Any]]) -> None:
    whole = rows[0]["step"]["median"]
    values = [row["step"]["median"] / whole if "step" in row else None for row in rows]
    _bars(axes, rows, [(values, _ONE, "")])
    base = rows[0]["projection"]
    units = {"dense": "times the dense one", "bare": "times the bare loop"}
    axes.set_xlabel(units.get(base, f"times the step of plain {base}"))


def _memory(axes: Axes, rows: list[dict[str, Any]]) -> None:
    values = [
        row["peak_bytes"] / (4 * row["out_dim"]) if "peak_bytes" in row else None for row in rows
    ]
    _bars(axes, rows, [(values, _ONE, "")])
    axes.set_xlabel("times the weights in float32")


def _large(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Steps against training all weights, and peak memory beyond θ₀ in units of θ₀."""
    whole = rows[0]["step"]["median"] if "step" in rows[0] else None
    memory, times = [], []
    for row in rows:
        there = "peak_bytes" in row
        memory.append(row["peak_bytes"] / row["weight_bytes"] if there else None)
        times.append(row["step"]["median"] / whole if there and whole else None)
    bars = [(memory, _FORWARD, "peak memory beyond θ₀, × θ₀")]
    if whole:
        bars.append((times, _ONE, "step, × that of full"))
    _bars(axes, rows, bars)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


def _by_rank(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Times and peak memory as shares of the dense network's, and where a step breaks even."""
    dense, *factored = rows
    ranks = [row["rank"] for row in factored]
    for key, base, colour, label in (
        ("step", "step", _ONE, "training step, ranks stay"),
        ("adaptive", "step", _BACKWARD, "training step, ranks may change"),
        ("inference", "inference", _FORWARD, "inference"),
    ):
        times = [row[key]["median"] / dense[base]["median"] for row in factored]
        axes.plot(ranks, times, color=colour, marker="o", label=label)
    memory = [row["peak_bytes"] / dense["peak_bytes"] for row in factored]
    axes.plot(ranks, memory, color="0.5", marker="s", linestyle=":", label="peak training memory")
    even = break_even(rows)
    if even is not None:
        known = even < max(ranks)
        axes.axvline(even, color=_ONE, linewidth=0.8, linestyle="--")
        word = f"a step breaks even at rank {even:,.0f}" if known else "no break-even up to here"
        axes.annotate(
            word,
            (even, 0.03),
            xycoords=axes.get_xaxis_transform(),
            xytext=(-3, 0),
            textcoords="offset points",
            ha="right",
            fontsize=5.5,
        )
    axes.axhline(1, color="0.3", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda x, _: _number(x)))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xticks(ranks)
    axes.set_xlabel("rank")
    axes.set_ylabel("times the dense network's")
    axes.legend(loc="upper left")


def _bars(
    axes: Axes, rows: list[dict[str, Any]], bars: list[tuple[list[float | None], str, str]]
) -> None:
    """Horizontal bars around 1, on a logarithmic axis, each with its number."""
    height = 0.8 / len(bars)
    for n, (values, colour, label) in enumerate(bars):
        places = [line + n * height for line in range(len(rows))]
        known = [(place, value) for place, value in zip(places, values, strict=True) if value]
        axes.barh(
            [place for place, _ in known],
            [value - 1 for _, value in known],
            height,
            left=1,
            color=colour,
            label=label,
        )
        for place, value in known:
            axes.annotate(
                _number(value),
                (value, place),
                xytext=(2 if value >= 1 else -2, 0),
                textcoords="offset points",
                va="center",
                ha="left" if value >= 1 else "right",
                fontsize=5,
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _number(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    axes.set_xlim(low / 2, high * 2)
    axes.axvline(1, color="0.3", linewidth=0.8)
    middles = [line + 0.4 - height / 2 for line in range(len(rows))]
    names = [row["projection"] + (" (skipped)" if "skipped" in row else "") for row in rows]
    axes.set_yticks(middles, names)
    axes.grid(False, axis="y")
    axes.invert_yaxis()


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
