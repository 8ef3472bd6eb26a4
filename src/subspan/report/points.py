"""The points of accuracy against size, of all sweeps and runs in some folders; their frontier."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from subspan.errors import SubspanError, unknown
from subspan.report.curves import point_of
from subspan.sweeps.result import PointRecord, SweepRecord
from subspan.training.records import RunRecord
from subspan.training.score import ACCURACY

SIZES = ("numbers", "bytes")


@dataclass(frozen=True)
class MeasuredPoint:
    """One method with one network at one setting, its seeds together."""

    folder: Path  # of the record
    net: str  # the network that was trained
    method: str  # by which
    label: str  # the setting of the method, as 1000 or 0.15; empty where it has none
    scores: tuple[float, ...]  # test accuracies in %, one for each seed
    val: float | None  # the mean accuracy of the validation part in %; None if it was not kept
    numbers: int  # all that inference needs beyond seeds; of the first seed, as in the record
    # Of the first seed's checkpoint, the compact one where there is one; None if none was written.
    bytes: int | None

    @property
    def mean(self) -> float:
        """The mean accuracy over seeds in %."""
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float:
        """The standard deviation over seeds in %; 0 of one seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0

    def size(self, kind: str) -> int | None:
        """Return the "numbers" or the "bytes"."""
        return self.numbers if kind == "numbers" else self.bytes


def measured_points(folders: Sequence[Path], data: Sequence[str]) -> dict[str, list[MeasuredPoint]]:
    """Find every complete sweep and run in folders, at any depth, of sets of images by name.

    Seeds of a sweep are one point. So are runs beside each other that differ only in their seed;
    the runs of a sweep count with it, at the learning rate that it chose. The points of each set
    are in the order of their numbers.

    Raises:
        SubspanError: for a folder that is none or has no such record, data without a record, and a
            damaged record.
    """
    found = defaultdict[str, dict[MeasuredPoint, None]](dict)  # in order, and none twice
    for folder in folders:
        if not folder.is_dir():
            raise SubspanError(f"{folder} is no folder: give one with records of sweeps or runs")
        own = list(_points_in(folder))
        for name, point in own:
            found[name][point] = None  # folders may lie in each other
        if not own:
            raise SubspanError(
                f"no complete sweep or run on images is in {folder}: give a folder with the "
                "sweep.json or record.json of some"
            )
    for name in data:
        if name not in found:
            raise unknown("data in these records", name, found)
    return {
        name: sorted(found[name], key=lambda p: (p.numbers, -p.mean, p.folder, p.label))
        for name in data
    }


def _points_in(folder: Path) -> Iterator[tuple[str, MeasuredPoint]]:
    """Yield the name of the data, and the point."""
    inside = set[Path]()  # of sweeps, whose runs are in their rows
    for place in sorted(path.parent for path in folder.rglob(SweepRecord.FILE)):
        inside.add(place)
        sweep = SweepRecord.read(place)
        if sweep is not None and _counts(sweep):
            for row in sweep.points:
                net = row.small or str(sweep.config["net"])
                yield str(sweep.config["data"]), _point(place, net, row)
    alike = defaultdict[tuple[Path, str], dict[int, tuple[Path, RunRecord]]](dict)
    for place in sorted(path.parent for path in folder.rglob(RunRecord.FILE)):
        if inside.isdisjoint(place.parents):
            run = RunRecord.read(place)
            if run is not None and _counts(run):
                given = {k: v for k, v in run.config.items() if v is not None}  # or missing
                seed: int = given.pop("seed")
                config = json.dumps(given, sort_keys=True)
                alike[place.parent, config].setdefault(seed, (place, run))  # a copy is no more
    for members in alike.values():
        runs = [run for _, run in members.values()]
        place, first = next(iter(members.values()))
        row = PointRecord.from_runs(runs, point_of(first).label)
        yield str(first.config["data"]), _point(place, str(first.config["net"]), row)


def _counts(record: SweepRecord | RunRecord) -> bool:
    """Return whether a record is complete, and tells the accuracy on a set of images."""
    config = record.config
    on_images = config.get("task") is None and bool(config.get("data"))
    return record.status == "complete" and record.score == ACCURACY and on_images


def _point(folder: Path, net: str, row: PointRecord) -> MeasuredPoint:
    return MeasuredPoint(
        folder=folder.resolve(),
        net=net,
        method=row.method,
        label="" if row.small or row.label in (row.method, "all weights") else row.label,
        scores=tuple(100 * score for score in row.test_score),
        val=100 * statistics.fmean(row.val_score) if row.val_score else None,
        numbers=row.stored_parameters,
        bytes=row.checkpoint_bytes,
    )


def frontier(points: Sequence[MeasuredPoint], size: str) -> list[MeasuredPoint]:
    """Return the points that no smaller one of them reaches, the smallest first.

    The size is "numbers" or "bytes", and all points are of one set of data. Each is better than all
    smaller ones both in validation and on the test set: none is there because the test set alone
    has favoured it. A point of one seed is left out.
    """
    found = list[MeasuredPoint]()
    several = [p for p in points if p.size(size) is not None and len(p.scores) > 1]
    for point in sorted(several, key=lambda p: (p.size(size), -p.mean)):
        last = found[-1] if found else None
        if point.val is not None and (
            last is None or (point.val > (last.val or 0) and point.mean > last.mean)
        ):
            found.append(point)
    return found
