"""The intrinsic dimension from one training a seed, in which d grows stage by stage.

The training is that of :mod:`subspan.training.methods.hash`. A stage ends with a test score, so
that a run is the whole curve of its seed, up to the stage after the one that has reached the
target. The target is a share of what all weights reach, which is trained first: by the validation
part when runs are to end, by the test set when the intrinsic dimension is read off.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from subspan.errors import SubspanError
from subspan.subspace.model import SubspaceModel
from subspan.sweeps.intrinsic import IntrinsicDimension, has_shares, intrinsic_dimension
from subspan.sweeps.job import Job
from subspan.sweeps.plan import RunPlan
from subspan.sweeps.point import Point
from subspan.sweeps.result import PointRecord, SweepRecord
from subspan.training import state
from subspan.training.config import Run, Training, check_different, check_rates
from subspan.training.methods import method
from subspan.training.prepare import complete_options, prepare, rehearse
from subspan.training.records import CompleteRun, Epoch
from subspan.training.schema import check_fields

METHOD, BASELINE, FIRST = "hash", "full", 25


@dataclass(frozen=True)
class Growth:
    """One training a seed, in which d grows.

    Args:
        training: of all weights; and of the stages, but for its epochs, steps and patience.
        dims: the numbers of coordinates, one after the other, as 25,50,100; each is a multiple of
            the one before. Where there are none they are 25, 50, 100, … up to all weights.
        stage_epochs: passes over the training part at each d. More bring the curve nearer to that
            of separate trainings.
        seeds: how many seeds to run, 0, 1, …
        lr: the learning rate at the first d, of which √(first d / d) is taken at the others; null
            is 3/√d, and 2/√d for fine-tuning. Twice that or half of it may be much better.
        baseline_lrs: learning rates to choose from for the training of all weights, by the
            validation score of seed 0; where there are none, 0.0003, 0.001 and 0.003.
        threshold: the share of the score of all weights at which the intrinsic dimension is read
            off. A run ends one stage after its validation score has reached it.
        options: those of the method hash.
    """

    training: Training
    dims: tuple[str, ...] = ()
    stage_epochs: int = 4
    seeds: int = 1
    lr: float | None = None
    baseline_lrs: tuple[float, ...] = ()
    threshold: float = 0.9
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("stage_epochs", "seeds"):
            if getattr(self, name) < 1:
                raise SubspanError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.threshold <= 1:
            raise SubspanError(f"threshold must be in (0, 1], got {self.threshold}")
        check_rates("baseline_lrs", self.baseline_lrs)
        check_different("dims", self.dims)
        if len(self.dims) == 1:
            raise SubspanError(
                f"d cannot grow from {self.dims[0]} alone: give several dims, as 25,50,100"
            )

    def as_dict(self) -> dict[str, Any]:
        """Flat, as it stands in ``sweep.json``."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "training"}
        lists = {name: list(value) for name, value in own.items() if isinstance(value, tuple)}
        named = {"methods": [METHOD], "baseline": BASELINE}
        return self.training.as_dict() | named | own | lists


class GrowthPlan(RunPlan):
    """The runs of all weights, and then one of growing d for every seed.

    Args:
        config: what to run.

    Raises:
        SubspanError: for what cannot be run; nothing is written then.
    """

    def __init__(self, config: Growth) -> None:
        how = method(METHOD)
        options = complete_options(config.options, how, config.training)
        if isinstance(options.get("compartments"), Mapping):
            raise SubspanError(
                "compartments with dimensions of their own cannot grow: give them without, as "
                "layer or tensor, and --dims"
            )
        if not config.dims and "compartments" in options:
            raise SubspanError("compartments need dims: give those of all together, as 60,120,240")
        dims = config.dims or _doubled(_run(config, {"dim": 1} | options, 1.0, 0, 1))
        self.options = options | {"stages": list(dims)}
        rates = how.tried_rates(self.options)
        self.lr = rates[len(rates) // 2] if config.lr is None else config.lr
        self.config, self.training, self.dims = config, config.training, dims
        lrs = config.baseline_lrs or method(BASELINE).tried_rates({})
        self.baseline = Point(config.training, BASELINE, "", {}, lrs)
        self.total = len(lrs) + 2 * config.seeds - 1
        self.grown: dict[int, CompleteRun] = {}
        self.failed = {}
        rehearse(self._job(0, None).run)
        rehearse(self.baseline.job(lrs[0], 0).run)

    def stages(self) -> Iterator[list[Job]]:
        """Yield all weights at all rates, then at the best one; then what is to be compared."""
        yield [self.baseline.job(lr, 0) for lr in self.baseline.lrs]
        if (lr := self.baseline.best_lr()) is None:
            return
        if self.config.seeds > 1:
            self.check_samples(self.baseline)
        yield [self.baseline.job(lr, seed) for seed in range(1, self.config.seeds)]
        whole = self.baseline.record()
        assert whole is not None  # one seed has succeeded
        until = self.score.share(statistics.fmean(whole.val_score), self.config.threshold)
        yield [self._job(seed, until) for seed in range(self.config.seeds)]

    def keep(self, job: Job, record: CompleteRun) -> None:
        """Keep a run's record."""
        if job.run.method == METHOD:
            self.grown[job.run.seed] = record
        else:
            self.baseline.keep(job.run, record)

    def records(self) -> Iterator[CompleteRun]:
        """Yield the records of all runs that are complete."""
        return itertools.chain(self.baseline.done.values(), self.grown.values())

    def result(self, status: str) -> SweepRecord:
        """Make a record as that of a sweep: a point at every d, of the seeds that came to it."""
        rows, baseline = self._rows(), self.baseline.record()
        d_int = self._find(rows, baseline) if rows and baseline else {}
        config = self.config.as_dict() | {"dims": list(self.dims), "lr": self.lr}
        return self.make_record(status, config, baseline, rows, d_int)

    def _job(self, seed: int, until: float | None) -> Job:
        options = self.options | ({} if until is None else {"until": until})
        run = _run(self.config, options, self.lr, seed, len(self.dims))
        return Job(f"{METHOD}-growing-lr{self.lr:g}-seed{seed}", run)

    def _rows(self) -> list[PointRecord]:
        ended = {seed: _ends(run) for seed, run in sorted(self.grown.items())}
        rows = []
        for i, label in enumerate(self.dims):
            here = {seed: ends[i] for seed, ends in ended.items() if i < len(ends)}
            if here:
                rows.append(_point(label, here, self.grown))
        return rows

    def _find(
        self, rows: Sequence[PointRecord], baseline: PointRecord
    ) -> dict[str, IntrinsicDimension]:
        seeds = len(rows[0].seeds)
        shared = [row for row in rows if len(row.seeds) == seeds]
        if not has_shares(baseline.test_score, self.score):
            return {}
        found = intrinsic_dimension(
            [row.dim for row in shared],
            [row.test_score for row in shared],
            baseline.test_score,
            threshold=self.config.threshold,
            score=self.score,
            paired=True,
        )
        notes = [
            found.note,
            f"one run a seed, d growing with {self.config.stage_epochs} epochs each",
        ]
        ended = [str(seed) for seed in rows[0].seeds if seed not in rows[-1].seeds]
        if found.value is None and ended:
            why = (
                "beyond that d there is no mean of all seeds, for the runs of seeds "
                f"{', '.join(ended)} had reached the target in validation, and ended: "
                "subspan sweep has every seed at every d"
            )
            notes.insert(1, why)
        return {METHOD: replace(found, note="; ".join(filter(None, notes)))}


def _run(config: Growth, options: dict[str, Any], lr: float, seed: int, stages: int) -> Run:
    epochs = config.stage_epochs * stages
    training = replace(config.training, epochs=epochs, steps=None, patience=None)
    return Run(training, METHOD, options, lr, seed)


@state.aside()
def _doubled(run: Run) -> tuple[str, ...]:
    """Return 25, 50, 100, … up to the weights that a run trains."""
    model = prepare(run).model
    assert isinstance(model, SubspaceModel)
    most = sum(part.weights for part in model.compartments)
    count = int(math.log2(max(most / FIRST, 0.5))) + 1
    if count < 2:
        raise SubspanError(f"there are only {most} weights to train: give dims, as 2,4,8")
    return tuple(str(FIRST << i) for i in range(count))


def _ends(run: CompleteRun) -> list[Epoch]:
    """Return the rows of a run that end a stage."""
    return [row for row in run.history if row.test_score is not None]


def _point(label: str, ends: dict[int, Epoch], runs: dict[int, CompleteRun]) -> PointRecord:
    """Make the record of one d from the epochs that ended its stage, by seed."""
    first = runs[next(iter(ends))]
    end = next(iter(ends.values()))
    scores = [row.test_score for row in ends.values() if row.test_score is not None]
    trained = end.trainable_parameters or 0
    begun = max((row.epoch for row in _ends(first) if row.epoch < end.epoch), default=0)
    return PointRecord(
        method=METHOD,
        dim=trained - first.head_parameters,
        label=label,
        lr=float(f"{_rate(first, trained):.3g}"),
        seeds=list(ends),
        test_score=scores,
        val_score=[row.val_score for row in ends.values()],
        seconds_total=[
            math.fsum(row.seconds for row in runs[seed].history[begun : end.epoch]) for seed in ends
        ],
        seconds_per_step=[runs[seed].seconds_per_step for seed in ends],
        peak_memory_bytes=[runs[seed].peak_memory_bytes for seed in ends],
        trainable_parameters=trained,
        head_parameters=first.head_parameters,
        stored_parameters=first.stored_parameters - first.trainable_parameters + trained,
        weights=first.weights,
        checkpoint_bytes=None,
        mean_test_score=statistics.fmean(scores),
    )


def _rate(run: CompleteRun, trained: int) -> float:
    """Return the rate of a stage with so many numbers trained."""
    first, now = (
        n - run.head_parameters for n in (_ends(run)[0].trainable_parameters or 0, trained)
    )
    rate: float = run.config["lr"]
    return rate * math.sqrt(first / now)
