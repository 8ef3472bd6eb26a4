"""The table and the panel of the picture that the parts on large networks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from subspan.bench.bars import BLUE, GREEN, draw_bars
from subspan.bench.part import Measurement, Part, Quantity, show
from subspan.report.bars import show_number
from subspan.report.tables import Table


class LargePart(Part):
    """Ways to train one large network: time, memory and loss; see ``large_network.py``."""

    quantities = (
        Quantity("step", "step ms", "a training step"),
        Quantity("peak_bytes", "peak MB", "peak memory"),
    )

    def whole(
        self, row: Measurement, rows: Sequence[Measurement], quantity: Quantity
    ) -> float | None:
        """Return the bytes of θ₀ for a peak beyond it, and the step of all weights for a step."""
        if quantity.key == "peak_bytes":
            return row.get("weight_bytes")
        return super().whole(row, rows, quantity)

    def make_heading(self, rows: Sequence[Measurement]) -> str:
        """Describe the network, and say what its tensors and the libraries take anyway."""
        weights, dim = rows[0]["weights"], rows[0]["dim"]
        lines = [f"{super().make_heading(rows)}: {weights:,} weights, d = {dim:,}"]
        known = next((row for row in rows if "peak_bytes" in row), None)
        if known is not None:
            lines.append(
                f"θ₀ takes {known['weight_bytes'] / 1e6:,.1f} MB, its largest tensor "
                f"{known['largest_bytes'] / 1e6:,.1f} MB, the libraries "
                f"{known['library_bytes'] / 1e6:,.0f} MB or so; the peaks are beyond these"
            )
        return "\n".join(lines)

    def table(self, rows: Sequence[Measurement], machine: Mapping[str, Any]) -> Table:
        """Make the table of a network: each way to train it."""
        allowed = any("allowed_bytes" in row for row in rows)
        columns = ["trained by", "numbers", "step ms", "× full", "peak MB", "× θ₀"]
        columns += ["× (3 × largest + activations)"] * allowed + ["loss", "after"]
        step, peak = self.quantities
        lines = []
        for row in rows:
            if "skipped" in row:
                lines.append([self.label(row), row["skipped"]])
                continue
            of_full, of_weights = self.ratio(row, rows, step), self.ratio(row, rows, peak)
            cells = [f"{row['numbers']:,}", show(row["step"])]
            cells.append("" if of_full is None else show_number(of_full))
            cells.append(f"{row['peak_bytes'] / 1e6:,.1f}")
            cells.append(f"{of_weights:.3f}")
            if allowed:
                cells.append(f"{row['peak_bytes'] / row['allowed_bytes']:.2f}")
            lines.append([self.label(row), *cells, *(f"{loss:.5g}" for loss in row["losses"])])
        return Table(columns, lines, words=1)

    def draw(self, axes: Axes, rows: Sequence[Measurement]) -> None:
        """Draw peak memory beyond θ₀ in units of θ₀, and steps against training all weights."""
        step, peak = self.quantities
        bars = [
            ([self.ratio(row, rows, peak) for row in rows], BLUE, "peak memory beyond θ₀, × θ₀")
        ]
        times = [self.ratio(row, rows, step) for row in rows]
        if any(times):
            bars.append((times, GREEN, "step, × that of full"))
        draw_bars(axes, [self.tick(row) for row in rows], bars)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
