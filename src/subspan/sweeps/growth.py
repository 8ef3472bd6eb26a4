"""The intrinsic dimension from one training a seed, in which d grows stage by stage.

The training is that of :mod:`subspan.training.methods.hash`. A stage ends with a test score, so
that a run is the whole curve of its seed, up to the stage after the one that has reached the
target. The target is a share of what all weights reach, which is trained first: by the validation
part when runs are to end, by the test set when the intrinsic dimension is read off.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from subspan.errors import SubspanError
from subspan.subspace.model import SubspaceModel
from subspan.sweeps.intrinsic import IntrinsicDimension
from subspan.sweeps.job import Job
from subspan.sweeps.plan import RunPlan, dimension_of
from subspan.sweeps.point import Point
from subspan.sweeps.result import PointRecord, SweepRecord
from subspan.training import state
from subspan.training.config import (
    Run,
    Training,
    check_counts,
    check_different,
    check_rates,
    check_threshold,
    listed_fields,
)
from subspan.training.methods import method
from subspan.training.prepare import complete_options, prepare, rehearse
from subspan.training.records import CompleteRun, Epoch
from subspan.training.schema import check_fields, fitting

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
        check_counts(self, "stage_epochs", "seeds")
        check_threshold(self.threshold)
        check_rates("baseline_lrs", self.baseline_lrs)
        check_different("dims", self.dims)
        if len(self.dims) == 1:
            raise SubspanError(
                f"d cannot grow from {self.dims[0]} alone: give several dims, as 25,50,100"
            )

    def as_dict(self) -> dict[str, Any]:
        """Flat, as it stands in ``sweep.json``."""
        named = {"methods": [METHOD], "baseline": BASELINE}
        return self.training.as_dict() | named | listed_fields(self)


class GrowthPlan(RunPlan):
    """The runs of all weights, and then one of growing d for every seed.

    What cannot be run is refused; nothing is written then.
    """

    def __init__(self, config: Growth) -> None:
        how, config = method(METHOD), fitting(Growth, config, "config")
        options = complete_options(config.options, how, config.training)
        if isinstance(options.get("compartments"), Mapping):
            raise SubspanError(
                "compartments with dimensions of their own cannot grow: give them without, as "
                "layer or tensor, and --dims"
            )
        if not config.dims and "compartments" in options:
            raise SubspanError("compartments need dims: give those of all together, as 60,120,240")
        dims = config.dims or _doubled(Run(config.training, METHOD, {"dim": 1} | options, 1.0))
        options |= {"stages": list(dims)}
        rates = how.tried_rates(options)
        self.lr = rates[len(rates) // 2] if config.lr is None else config.lr
        self.config, self.dims = config, dims
        lrs = config.baseline_lrs or method(BASELINE).tried_rates({})
        self.baseline = Point(config.training, BASELINE, "", {}, lrs)
        epochs = config.stage_epochs * len(dims)
        staged = replace(config.training, epochs=epochs, steps=None, patience=None)
        self.grown = Point(staged, METHOD, "growing", options, (self.lr,))
        points, total = [self.baseline, self.grown], len(lrs) + 2 * config.seeds - 1
        super().__init__(config.training, points, total)
        rehearse(self.grown.job(self.lr, 0).run)
        rehearse(self.baseline.job(lrs[0], 0).run)

    def stages(self) -> Iterator[list[Job]]:
        """Yield all weights at all rates, then at the best one; then what is to be compared."""
        baseline, seeds = self.baseline, range(self.config.seeds)
        yield self.jobs((baseline, lr, 0) for lr in baseline.lrs)
        if (lr := baseline.best_lr()) is None:
            return
        if self.config.seeds > 1:
            self.check_samples(baseline)
        yield self.jobs((baseline, lr, seed) for seed in seeds[1:])
        whole = baseline.record()
        assert whole is not None  # one seed has succeeded
        until = self.score.share(statistics.fmean(whole.val_score), self.config.threshold)
        self.grown.options["until"] = until
        yield self.jobs((self.grown, self.lr, seed) for seed in seeds)

    def result(self, status: str) -> SweepRecord:
        """Make a record as that of a sweep: a point at every d, of the seeds that came to it."""
        rows, baseline = self._rows(), self.baseline.record()
        d_int = self._find(rows, baseline)
        config = self.config.as_dict() | {"dims": list(self.dims), "lr": self.lr}
        return self.make_record(status, config, baseline, rows, d_int)

    def _rows(self) -> list[PointRecord]:
        runs = {seed: run for (_, seed), run in sorted(self.grown.done.items())}
        ended = {seed: _ends(run) for seed, run in runs.items()}
        rows = []
        for i, label in enumerate(self.dims):
            here = {seed: ends[i] for seed, ends in ended.items() if i < len(ends)}
            if here:
                rows.append(_point(label, here, runs))
        return rows

    def _find(
        self, rows: Sequence[PointRecord], baseline: PointRecord | None
    ) -> dict[str, IntrinsicDimension]:
        shared = [row for row in rows if len(row.seeds) == len(rows[0].seeds)]
        threshold = self.config.threshold
        found = dimension_of(shared, baseline, threshold, self.score, paired=True)
        if found is None:
            return {}
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
    stages = []
    for seed, end in ends.items():
        run, trained = runs[seed], end.trainable_parameters or 0
        assert end.test_score is not None  # it ended a stage
        begun = max((row.epoch for row in _ends(run) if row.epoch < end.epoch), default=0)
        stage = replace(
            run,
            test_score=end.test_score,
            val_score=end.val_score,
            trainable_parameters=trained,
            stored_parameters=run.stored_parameters - run.trainable_parameters + trained,
            seconds_total=math.fsum(row.seconds for row in run.history[begun : end.epoch]),
        )
        stages.append(stage)
    lr = float(f"{_rate(stages[0], stages[0].trainable_parameters):.3g}")
    found = PointRecord.from_runs(stages, label)
    return replace(found, lr=lr, checkpoint_bytes=None, bytes_sent_per_step=[])


def _rate(run: CompleteRun, trained: int) -> float:
    """Return the rate of a stage with so many numbers trained."""
    first, now = (
        n - run.head_parameters for n in (_ends(run)[0].trainable_parameters or 0, trained)
    )
    rate: float = run.config["lr"]
    return rate * math.sqrt(first / now)
