"""A point of a sweep: its runs, by learning rate and seed, and the rate that is the best."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from subspan.files import readable
from subspan.sweeps.job import Job
from subspan.sweeps.result import PointRecord
from subspan.training.config import Run, Training
from subspan.training.methods import method
from subspan.training.records import CompleteRun


@dataclass
class Point:
    """One method at one value of its axis, or a smaller network; and the runs that are done there.

    Records of the latter are kept by learning rate and seed.
    """

    training: Training  # of each run
    method: str  # its name; "full" of a smaller network, all of whose weights are trained
    label: str  # the axis and its value, as in dim100; empty where nothing is varied
    options: dict[str, Any]  # of the method at this value
    lrs: tuple[float, ...]  # the learning rates to choose from
    small: str = ""  # the name of the smaller network; else empty
    done: dict[tuple[float, int], CompleteRun] = field(default_factory=dict)

    def job(self, lr: float, seed: int) -> Job:
        """Return the run with this learning rate and seed."""
        at = f"-{self.label}" if self.label else ""
        net = f"{readable(self.small)}-" if self.small else ""
        name = f"{net}{self.method}{at}-lr{lr:g}-seed{seed}"
        return Job(name, Run(self.training, self.method, self.options, lr, seed))

    def best_lr(self) -> float | None:
        """Choose the learning rate with the best validation score of seed 0, the first of equals.

        None if no run succeeded.
        """
        best = None
        for lr in self.lrs:
            found = self.done.get((lr, 0))
            if found and (
                best is None or found.score.better(found.val_score, self.done[best, 0].val_score)
            ):
                best = lr
        return best

    def record(self) -> PointRecord | None:
        """Make the record of all seeds at the chosen learning rate; None without any."""
        lr = self.best_lr()
        if lr is None:
            return None
        done = sorted(self.done.items())
        label = self.label.removeprefix(method(self.method).axis or "") or self.method
        return PointRecord.from_runs(
            [record for (rate, _), record in done if rate == lr],
            self.small or label,
            small=self.small,
            tried_lrs={f"{rate:g}": record.val_score for (rate, seed), record in done if seed == 0},
        )
