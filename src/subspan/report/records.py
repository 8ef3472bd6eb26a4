"""What a sweep or a run left on disk: read and checked once, so that showing it cannot fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspan.errors import SubspanError
from subspan.sweeps.intrinsic import IntrinsicDimension
from subspan.training.records import read_json
from subspan.training.score import Score


@dataclass(frozen=True)
class Row:
    """One method at one d (the baseline and a single run, too), with its seeds.

    Scores (accuracies are fractions in [0, 1]) are, like the costs, one per seed; what was not
    recorded is None or an empty tuple, and ``dim`` is 0 where there is no subspace.
    """

    method: str
    dim: int
    label: str
    lr: float | None
    test_score: tuple[float, ...]
    val_score: tuple[float, ...]
    trainable_parameters: int | None
    stored_parameters: int | None
    weights: int | None
    checkpoint_bytes: int | None
    seconds_total: tuple[float, ...]
    seconds_per_step: tuple[float, ...]
    peak_memory_bytes: tuple[float, ...]
    bytes_sent_per_step: tuple[float, ...]
    """By each process on average, a journal included; of one alone nothing is recorded."""
    counts: dict[str, int]
    """Other counts of the same network, by what they are called."""
    ranks: tuple[dict[str, int], ...]
    """Of factored layers, one per seed."""
    small: str
    """The name of a smaller network that was trained by all its weights; else empty."""


@dataclass(frozen=True)
class Published:
    """A curve from the literature: accuracies at dims, in fractions.

    ``baseline`` is what all weights reached there and ``d_int`` the intrinsic dimension, where
    they were published.
    """

    label: str
    dims: tuple[int, ...]
    accuracy: tuple[float, ...]
    baseline: float | None
    d_int: float | None
    method: str | None
    """The one method that it is compared with; None for all."""
    labels: tuple[str, ...]
    """Values of the method's axis by which points are compared, where dims are an outcome."""


@dataclass(frozen=True)
class Epoch:
    """One line of a run's history; what was not recorded is NaN."""

    epoch: int
    train_loss: float
    val_loss: float
    val_score: float
    learning_rate: float
    seconds: float
    alignment: dict[str, tuple[float, float]]
    """Of random bases, by compartment: cosine to the gradient, and share of its norm."""
    ranks: dict[str, int]
    """Of factored layers."""
    singular_values: dict[str, list[float]]
    """Of the same, in descending order."""


@dataclass(frozen=True)
class Sweep:
    """A sweep: its rows by method and d, what they are held against, and what failed."""

    config: dict[str, Any]
    score: Score
    threshold: float
    baseline: Row | None
    rows: tuple[Row, ...]
    d_int: dict[str, IntrinsicDimension]
    published: tuple[Published, ...]
    failed: tuple[tuple[str, str], ...]
    versions: dict[str, Any]
    device: str
    status: str
    experiment: dict[str, str]
    """Name, budget, title, source, differences and part, if it is a published one."""

    @property
    def methods(self) -> list[str]:
        """The methods with a good run, in the order of the sweep."""
        return list(dict.fromkeys(row.method for row in self.rows if not row.small))

    @property
    def weights(self) -> int | None:
        """D, the number of weights of the network; None if no run was good."""
        rows = self.rows if self.baseline is None else (self.baseline, *self.rows)
        return next((row.weights for row in rows if row.weights and not row.small), None)


@dataclass(frozen=True)
class Run:
    """A single run, finished or not: its numbers and its history."""

    config: dict[str, Any]
    score: Score
    row: Row
    history: tuple[Epoch, ...]
    versions: dict[str, Any]
    device: str
    status: str
    error: str | None


def read(folder: Path) -> Sweep | Run:
    """Read ``folder/sweep.json`` or, where there is none, ``folder/record.json``.

    Raises:
        SubspanError: neither is there; or the one found is damaged or of a newer format.
    """
    builders: dict[str, Callable[[Any], Sweep | Run]] = {"sweep.json": _sweep, "record.json": _run}
    for name, build in builders.items():
        path = folder / name
        try:
            raw = read_json(path)
        except OSError as error:
            raise SubspanError(f"{str(path)!r} cannot be read: {error.strerror}") from error
        if raw is None:
            continue
        try:
            return build(raw)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise SubspanError(
                f"{str(path)!r} is damaged ({reason}): run the command that wrote it again"
            ) from error
    raise SubspanError(
        f"expected sweep.json or record.json in {str(folder)!r}, found neither: "
        "give the output folder of a sweep or of a run"
    )


def _sweep(raw: Mapping[str, Any]) -> Sweep:
    config = dict(raw["config"])
    score = Score.of(raw)
    d_int = {
        str(method): IntrinsicDimension(
            value=_number(found["value"]),
            low=_number(found["low"]),
            high=_number(found["high"]),
            target=float(found["target"]),
            threshold=float(found["threshold"]),
            note=str(found["note"]),
        )
        for method, found in (raw.get("d_int") or {}).items()
    }
    thresholds = [found.threshold for found in d_int.values()]
    baseline = raw.get("baseline")
    return Sweep(
        config=config,
        score=score,
        threshold=float(config.get("threshold") or (thresholds[0] if thresholds else 0.9)),
        baseline=_row(baseline, score, dim=0, label=baseline["label"])
        if baseline and baseline["test_score"]
        else None,
        rows=tuple(
            _row(row, score, dim=_dim(row["dim"]), label=row.get("label") or row["dim"])
            for row in raw["rows"]
            if row["test_score"]  # a row of failed runs only has none
        ),
        d_int=d_int,
        published=tuple(_published(curve) for curve in raw.get("published") or []),
        failed=tuple((str(run["run"]), str(run["error"])) for run in raw.get("failed") or []),
        versions=dict(raw.get("versions") or {}),
        device=str(raw.get("device", "")),
        status=str(raw["status"]),
        experiment={str(k): str(v) for k, v in (raw.get("experiment") or {}).items()},
    )


def _run(raw: Mapping[str, Any]) -> Run:
    config = dict(raw["config"])
    per_seed = ("test_score", "val_score")
    costs = ("seconds_total", "seconds_per_step", "peak_memory_bytes", "bytes_sent_per_step")
    once = (*per_seed, *costs, "ranks")
    lists = {key: [raw[key]] if raw.get(key) is not None else [] for key in once}
    dim = config.get("dim")
    score = Score.of(raw)
    return Run(
        config=config,
        score=score,
        row=_row(
            {**raw, **lists, "method": config.get("method", ""), "lr": config.get("lr")},
            score,
            dim=0,
            label="" if dim is None else dim,
        ),
        history=tuple(
            Epoch(
                epoch=int(epoch["epoch"]),
                train_loss=_or_nan(epoch.get("train_loss")),
                val_loss=_or_nan(epoch.get("val_loss")),
                val_score=_or_nan(epoch.get("val_score")),
                learning_rate=_or_nan(epoch.get("learning_rate")),
                seconds=_or_nan(epoch.get("seconds")),
                alignment={
                    str(name): (float(found["cosine"]), float(found["share"]))
                    for name, found in (epoch.get("alignment") or {}).items()
                },
                ranks={str(name): int(r) for name, r in (epoch.get("ranks") or {}).items()},
                singular_values={
                    str(name): [float(s) for s in values]
                    for name, values in (epoch.get("singular_values") or {}).items()
                },
            )
            for epoch in raw.get("history") or []
        ),
        versions=dict(raw.get("versions") or {}),
        device=str(raw.get("device", "")),
        status=str(raw["status"]),
        error=str(raw["error"]) if raw.get("error") else None,
    )


def _row(raw: Mapping[str, Any], score: Score, *, dim: int, label: Any) -> Row:
    return Row(
        method=str(raw["method"]),
        dim=dim,
        label=str(label),
        lr=_number(raw.get("lr")),
        test_score=_scores(raw["test_score"], score),
        val_score=_scores(raw.get("val_score") or [], score),
        trainable_parameters=_count(raw.get("trainable_parameters")),
        stored_parameters=_count(raw.get("stored_parameters")),
        weights=_count(raw.get("weights")),
        checkpoint_bytes=_count(raw.get("checkpoint_bytes")),
        seconds_total=_numbers(raw.get("seconds_total") or []),
        seconds_per_step=_numbers(raw.get("seconds_per_step") or []),
        peak_memory_bytes=_numbers(raw.get("peak_memory_bytes") or []),
        bytes_sent_per_step=_numbers(raw.get("bytes_sent_per_step") or []),
        counts={str(name): int(n) for name, n in (raw.get("counts") or {}).items()},
        ranks=tuple(
            {str(name): int(r) for name, r in seed.items()} for seed in raw.get("ranks") or []
        ),
        small=str(raw.get("small") or ""),
    )


def _published(raw: Mapping[str, Any]) -> Published:
    dims, accuracy = tuple(_dim(d) for d in raw["dims"]), _fractions(raw["accuracy"])
    labels = tuple(str(label) for label in raw.get("labels") or ())
    for name, points, other in (("dims", dims, labels), ("labels", labels, dims)):
        if len(points) != len(accuracy) and (points or not other):
            raise ValueError(f"{len(points)} published {name} but {len(accuracy)} accuracies")
    baseline = raw.get("baseline")
    return Published(
        label=str(raw["label"]),
        dims=dims,
        accuracy=accuracy,
        baseline=None if baseline is None else _fractions([baseline])[0],
        d_int=_number(raw.get("d_int")),
        method=None if raw.get("method") is None else str(raw["method"]),
        labels=labels,
    )


def _scores(values: Iterable[Any], score: Score) -> tuple[float, ...]:
    return tuple(score.checked(float(value)) for value in values)


def _fractions(values: Iterable[Any]) -> tuple[float, ...]:
    fractions = tuple(float(value) for value in values)
    if not all(0 <= value <= 1 for value in fractions):
        raise ValueError(f"accuracies are not all in [0, 1]: {list(fractions)}")
    return fractions


def _dim(value: Any) -> int:
    if int(value) < 1:
        raise ValueError(f"d = {value}")
    return int(value)


def _count(value: Any) -> int | None:
    return None if value is None else int(value)


def _number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _numbers(values: Iterable[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values if value is not None)


def _or_nan(value: Any) -> float:
    return math.nan if value is None else float(value)
