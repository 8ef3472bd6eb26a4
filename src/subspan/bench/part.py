"""A part of the benchmark: its measurement, its table and its panel of the picture, in one file.

A part says in :attr:`Part.quantities` what it compares; tables, the picture and the gallery follow
from that. A file of :mod:`subspan.bench.parts` that makes an instance has added a part, and so has
a module of yours that ``--import`` names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes

from subspan.bench import parts as own_parts
from subspan.bench.bars import COLOURS, GREEN, draw_bars
from subspan.errors import SubspanError
from subspan.registry import Registry, import_files
from subspan.report.bars import show_number
from subspan.report.tables import Table
from subspan.training.own import load_remembered
from subspan.training.schema import MisfitError, from_json

if TYPE_CHECKING:
    from subspan.bench.settings import Bench

Measurement = dict[str, Any]  # JSON values; "skipped" is the reason where nothing was measured

BESIDE = ("format", "status", "config", "machine")  # what a record holds beside its parts

_registry: Registry[Part] = Registry("part")


@dataclass(frozen=True)
class Quantity:
    """A number of each row that is compared with the same number of another row.

    Attributes:
        key: where a row has it: a timing in seconds, or an integer.
        column: heads its column on the terminal.
        words: name it in the gallery and in the picture.
        against: the key of what it is divided by; by default its own.
    """

    key: str
    column: str
    words: str
    against: str = ""

    @property
    def base_key(self) -> str:
        """The key under which the row that is compared with has its number."""
        return self.against or self.key


class Part(ABC):
    """One thing that ``subspan bench`` measures; making an instance registers it.

    A part needs the first five attributes and :meth:`measure`.

    Attributes:
        name: what people type.
        help: one line on what is measured.
        shared: keys whose values all rows of one table have in common.
        quantities: what is compared.
        title: of a panel of the picture, a format string of the first row's keys.
        heading: above a table on the terminal, likewise; the title if it is empty.
        counts: other numbers that a table shows, by key, and what heads their column.
        subject: heads the first column, which names the rows.
        base_name: names the row that others are held against, in the heads of columns.
        unit: labels the axis of the picture.
    """

    name: str
    help: str
    shared: tuple[str, ...]
    quantities: tuple[Quantity, ...]
    title: str
    heading = ""
    counts: Mapping[str, str] = {}
    subject = "projection"
    base_name = "the first"
    unit = "times the first"

    def __init__(self) -> None:
        if self.name in BESIDE:
            raise TypeError(f"a part named {self.name!r} has no place in bench.json: rename it")
        _registry.add(self.name, self)

    @abstractmethod
    def measure(self, settings: Bench, done: Callable[[str], None]) -> list[Measurement]:
        """Measure, and return the rows of the record, which are JSON.

        Args:
            settings: what to measure; ``settings.candidates``, ``settings.torch_device``.
            done: is called :meth:`count` times with a line on what has just been measured.
        """

    def checked(self, rows: Any, machine: Mapping[str, Any]) -> list[Measurement]:
        """Return rows that are JSON, and of which a table can be made.

        Raises:
            SubspanError: for others.
        """
        try:
            found = from_json(list[dict[str, Any]], rows)
            for some in self.groups(found):
                self.make_title(some)
                self.make_heading(some)
                self.table(some, machine)
                list(map(self.full_label, some))
        except SubspanError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            why = str(error) if isinstance(error, MisfitError) else repr(error)
            raise SubspanError(f"no table can be made of the rows of {self.name}: {why}") from error
        return found

    def make_title(self, rows: Sequence[Measurement]) -> str:
        """Make the title of the panel of rows that belong together."""
        return self.title.format(**rows[0])

    def make_heading(self, rows: Sequence[Measurement]) -> str:
        """Make the lines above the table of rows that belong together."""
        return (self.heading or self.title).format(**rows[0])

    def check(self, settings: Bench) -> None:  # noqa: B027 (a part may have nothing to refuse)
        """Refuse settings before anything is measured.

        Raises:
            SubspanError: for settings that this part cannot measure.
        """

    def count(self, settings: Bench) -> int:
        """Return how often :meth:`measure` calls ``done``."""
        return 1

    def label(self, row: Measurement) -> str:
        """Name a row among those of its group."""
        return str(row["projection"])

    def full_label(self, row: Measurement) -> str:
        """Name a row where the rows of all groups stand in one table."""
        return self.label(row)

    def base(self, rows: Sequence[Measurement]) -> Measurement:
        """Return the row that the others are held against."""
        return rows[0]

    def whole(
        self, row: Measurement, rows: Sequence[Measurement], quantity: Quantity
    ) -> float | None:
        """Return what a row's quantity is divided by: that of the base; None where it has none."""
        return number(self.base(rows).get(quantity.base_key))

    def ratio(
        self, row: Measurement, rows: Sequence[Measurement], quantity: Quantity
    ) -> float | None:
        """Return a row's quantity as a multiple; None if one of both was not measured."""
        ours, whole = number(row.get(quantity.key)), self.whole(row, rows, quantity)
        return None if ours is None or whole is None else ours / whole

    def compared(self, rows: Sequence[Measurement]) -> Sequence[Quantity]:
        """Return the quantities of rows that belong together."""
        return self.quantities

    def groups(self, rows: Sequence[Measurement]) -> list[list[Measurement]]:
        """Divide rows into those that belong together."""
        groups: dict[tuple[Any, ...], list[Measurement]] = {}
        for row in rows:
            groups.setdefault(tuple(row[key] for key in self.shared), []).append(row)
        return list(groups.values())

    def table(self, rows: Sequence[Measurement], machine: Mapping[str, Any]) -> Table:
        """Make the table of rows that belong together.

        Args:
            rows: one of :meth:`groups`.
            machine: of the record.
        """
        columns = [self.subject, *self.counts.values()]
        for quantity in self.compared(rows):
            columns += [quantity.column, f"× {self.base_name}"]
        return Table(columns, [[self.label(row), *self._cells(row, rows)] for row in rows], words=1)

    def _cells(self, row: Measurement, rows: Sequence[Measurement]) -> Iterator[str]:
        if "skipped" in row:
            yield row["skipped"]
            return
        for key in self.counts:
            yield f"{row[key]:,}"
        for quantity in self.compared(rows):
            ratio = self.ratio(row, rows, quantity)
            yield show(row[quantity.key]) if quantity.key in row else ""
            yield "" if ratio is None else show_number(ratio)

    def draw(self, axes: Axes, rows: Sequence[Measurement]) -> None:
        """Draw the panel of rows that belong together: bars of ratios, a colour a quantity."""
        quantities = self.compared(rows)
        colours = COLOURS if len(quantities) > 1 else (GREEN,)
        values = {q.key: [self.ratio(row, rows, q) for row in rows] for q in quantities}
        unit = self.unit
        if not any(ratio is not None for ratios in values.values() for ratio in ratios):
            values = {q.key: [milliseconds(row.get(q.key)) for row in rows] for q in quantities}
            unit = "milliseconds"
        bars = [
            (values[quantity.key], colour, quantity.words)
            for quantity, colour in zip(quantities, colours, strict=False)
        ]
        draw_bars(axes, [self.tick(row) for row in rows], bars)
        axes.set_xlabel(unit)
        if len(bars) > 1:
            axes.legend(loc="upper right")

    def tick(self, row: Measurement) -> str:
        """Name a row in the picture, and say if it was skipped."""
        return self.label(row) + (" (skipped)" if "skipped" in row else "")


def number(value: Any) -> float | None:
    """Return the median of a timing, or a plain number; None for nothing."""
    return value["median"] if isinstance(value, dict) else value


def milliseconds(value: Any) -> float | None:
    """Return a timing's median in milliseconds."""
    seconds = number(value)
    return None if seconds is None else 1e3 * seconds


def show(value: Any) -> str:
    """Show a timing as milliseconds, its median ± half its interquartile range; or an integer."""
    if isinstance(value, dict):
        return f"{1e3 * value['median']:.3f} ± {1e3 * (value['high'] - value['low']) / 2:.3f}"
    return f"{value:,}"


def parts() -> dict[str, Part]:
    """Return all parts by name, those of the user's modules, too."""
    load_remembered()
    import_files(own_parts)
    return dict(_registry)


def find_part(name: str) -> Part:
    """Return the part of that name; raise SubspanError with the nearest names if there is none."""
    parts()  # imports them
    return _registry.find(name)


def measured(record: Mapping[str, Any]) -> list[tuple[Part, list[Measurement]]]:
    """Return the parts of a record that have been measured, each with its rows, in their order.

    Raises:
        SubspanError: for a part that no file here and no module of ``--import`` has.
    """
    names = [name for name in record["config"]["parts"] if name in record]
    return [(find_part(name), record[name]) for name in names]
