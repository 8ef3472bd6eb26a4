"""Fixed random subspaces of ``hash``, which are nested: d may grow during a training.

With ``--stages 25,50,100`` one training passes through all these d, and each stage begins at the
weights with which the one before ended (:mod:`subspan.subspace.growing`). The test score at the end
of every stage is a point of the curve that gives the intrinsic dimension.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from subspan.errors import SubspanError
from subspan.families.hash import Hash
from subspan.subspace.growing import grow, nest
from subspan.subspace.model import SubspaceModel
from subspan.training.config import Run, split
from subspan.training.methods import Option
from subspan.training.methods.subspace import Subspace, parse_dims
from subspan.training.records import Epoch
from subspan.training.score import Score

STAGES = Option(
    "stages",
    list[int | str] | str,
    "in place of --dim: begin with the first number of coordinates, as 25,50,100, each a multiple "
    "of the one before, and go on from the same weights with the next one; each has as many epochs "
    "as the others, and a schedule of its own",
)
UNTIL = Option(
    "until", float, "the validation score at the end of a stage that makes the next stage the last"
)


class GrowingSubspace(Subspace):
    """The subspace of ``hash``, of one d or of several, one after the other."""

    def __init__(self) -> None:
        super().__init__(Hash)
        self.options = (*self.options, STAGES, UNTIL)

    def wrap(self, net: nn.Module, seed: int, options: Mapping[str, Any]) -> SubspaceModel:
        """Put the network into the subspace, that of the first stage."""
        first, *later = _stages(options)
        own = {name: value for name, value in options.items() if name not in ("stages", "until")}
        model = super().wrap(net, seed, own | first)
        projections = model.projections
        for stage in later:  # what cannot be is said before the first one is trained
            dims = parse_dims(self.name, stage)
            assert dims is not None
            projections = nest(projections, dims, [part.name for part in model.compartments])
        return model

    def optimizer(self, model: nn.Module, run: Run, *rest: Any, **more: Any) -> Optimizer:
        """Make an ordinary optimizer; each stage must get an epoch."""
        count = len(_stages(run.options))
        if run.training.epochs < count:
            raise SubspanError(
                f"{count} stages need {count} epochs at least, got {run.training.epochs}"
            )
        if count > 1 and self.bits(run.options) is not None:
            raise SubspanError(
                "--stages make new coordinates, which are not rounded: leave --bits out"
            )
        if count > 1 and run.training.patience is not None:
            raise SubspanError("--stages share the epochs equally: leave --patience out")
        return super().optimizer(model, run, *rest, **more)

    def stages(self, run: Run) -> tuple[int, ...]:
        """Return the last epochs of all stages."""
        count = len(_stages(run.options))
        return tuple(run.training.epochs * (i + 1) // count for i in range(count))

    def after_epoch(
        self, model: nn.Module, optimizer: Optimizer, run: Run, history: list[Epoch]
    ) -> nn.Module | None:
        """Grow at the end of a stage; the rate falls so that θ's steps keep their length."""
        ends = self.stages(run)
        if len(history) not in ends:
            return None
        assert isinstance(model, SubspaceModel)
        first, *_ = stages = _stages(run.options)
        stage = stages[ends.index(len(history)) + 1]
        dims = parse_dims(self.name, stage)
        assert dims is not None
        grow(model, dims, optimizer)
        own = {id(w) for w in model.coordinates.values()}
        for group in optimizer.param_groups:
            if any(id(p) in own for p in group["params"]):
                group["rate_factor"] = math.sqrt(_total(first) / _total(stage))
        return model

    def ready(self, model: nn.Module, optimizer: Optimizer, run: Run, last: bool) -> bool:
        """Return whether a run of several stages ends: what it leaves is its largest d."""
        return super().ready(model, optimizer, run, last) and (last or "stages" not in run.options)

    def finished(self, run: Run, history: list[Epoch], score: Score) -> bool:
        """Return whether all stages have ended, or the one after that which reached ``until``."""
        ends, until = self.stages(run), run.options.get("until")
        if until is None or len(history) == ends[-1]:
            return len(history) == ends[-1]
        for end, following in itertools.pairwise(ends):
            if end <= len(history) and not score.better(until, history[end - 1].val_score):
                return len(history) >= following
        return False

    def rates(self, options: Mapping[str, Any]) -> tuple[float, ...]:
        """Return the rates of the first stage."""
        return super().rates({**options, **_stages(options)[0]})


def _stages(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the options that say d of every stage; none where compartments say it themselves."""
    if "stages" not in options:
        if "until" in options:
            raise SubspanError("--until ends a training in stages: give --stages, too")
        return [{"dim": options["dim"]}] if "dim" in options else [{}]
    if "dim" in options:
        raise SubspanError("give --dim, or --stages, which begin with it, not both")
    if isinstance(options.get("compartments"), Mapping):
        raise SubspanError("compartments with dimensions of their own say d: leave --stages out")
    return [{"dim": stage} for stage in split(options["stages"], "stages")]


def _total(stage: Mapping[str, Any]) -> int:
    dims = parse_dims("hash", stage)
    return dims if isinstance(dims, int) else sum(dims or ())


GrowingSubspace()
