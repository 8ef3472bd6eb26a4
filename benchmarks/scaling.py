"""The cost of P w and Pᵀ g against D (1e5 … 1e9) and d (1e2 … 1e6), with fitted exponents.

    python benchmarks/scaling.py --out benchmarks/results/scaling-NAME

Times are medians of a few calls, after one that does not count. Where both products would take
longer than ``--seconds``, only as many of the first rows are computed as that allows, and the time
is multiplied up: a range of rows costs in proportion for the families with ``local``; points so
measured are marked ("rows"), the others left out. Every point is written when it is measured, and
a run that was interrupted goes on where it was. The picture and the exponents of t ~ D^a d^b,
fitted where t exceeds a millisecond, are made from the file.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

import subspan
from subspan.files import write_atomically
from subspan.lab import records
from subspan.lab.report import pictures

FAMILIES = ("hash", "fastfood", "orthogonal", "kronecker", "sparse2full", "rademacher", "gaussian")
WEIGHTS = tuple(10**k for k in range(5, 10))
DIMS = tuple(10**k for k in range(2, 7))
AT_DIM, AT_WEIGHTS = 10**3, 10**7  # of the picture's two panels


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
        "family": family, "out_dim": D, "in_dim": d, "rows": len(some),
        "seconds": float(np.median(times[1:])) * D / len(some),
    }  # fmt: skip


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
                *zip(*line, strict=True), marker="os^DvPX"[n],
                label=family + (fit if number == 1 else ""),
            ) if line else None  # fmt: skip
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
    """Measure what is not there yet, then draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="a folder")
    parser.add_argument("--seconds", type=float, default=4.0, help="for one point's products")
    parser.add_argument("--families", default=",".join(FAMILIES), help="separated by commas")
    parser.add_argument("--most-weights", type=float, default=1e9, help="the largest D")
    given = parser.parse_args()
    families = given.families.split(",")
    for family in families:
        if family not in FAMILIES:
            parser.error(f"unknown family {family!r}: one of {', '.join(FAMILIES)}")

    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "scaling.json"
    record = json.loads(file.read_text()) if file.is_file() else None
    if record is None:
        machine = {"device": records.device_name(torch.device("cpu"))}
        record = {"machine": machine | {"versions": records.versions()}, "points": []}
    there = {(p["family"], p["out_dim"], p["in_dim"]) for p in record["points"]}
    for family in families:
        rates: dict[tuple[int, int], float] = {}
        for d in DIMS:
            for D in WEIGHTS:
                if d > D or given.most_weights < D:
                    continue
                # A tenth of the rate at a tenth of d, or that of fewer weights: too low, if wrong.
                rate = rates.get((D, d // 10), 1e10) / 10
                rate = min(rate, rates.get((D // 10, d), rate))
                if (family, D, d) not in there:
                    point = measure(family, D, d, given.seconds, rate)
                    if point is None:
                        continue
                    record["points"].append(point)
                    records.write_json(file, record)
                    print(
                        f"{family:12} D={D:>13,} d={d:>9,}  {point['seconds']:10.4f} s"
                        + ("" if point["rows"] == D else f"  (from {point['rows']:,} rows)"),
                        flush=True,
                    )
                [seconds] = [
                    p["seconds"] for p in record["points"]
                    if (p["family"], p["out_dim"], p["in_dim"]) == (family, D, d)
                ]  # fmt: skip
                rates[D, d] = D / seconds
    figure = draw(record["points"], record["machine"]["device"])
    for name, content in (("png", pictures.png(figure)), ("svg", pictures.svg(figure))):
        write_atomically(given.out / f"scaling.{name}", content)
    for family in families:
        found = exponents([p for p in record["points"] if p["family"] == family])
        if found:
            print(f"{family:12} t ~ D^{found[0]:.2f} d^{found[1]:.2f}")
    print(f"picture: {given.out / 'scaling.png'}")


if __name__ == "__main__":
    main()
