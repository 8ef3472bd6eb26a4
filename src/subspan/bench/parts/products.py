"""The time of P w and of Pᵀ g, against a stored matrix and against the machine's bandwidth."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from subspan.bench import candidates
from subspan.bench.part import Measurement, Part, Quantity, number, show
from subspan.bench.settings import Bench
from subspan.bench.timing import interleaved
from subspan.families import stored
from subspan.report.bars import show_number
from subspan.report.tables import Table


class Products(Part):
    """P w and Pᵀ g."""

    name = "products"
    help = "P w and Pᵀ g, against a matrix that is stored"
    shared = ("out_dim", "in_dim")
    quantities = (Quantity("forward", "P w ms", "P w"), Quantity("backward", "Pᵀ g ms", "Pᵀ g"))
    title = "P w and Pᵀ g, D = {out_dim:,}, d = {in_dim:,}"
    heading = "products at D = {out_dim:,}, d = {in_dim:,}"
    unit = "times the product with a stored matrix"

    def count(self, settings: Bench) -> int:
        """Count the sizes."""
        return len(settings.sizes)

    def measure(self, settings: Bench, done: Callable[[str], None]) -> list[Measurement]:
        """Time both products of every projection at every size.

        Returns:
            Rows with the projection's name, ``out_dim``, ``in_dim``, ``bytes_of_p`` that exist
            between products, and the timings ``forward`` (P w) and ``backward`` (Pᵀ g).
        """
        rows, device = [], settings.torch_device
        for out_dim, in_dim in settings.pairs():
            w, g = torch.randn(in_dim, device=device), torch.randn(out_dim, device=device)
            at_this_size, forward, backward = {}, {}, {}
            for name in settings.candidates:
                row: Measurement = {"projection": name, "out_dim": out_dim, "in_dim": in_dim}
                rows.append(row)
                if reason := candidates.too_large(name, out_dim, in_dim, device):
                    row["skipped"] = reason
                    continue
                p = candidates.make(name, out_dim, in_dim)
                at_this_size[name] = row
                row["bytes_of_p"] = candidates.bytes_of(p, device)
                forward[name] = functools.partial(p.matvec, w)
                backward[name] = functools.partial(p.rmatvec, g)
            for direction, functions in (("forward", forward), ("backward", backward)):
                for name, timing in interleaved(functions, settings.seconds, device).items():
                    at_this_size[name][direction] = timing
            stored.forget()
            done(f"products at D={out_dim:,}, d={in_dim:,}")
        return rows

    def base(self, rows: Sequence[Measurement]) -> Measurement:
        """Return the row of the stored matrix."""
        return next((row for row in rows if row["projection"] == candidates.DENSE), {})

    def table(self, rows: Sequence[Measurement], machine: Mapping[str, Any]) -> Table:
        """Compare with a stored matrix, and with moving the bytes that a product must touch.

        No product can be faster than that: the bytes of P that exist, and both vectors.
        """
        columns = ["projection", "bytes of P"]
        for quantity in self.quantities:
            columns += [quantity.column, "× stored", "× its bytes"]
        lines = []
        for row in rows:
            cells = [f"{row['bytes_of_p']:,}"] if "bytes_of_p" in row else [row["skipped"]]
            for quantity in self.quantities if "forward" in row else ():
                ratio, seconds = self.ratio(row, rows, quantity), number(row[quantity.key])
                bytes_touched = row["bytes_of_p"] + 4 * (row["out_dim"] + row["in_dim"])
                least = bytes_touched / machine["copy_bytes_per_second"]
                cells += [show(row[quantity.key]), "" if ratio is None else show_number(ratio)]
                cells.append("" if seconds is None else show_number(seconds / least))
            lines.append([self.label(row), *cells])
        return Table(columns, lines, words=1)


Products()
