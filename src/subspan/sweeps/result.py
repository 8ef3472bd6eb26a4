"""The record of a sweep, ``sweep.json``, made from the records of its runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from subspan.errors import SubspanError
from subspan.sweeps.intrinsic import IntrinsicDimension
from subspan.training.records import Record, RunRecord
from subspan.training.schema import OPTIONAL, MisfitError, from_json
from subspan.training.score import ACCURACY, Score


@dataclass(frozen=True, kw_only=True)
class PointRecord:
    """One method at one value of its axis, at the chosen learning rate: its seeds together.

    Scores, times and memory are lists with an entry for each seed, counts are the first seed's.

    Attributes:
        method: its name.
        dim: the numbers that are trained, but for the head's, the mean over seeds; 0 where only
            a head is.
        label: the value of the axis as people give it, or what the point is called.
        lr: the learning rate.
        seeds: which ones.
        small: the name of a smaller network, all of whose weights were trained; else empty.
        test_score: of the best epoch; accuracies are fractions in [0, 1].
        val_score: likewise.
        seconds_total: of each run.
        seconds_per_step: the median over epochs.
        peak_memory_bytes: of each run.
        trainable_parameters: as of a run.
        head_parameters: likewise.
        stored_parameters: likewise.
        weights: likewise.
        checkpoint_bytes: likewise.
        counts: other counts of the same networks by what they are called, means over seeds.
        ranks: of factored layers, seed by seed.
        bytes_sent_per_step: of each run; None where one process ran alone.
        mean_test_score: over seeds.
        tried_lrs: the validation score of the first seed at every learning rate that was tried.
    """

    method: str
    dim: int
    label: str
    lr: float
    seeds: list[int] = field(default_factory=list)
    small: str = field(default="", metadata=OPTIONAL)
    test_score: list[float]
    val_score: list[float] = field(default_factory=list)
    seconds_total: list[float] = field(default_factory=list)
    seconds_per_step: list[float] = field(default_factory=list)
    peak_memory_bytes: list[float] = field(default_factory=list)
    trainable_parameters: int
    head_parameters: int = field(default=0, metadata=OPTIONAL)
    stored_parameters: int
    weights: int
    checkpoint_bytes: int | None
    counts: dict[str, int] = field(default_factory=dict, metadata=OPTIONAL)
    ranks: list[dict[str, int]] = field(default_factory=list, metadata=OPTIONAL)
    bytes_sent_per_step: list[float | None] = field(default_factory=list)
    mean_test_score: float | None = None
    tried_lrs: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("dim", 0 if self.head_parameters else 1), ("weights", 1)):
            if (count := getattr(self, name)) < least:
                raise MisfitError(f"must be positive, got {count}", (name,))

    @property
    def bytes_sent(self) -> list[float]:
        """Bytes that a process sent per step, of the runs that had several."""
        return [sent for sent in self.bytes_sent_per_step if sent is not None]

    @classmethod
    def from_runs(
        cls,
        runs: Sequence[RunRecord],
        label: str,
        *,
        small: str = "",
        tried_lrs: dict[str, float] | None = None,
    ) -> PointRecord:
        """Return the runs of a point, which differ in their seed; what one lacks is left out.

        Args:
            runs: at least one.
            label: what the point is called.
            small: the name of a smaller network than the sweep's.
            tried_lrs: validation scores by learning rate.
        """
        first = runs[0]
        scores = _known(run.test_score for run in runs)
        return cls(
            method=first.config["method"],
            dim=round(
                statistics.fmean(run.trainable_parameters - run.head_parameters for run in runs)
            ),
            label=label,
            lr=first.config["lr"],
            seeds=[run.config["seed"] for run in runs],
            small=small,
            test_score=scores,
            val_score=_known(run.val_score for run in runs),
            seconds_total=[run.seconds_total for run in runs],
            seconds_per_step=_known(run.seconds_per_step for run in runs),
            peak_memory_bytes=_known(run.peak_memory_bytes for run in runs),
            trainable_parameters=first.trainable_parameters,
            head_parameters=first.head_parameters,
            stored_parameters=first.stored_parameters,
            weights=first.weights,
            checkpoint_bytes=first.checkpoint_bytes,
            counts={
                name: round(statistics.fmean(run.counts[name] for run in runs))
                for name in first.counts
            },
            ranks=[run.ranks for run in runs if run.ranks],
            bytes_sent_per_step=[run.bytes_sent_per_step for run in runs],
            mean_test_score=statistics.fmean(scores) if scores else None,
            tried_lrs=tried_lrs or {},
        )


def _known(values: Any) -> list[float]:
    return [value for value in values if value is not None]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published curve: accuracies at numbers of coordinates."""

    label: str  # the source
    dims: tuple[int, ...] = ()  # one for each accuracy; none where only labels are known
    accuracy: tuple[float, ...]  # fractions
    baseline: float | None = None  # what all weights reached there
    d_int: float | None = None  # the intrinsic dimension that was published
    method: str | None = None  # the one method that it is to be compared with; None for all
    labels: tuple[str, ...] = ()  # values of the method's axis, where dims are an outcome

    def __post_init__(self) -> None:
        for name, points, other in (
            ("dims", self.dims, self.labels),
            ("labels", self.labels, self.dims),
        ):
            if len(points) != len(self.accuracy) and (points or not other):
                raise SubspanError(
                    f"{name} has {len(points)} entries and accuracy {len(self.accuracy)}: give "
                    "one for each"
                )
        for accuracy in (*self.accuracy, *([] if self.baseline is None else [self.baseline])):
            if not 0 <= accuracy <= 1:
                raise SubspanError(f"an accuracy is a fraction in [0, 1], got {accuracy}")
        if any(dim < 1 for dim in self.dims):
            raise SubspanError(f"dims must be at least 1, got {min(self.dims)}")
        if self.d_int is not None and not 0 < self.d_int < math.inf:
            raise SubspanError(f"d_int must be a positive number, got {self.d_int}")

    @property
    def points(self) -> list[tuple[int | str, float]]:
        """Each accuracy behind what it is compared by: its label, or its dim without labels."""
        return list(zip(self.labels or self.dims, self.accuracy, strict=True))

    def place(self, row: PointRecord) -> int | str | None:
        """Return which of the points a measured one is compared with; None of another method."""
        if self.method not in (None, row.method):
            return None
        return row.label if self.labels else row.dim


@dataclass(frozen=True)
class Provenance:
    """The published experiment that a sweep repeats."""

    name: str  # what people type
    budget: str  # quick or full
    title: str  # one line
    source: str  # the paper
    differences: str  # what is not as published, and why
    part: str = ""  # of an experiment that has several
    file: str = field(default="", metadata=OPTIONAL)  # of an experiment of the user's own


@dataclass(frozen=True)
class Failure:
    """A run that failed: its name, and why."""

    run: str
    error: str


@dataclass(frozen=True, kw_only=True)
class SweepRecord(Record):
    """The record of a sweep, finished or not: ``sweep.json``.

    Attributes:
        score: what its runs are judged by.
        baseline: what the others are held against, if it succeeded.
        rows: the other points, method by method; those at which no run succeeded are missing.
        d_int: intrinsic dimensions by method, where there is a curve and a baseline.
        failed: the runs that failed.
        versions: of what the result may depend on, in all runs that are complete; where they
            differ, one after the other.
        device: of these runs, in words, likewise.
        experiment: the published one that this is, if it is one.
        published: curves to hold it against.
    """

    FILE = "sweep.json"

    score: Score = ACCURACY
    baseline: PointRecord | None
    rows: list[PointRecord]
    d_int: dict[str, IntrinsicDimension] = field(default_factory=dict)
    failed: list[Failure] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    experiment: Provenance | None = field(default=None, metadata=OPTIONAL)
    published: list[Published] = field(default_factory=list)

    def __post_init__(self) -> None:
        for point in self.points:
            if not point.test_score:
                raise ValueError(f"{point.method} at {point.label} has no test_score")
            for value in (*point.test_score, *point.val_score):
                self.score.checked(value)
        from_json(float, self.threshold, ("config", "threshold"))

    @property
    def points(self) -> list[PointRecord]:
        """The baseline, if there is one, and all rows."""
        return [*([self.baseline] if self.baseline else []), *self.rows]

    def published_for(self, point: PointRecord) -> Iterator[tuple[Published, int | None, float]]:
        """Yield what a point is to be compared with: the source, its d if that is known, its score.

        Args:
            point: one of :attr:`points`.
        """
        for source in self.published:
            if point is not self.baseline:
                dims = source.dims or [None] * len(source.accuracy)
                for (at, accuracy), dim in zip(source.points, dims, strict=True):
                    if at == source.place(point):
                        yield source, dim, accuracy
            elif source.baseline is not None:
                yield source, None, source.baseline

    @property
    def methods(self) -> list[str]:
        """The methods that have a point, in the order of the sweep."""
        return list(dict.fromkeys(row.method for row in self.rows if not row.small))

    @property
    def weights(self) -> int | None:
        """D, the number of weights of the network; None if no run was good."""
        return next((point.weights for point in self.points if not point.small), None)

    @property
    def threshold(self) -> float:
        """The share of the baseline's score at which intrinsic dimensions are read off."""
        known = [found.threshold for found in self.d_int.values()]
        share: float = self.config.get("threshold", (known or [0.9])[0])
        return share
