"""The cost of P w and Pᵀ g against D (1e5 … 1e9) and d (1e2 … 1e6), with fitted exponents.

    python benchmarks/scaling.py --out benchmarks/results/scaling-NAME
    python benchmarks/scaling.py --parts adding --out benchmarks/results/adding-NAME

Two parts. ``families`` times both products of every family together. ``adding`` times each product
of ``hash`` against adding one vector of D numbers to another in place, which is the least that any
training step does to D weights: D = 1e6 … 1e9, d = 1,000, 10,000 and 100,000.

## families

Times are medians of a few calls, after one that does not count. Where both products would take
longer than ``--seconds``, only as many of the first rows are computed as that allows, and the time
is multiplied up: a range of rows costs in proportion for the families with ``local``; points so
measured are marked ("rows"), the others left out. Every point is written when it is measured, and
a run that was interrupted goes on where it was. The picture and the exponents of t ~ D^a d^b,
fitted where t exceeds a millisecond, are made from the file.

## adding

The sum and all products take turns, and a ratio is one of medians. Vectors have 2²⁷ numbers at most
(0.5 GB), and are gone over again and again where D is larger: that is far more than any cache, so
that it costs what D numbers cost. P w is formed by pieces of 2²² rows, as a network's tensors are:
malloc gives such a piece the room of the last one. ``P w, new`` makes one new vector of D (where D
is at most 2²⁷), and shows what the system takes for giving the memory, page by page. At D = 1e6
``hash`` keeps its index, and at 1e8 it does not; so 1e8 is also held against products at 1e6 of a
basis that is drawn again at each step, whose index is never kept.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

import subspan
from subspan.bench.timing import interleaved
from subspan.files import write_atomically
from subspan.report import pictures
from subspan.training import machine, records

FAMILIES = ("hash", "fastfood", "orthogonal", "kronecker", "sparse2full", "rademacher", "gaussian")
WEIGHTS = tuple(10**k for k in range(5, 10))
DIMS = tuple(10**k for k in range(2, 7))
AT_DIM, AT_WEIGHTS = 10**3, 10**7  # of the picture's two panels
PARTS = ("families", "adding")
# The part adding: what is compared, the largest vector, and rows of P w that are formed at once.
ADDING_WEIGHTS, ADDING_DIMS = tuple(10**k for k in range(6, 10)), (10**3, 10**4, 10**5)
VECTOR, PIECE = 1 << 27, 1 << 22
PRODUCTS = {"forward": "P w", "backward": "Pᵀ g", "new": "P w, new"}
LINEAR = (10**6, 10**8)  # the time per weight of the second is held against that of the first


def measure(family: str, D: int, d: int, seconds: float, rate: float) -> dict[str, Any] | None:
    """Seconds of both products together; ``rate`` is a guess at rows per second."""
    import time

    p = subspan.projection(family, out_dim=D, in_dim=d)
    rows = D
    if D / rate > seconds:
        if not p.local:
            return None
        rows = max(1 << 14, int(seconds * rate))
    some = range(min(D, rows))
    w, g = torch.randn(d), torch.randn(len(some))
    times = []
    for _ in range(4):
        start = time.perf_counter()
        p.matvec(w, rows=some)
        p.rmatvec(g, rows=some)
        times.append(time.perf_counter() - start)
    return {
        "family": family,
        "out_dim": D,
        "in_dim": d,
        "rows": len(some),
        "seconds": float(np.median(times[1:])) * D / len(some),
    }


def pieces(D: int, size: int) -> list[range]:
    """Cut [0, D) into ranges of a size."""
    return [range(start, min(start + size, D)) for start in range(0, D, size)]


def add(a: torch.Tensor, b: torch.Tensor, D: int) -> None:
    """Add D numbers to others in place."""
    for rows in pieces(D, len(a)):
        a[: len(rows)] += b[: len(rows)]


def forward(p: subspan.Projection, w: torch.Tensor, size: int, step: int = 0) -> None:
    """P w, some rows at a time."""
    for rows in pieces(p.out_dim, size):
        p.matvec(w, step=step, rows=rows)


def backward(p: subspan.Projection, g: torch.Tensor, step: int = 0) -> torch.Tensor:
    """Pᵀ g, the same numbers standing for rows after the first 2²⁷."""
    out = torch.zeros(p.in_dim)
    for rows in pieces(p.out_dim, len(g)):
        out += p.rmatvec(g[: len(rows)], step=step, rows=rows)
    return out


def against_adding(D: int, dims: Sequence[int], seconds: float) -> dict[str, Any]:
    """Times of both products of ``hash`` and of adding a vector of D to another in place.

    Returns:
        ``out_dim``, the timing ``add`` and for every d in ``dims`` (as text) timings of
        :data:`PRODUCTS`, all of all D weights. At the larger D of :data:`LINEAR` also
        "forward-small" and "backward-small", at the smaller D in the same turns, and with
        "-drawn" behind, of a basis whose index is not kept.
    """
    a, b = torch.zeros(min(D, VECTOR)), torch.ones(min(D, VECTOR))
    candidates: dict[str, Callable[[], object]] = {"add": functools.partial(add, a, b, D)}
    for d in dims:
        p = subspan.projection("hash", out_dim=D, in_dim=d)
        w = torch.randn(d)
        candidates[f"{d} forward"] = functools.partial(forward, p, w, PIECE)
        candidates[f"{d} backward"] = functools.partial(backward, p, b)
        if D <= VECTOR:
            candidates[f"{d} new"] = functools.partial(forward, p, w, D)
        if LINEAR[1] == D:
            small, few = subspan.projection("hash", out_dim=LINEAR[0], in_dim=d), b[: LINEAR[0]]
            for step, drawn in enumerate(("small", "small-drawn")):
                candidates[f"{d} forward-{drawn}"] = functools.partial(
                    forward, small, w, PIECE, step
                )
                candidates[f"{d} backward-{drawn}"] = functools.partial(backward, small, few, step)
    timings = interleaved(candidates, seconds, torch.device("cpu"))
    found: dict[str, Any] = {"out_dim": D, "add": timings.pop("add"), "dims": {}}
    for name, timing in timings.items():
        d_of, product = name.split()
        found["dims"].setdefault(d_of, {})[product] = timing
    return found


def say_adding(rows: list[dict[str, Any]]) -> str:
    """Put the table into words: nanoseconds a weight, and times the sum."""
    lines = [f"{'D':>13}  {'d':>7}  {'what':8}  ns a weight  × adding"]
    for row in rows:
        D, whole = row["out_dim"], row["add"]["median"]
        lines.append(f"{D:13,}  {'':7}  {'adding':8}  {1e9 * whole / D:11.3f}  {1:8.2f}")
        for d, timings in row["dims"].items():
            for key, name in PRODUCTS.items():
                if key in timings:
                    time = timings[key]["median"]
                    cells = f"{1e9 * time / D:11.3f}  {time / whole:8.2f}"
                    lines.append(f"{D:13,}  {int(d):7,}  {name:8}  {cells}")
    low, high = LINEAR
    for row in rows:
        for d, timings in row["dims"].items():
            for key in ("forward", "backward"):
                ratios = [
                    timings[key]["median"] / high / (timings[f"{key}-{small}"]["median"] / low)
                    for small in ("small", "small-drawn")
                    if f"{key}-{small}" in timings
                ]
                if ratios:
                    lines.append(
                        f"{PRODUCTS[key]}, d = {int(d):,}: a weight of {high:,} takes "
                        f"{ratios[0]:.2f} times as long as one of {low:,}, "
                        f"{ratios[-1]:.2f} times as long as one of {low:,} without a kept index"
                    )
    return "\n".join(lines)


@pictures.styled
def draw_adding(rows: list[dict[str, Any]], device: str) -> Figure:
    """Both products against D, as multiples of adding, a line for every d."""
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    for number, key in enumerate(("forward", "backward"), start=1):
        axes = figure.add_subplot(1, 2, number)
        for n, d in enumerate(ADDING_DIMS):
            line = [
                (row["out_dim"], row["dims"][str(d)][key]["median"] / row["add"]["median"])
                for row in rows
                if str(d) in row["dims"]
            ]
            axes.plot(*zip(*line, strict=True), marker="os^"[n], label=f"d = {d:,}")
        axes.axhline(1, color="0.3", linewidth=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda D, _: f"{D:.0e}".replace("e+0", "e")))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(bottom=0)
        axes.set_xlabel("D")
        axes.set_ylabel(f"{PRODUCTS[key]}, times adding a vector of D")
        if number == 1:
            axes.legend()
    figure.suptitle(device, fontsize=6.5, color="0.4")
    return figure


def exponents(points: list[dict[str, Any]]) -> tuple[float, float] | None:
    """The a and b of t ~ D^a d^b by least squares, where overheads do not matter."""
    slow = [p for p in points if p["seconds"] > 1e-3]
    if len(slow) < 4 or len({p["in_dim"] for p in slow}) < 2:
        return None
    matrix = [[1, math.log(p["out_dim"]), math.log(p["in_dim"])] for p in slow]
    times = [math.log(p["seconds"]) for p in slow]
    _, a, b = np.linalg.lstsq(np.array(matrix), np.array(times), rcond=None)[0].tolist()
    return a, b


@pictures.styled
def draw(points: list[dict[str, Any]], device: str) -> Figure:
    """Two panels: time against D and against d."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    plain = FuncFormatter(
        lambda x, _: f"{x:g}" if 1e-3 <= x < 1e4 else f"{x:.0e}".replace("e+0", "e")
    )
    panels = (("out_dim", "D", "in_dim", AT_DIM), ("in_dim", "d", "out_dim", AT_WEIGHTS))
    for number, (axis, name, fixed, value) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, number)
        for n, family in enumerate(FAMILIES):
            of_family = [p for p in points if p["family"] == family]
            line = sorted((p[axis], p["seconds"]) for p in of_family if p[fixed] == value)
            found = exponents(of_family)
            fit = f"  D^{found[0]:.2f} d^{found[1]:.2f}" if found else ""
            axes.plot(
                *zip(*line, strict=True),
                marker="os^DvPX"[n],
                label=family + (fit if number == 1 else ""),
            ) if line else None
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis_of in (axes.xaxis, axes.yaxis):
            axis_of.set_major_formatter(plain)
            axis_of.set_minor_formatter(NullFormatter())
        axes.set_xlabel(name)
        axes.set_ylabel("seconds for P w and Pᵀ g")
        other = "d" if name == "D" else "D"
        axes.set_title(f"{other} = {value:,}")
        if number == 1:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(device, fontsize=6.5, color="0.4")
    return figure


def main() -> None:
    """Read the command line, measure what is not there yet, then draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="a folder")
    parser.add_argument("--parts", default=",".join(PARTS), help="separated by commas, see above")
    parser.add_argument(
        "--seconds",
        type=float,
        default=4.0,
        help="for one point's products; of adding for each product (five turns at least)",
    )
    parser.add_argument("--families", default=",".join(FAMILIES), help="separated by commas")
    parser.add_argument("--most-weights", type=float, default=1e9, help="the largest D")
    given = parser.parse_args()
    parts, families = given.parts.split(","), given.families.split(",")
    for part in parts:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}: one of {', '.join(PARTS)}")
    for family in families:
        if family not in FAMILIES:
            parser.error(f"unknown family {family!r}: one of {', '.join(FAMILIES)}")

    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "scaling.json"
    record = json.loads(file.read_text()) if file.is_file() else None
    if record is None:
        device = machine.device_name(torch.device("cpu"))
        told = {"device": device, "versions": machine.versions()}
        record = {"machine": told, "points": []}
    if "families" in parts:
        measure_families(record, families, file, given.seconds, given.most_weights)
    if "adding" in parts:
        measure_adding(record, file, given.seconds, given.most_weights)


def measure_adding(record: dict[str, Any], file: Path, seconds: float, most_weights: float) -> None:
    """Measure every D of the part ``adding`` that is not there yet, then draw."""
    rows = record.setdefault("adding", [])
    for D in ADDING_WEIGHTS:
        if most_weights >= D and all(row["out_dim"] != D for row in rows):
            rows.append(against_adding(D, ADDING_DIMS, seconds))
            rows.sort(key=lambda row: row["out_dim"])
            records.write_json(file, record)
    if rows:
        figure = draw_adding(rows, record["machine"]["device"])
        for name, content in (("png", pictures.png(figure)), ("svg", pictures.svg(figure))):
            write_atomically(file.with_name(f"adding.{name}"), content)
        print(say_adding(rows))
        print(f"picture: {file.with_name('adding.png')}")


def measure_families(
    record: dict[str, Any], families: list[str], file: Path, seconds: float, most_weights: float
) -> None:
    """Measure every point of these families that is not there yet, then draw."""
    there = {(p["family"], p["out_dim"], p["in_dim"]) for p in record["points"]}
    for family in families:
        rates: dict[tuple[int, int], float] = {}
        for d in DIMS:
            for D in WEIGHTS:
                if d > D or most_weights < D:
                    continue
                # A tenth of the rate at a tenth of d, or that of fewer weights: too low, if wrong.
                rate = rates.get((D, d // 10), 1e10) / 10
                rate = min(rate, rates.get((D // 10, d), rate))
                if (family, D, d) not in there:
                    point = measure(family, D, d, seconds, rate)
                    if point is None:
                        continue
                    record["points"].append(point)
                    records.write_json(file, record)
                    print(
                        f"{family:12} D={D:>13,} d={d:>9,}  {point['seconds']:10.4f} s"
                        + ("" if point["rows"] == D else f"  (from {point['rows']:,} rows)"),
                        flush=True,
                    )
                [of_all] = [
                    p["seconds"]
                    for p in record["points"]
                    if (p["family"], p["out_dim"], p["in_dim"]) == (family, D, d)
                ]
                rates[D, d] = D / of_all
    figure = draw(record["points"], record["machine"]["device"])
    for name, content in (("png", pictures.png(figure)), ("svg", pictures.svg(figure))):
        write_atomically(file.with_name(f"scaling.{name}"), content)
    for family in families:
        found = exponents([p for p in record["points"] if p["family"] == family])
        if found:
            print(f"{family:12} t ~ D^{found[0]:.2f} d^{found[1]:.2f}")
    print(f"picture: {file.with_name('scaling.png')}")


if __name__ == "__main__":
    main()
