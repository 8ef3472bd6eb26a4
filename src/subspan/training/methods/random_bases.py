"""Re-drawn and fixed random bases (Gressmann 2020): RBD, FPD, and the evolution strategy (NES)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from subspan import distributed
from subspan.errors import SubspanError
from subspan.optim import RandomBases
from subspan.optim.journal import Journal
from subspan.training.config import Run
from subspan.training.methods import Method, Option
from subspan.training.methods.subspace import COMMON, parse_dims

JOURNAL = "journal.subspan"  # beside the record
SHARED = tuple(option for option in COMMON if option.name in ("compartments", "allocation"))
DIM = Option("dim", int | str, "d, coordinates of a step; or 150+100: those of each compartment")
OPTIONS = (
    DIM,
    *SHARED,
    Option("distribution", str, "the family of the bases: hash (default), rademacher, gaussian, …"),
    Option("momentum", float, "the momentum of coordinates; it begins anew with each basis"),
    Option(
        "nonfinite",
        str,
        "skip a step with a coordinate that is not finite, or end in an error: skip, error",
    ),
    Option(
        "workers", str, "several processes share a basis, or each has its own: shared, independent"
    ),
    Option("check_every", int, "compare the weights of all processes every so many steps"),
    Option("journal", bool, f"write every step to {JOURNAL}, and go on from it"),
)
REDRAW = Option("redraw_every", int, "draw a new basis every so many steps (1)")
SIGMA = Option("sigma", float, "the step in weight space to each of the two evaluations")


class Bases(Method):
    """Training by :class:`subspan.optim.RandomBases`."""

    axis = "dim"
    averages_gradients = False

    def __init__(self, name: str, help: str, *options: Option, **preset: Any) -> None:  # noqa: A002
        super().__init__(name, help)
        self.options, self.preset = OPTIONS + options, preset
        self.evaluates = preset.get("estimator", "gradient") != "gradient"

    def wrap(self, net: nn.Module, seed: int, options: Mapping[str, Any]) -> nn.Module:
        """Return the network as it is: only its training is special."""
        optimizer = self._make(net, seed, 1.0, 0.0, options)  # refuses what does not fit
        net.coordinates_of_a_step = len(optimizer.coordinates)  # type: ignore[assignment]
        return net

    def counts(self, model: nn.Module) -> dict[str, int]:
        """Count d trainable numbers; all weights move, and all are stored."""
        d = int(model.coordinates_of_a_step)  # type: ignore[arg-type]
        return super().counts(model) | {"trainable_parameters": d}

    def rates(self, options: Mapping[str, Any]) -> tuple[float, ...]:
        """Return rates of plain gradient descent along unit columns; they do not depend on d."""
        return (0.5, 1.0, 2.0)

    def optimizer(
        self, model: nn.Module, run: Run, out: Path, extra: Mapping[str, Any], **more: Any
    ) -> Optimizer:
        """Make `RandomBases`; --optimizer is for methods that have a choice."""
        many = distributed.world() > 1
        own: dict[str, Any] = {}
        if many:
            own["workers"] = run.options.get("workers", "shared")
        if run.options.get("journal"):
            first = not many or dist.get_rank() == 0
            if first:
                out.mkdir(parents=True, exist_ok=True)
                if more["resume"] is None:
                    (out / JOURNAL).unlink(missing_ok=True)
                else:
                    # Steps of its own: of fp16's, those with too large gradients are left out.
                    done = more["resume"]["param_groups"][0]["steps"]
                    Journal(out / JOURNAL).cut(before=done)
            if many:
                dist.barrier()
            own |= {"journal": out / JOURNAL, "extra": extra}
        return self._make(model, run.seed, run.lr, run.training.weight_decay, run.options, **own)

    def step(
        self, optimizer: Optimizer, loss: Callable[[], Tensor], backward: Callable[[Tensor], None]
    ) -> Tensor:
        """Make a step by backpropagation, or by evaluations alone."""
        if not self.evaluates:
            return super().step(optimizer, loss, backward)
        seen: list[Tensor] = []

        def evaluation() -> Tensor:
            seen.append(loss())
            return seen[-1]

        optimizer.step(evaluation)  # type: ignore[arg-type]
        return torch.stack(seen).mean()

    def needs_processes(self, options: Mapping[str, Any]) -> bool:
        """Return True for independent workers, which each have a basis of their own."""
        return options.get("workers") == "independent"

    def diagnose(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Measure how much of the last batch's gradient the next basis catches, by compartment."""
        assert isinstance(optimizer, RandomBases)
        return {} if optimizer.needs_closure else {"alignment": optimizer.alignment()}

    def _make(
        self,
        net: nn.Module,
        seed: int,
        lr: float,
        weight_decay: float,
        options: Mapping[str, Any],
        **own: Any,
    ) -> RandomBases:
        dims = parse_dims(self.name, options)
        apart = ("dim", "workers", "journal")
        given = {name: value for name, value in options.items() if name not in apart}
        if options.get("workers", "shared") not in ("shared", "independent"):
            raise SubspanError(f"workers must be shared or independent, got {options['workers']!r}")
        return RandomBases(
            net, dims, lr, seed=seed, weight_decay=weight_decay, **self.preset, **given, **own
        )


Bases("rbd", "random bases, drawn anew at every step (Gressmann 2020)", REDRAW)
Bases("fpd", "one random basis for ever (Li 2018, as Gressmann 2020 has it)", redraw_every=None)
Bases(
    "nes",
    "random bases, and evaluations in place of gradients (NES; with --dim 1 MeZO)",
    REDRAW,
    SIGMA,
    estimator="evolution",
)
