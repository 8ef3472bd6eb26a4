"""The intrinsic dimension from a training of your own, in which d grows.

:mod:`subspan.sweeps.growth` does this for the trainings of the command line, with baseline, seeds
and pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from subspan.errors import SubspanError
from subspan.subspace.growing import grow, nest
from subspan.subspace.model import SubspaceModel
from subspan.sweeps.intrinsic import IntrinsicDimension, has_shares, intrinsic_dimension
from subspan.training.config import check_threshold
from subspan.training.score import ACCURACY, Score

OF_GROUPS = ("base_lrs", "max_lrs", "min_lrs")  # rates in PyTorch's schedulers, one a group
IN_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")  # what they keep in a group


class GrowingDimension:
    """The curve of a training in which d grows whenever a score has been found.

    Train for a while, evaluate, and call :meth:`record` with the score; it grows the model by
    :func:`subspan.grow`, and says when to end: one d after the one that has reached the target.

    Args:
        model: a SubspaceModel with the projection ``hash``, at the first of the dims.
        dims: numbers of coordinates, each a multiple of the one before.
        baseline: the score of training all weights.
        threshold: the share of the baseline to reach.
        score: what scores are: their direction and zero.

    Raises:
        SubspanError: for dims that are not nested, or of which the first is not the model's; and
            for a baseline that is no score, or no better than zero.
    """

    def __init__(
        self,
        model: nn.Module,
        dims: Sequence[int],
        *,
        baseline: float,
        threshold: float = 0.9,
        score: Score = ACCURACY,
    ) -> None:
        found = SubspaceModel.of(model)
        if found is None:
            raise SubspanError(f"model must be a SubspaceModel, got {type(model).__name__}")
        self.model, self.dims = found, tuple(dims)
        self.baseline, self.threshold, self.score = score.checked(baseline), threshold, score
        if not has_shares([self.baseline], score):
            raise SubspanError(f"baseline must be better than {score.zero:g}, got {self.baseline}")
        check_threshold(threshold)
        projections, names = found.projections, [part.name for part in found.compartments]
        if not self.dims or self.dims[0] != self.dim:
            raise SubspanError(f"dims must begin with the {self.dim} coordinates of the model")
        for d in self.dims[1:]:
            projections = nest(projections, d, names)
        self.scores: dict[int, float] = {}

    @property
    def dim(self) -> int:
        """The coordinates that the model has now."""
        return sum(part.dim for part in self.model.compartments)

    def record(
        self, score: float, optimizer: Optimizer | None = None, scheduler: LRScheduler | None = None
    ) -> bool:
        """Keep the score at this d and go on to the next.

        Args:
            score: of the model as it is.
            optimizer: one that trains the coordinates. Their rate falls with 1/√d.
            scheduler: of the optimizer, which goes on at the lower rate: one of PyTorch, or what
                accelerate has made of it.

        Returns:
            Whether training is to go on; if not, the model has not grown.

        Raises:
            SubspanError: for what is no score, and for a scheduler whose rates cannot be lowered;
                nothing is changed then.
        """
        score = self.score.checked(score)
        parts, falling = _parts(scheduler), self._falling(optimizer)
        if parts and optimizer is None:
            raise SubspanError("a scheduler is lowered with its optimizer: give record() both")
        if not all(falling) and any(getattr(part, "eta_min", 0) for part in parts):
            raise SubspanError(
                "eta_min is one rate for all groups of the optimizer, and that of the coordinates "
                "alone is to fall: use eta_min=0"
            )
        target = self.score.share(self.baseline, self.threshold)
        bracketed = any(not self.score.better(target, s) for s in self.scores.values())
        self.scores[self.dim] = score
        later = [d for d in self.dims if d > self.dim]
        if bracketed or not later:
            return False
        factor = math.sqrt(self.dim / later[0])
        grow(self.model, later[0], optimizer)
        if optimizer is not None:
            _lower(optimizer, parts, [factor if falls else 1.0 for falls in falling])
        return True

    def _falling(self, optimizer: Optimizer | None) -> list[bool]:
        """Return for every group of an optimizer whether it trains coordinates."""
        own = {id(w) for w in self.model.coordinates.values()}
        groups = [] if optimizer is None else optimizer.param_groups
        return [any(id(p) in own for p in group["params"]) for group in groups]

    def found(self) -> IntrinsicDimension:
        """Return where the curve so far reaches the target; of one training, without an interval.

        Raises:
            SubspanError: if nothing was recorded.
        """
        return intrinsic_dimension(
            list(self.scores),
            [[score] for score in self.scores.values()],
            [self.baseline],
            threshold=self.threshold,
            score=self.score,
        )

    def callback(self, metric: str = "eval_accuracy") -> Any:
        """Return a callback for ``Trainer`` of transformers, which records every evaluation.

        One without a step since the one before, as at the start or of a test set at the end, is no
        score of another d, and not recorded.

        Training ends when the curve does. ``lr_scheduler_type="constant"`` lets every d have the
        rate that suits it.

        Args:
            metric: the score among those that an evaluation gives.

        Raises:
            SubspanError: if transformers is not installed.
        """
        try:
            from transformers import TrainerCallback
        except ImportError:
            raise SubspanError(
                "a callback for Trainer needs transformers: pip install transformers"
            ) from None
        growing = self

        class OnEvaluate(TrainerCallback):
            step = 0  # with which the last evaluation came

            def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
                if state.global_step == self.step:
                    return
                self.step, metrics = state.global_step, given["metrics"]
                if metric not in metrics:
                    known = ", ".join(metrics)
                    raise SubspanError(f"evaluations give no {metric!r}, but {known}")
                optimizer, scheduler = given.get("optimizer"), given.get("lr_scheduler")
                if args.world_size > 1:
                    raise SubspanError("d cannot grow inside of DDP: train in one process")
                if not growing.record(metrics[metric], optimizer, scheduler):
                    control.should_training_stop = True

        return OnEvaluate()


def _parts(scheduler: Any) -> list[Any]:
    """Return a scheduler, without what accelerate puts around it, and those inside of it.

    One that computes rates by code that is not PyTorch's is refused.
    """
    if scheduler is None:
        return []
    if not isinstance(scheduler, LRScheduler) and hasattr(scheduler, "scheduler"):
        return _parts(scheduler.scheduler)
    code = [getattr(type(scheduler), name, None) for name in ("get_lr", "step")]
    if not all(str(getattr(f, "__module__", "")).startswith("torch.optim.") for f in code):
        raise SubspanError(
            f"what {type(scheduler).__name__} computes rates from is not known, so that they "
            "cannot be lowered: use one of torch.optim, or give none, and lower its rates yourself"
        )
    inner = getattr(scheduler, "_schedulers", ())
    return [scheduler, *(part for one in inner for part in _parts(one))]


def _lower(optimizer: Optimizer, parts: list[Any], factors: list[float]) -> None:
    """Multiply every rate that an optimizer has, and that its schedulers compute others from."""
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        for name in set(IN_GROUPS) & group.keys():
            group[name] *= factor
    for part in parts:
        for name in set(OF_GROUPS) & vars(part).keys():
            rates = zip(getattr(part, name), factors, strict=True)
            setattr(part, name, [lr * factor for lr, factor in rates])
        if getattr(part, "eta_min", 0):
            part.eta_min *= min(factors)
