"""Dynamical low-rank training (DLRT, Schotthöfer 2022): factored layers whose ranks adapt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from subspan import distributed
from subspan.counts import count
from subspan.errors import SubspanError
from subspan.layers import LowRank, factorize
from subspan.optim import DLRT
from subspan.training.config import Run
from subspan.training.methods import Method, Option
from subspan.training.methods.subspace import PATTERNS

OPTIONS = (
    Option("tolerance", float, "τ in [0, 1): the share of ‖W‖ that truncation may leave out"),
    Option("target_ratio", float, "in place of τ: the share of the layers' numbers to get rid of"),
    Option(
        "rank",
        int | str,
        "the rank of factored layers at first, at most their largest; full is that",
    ),
    Option("min_rank", int, "the least rank (1)"),
    Option("max_rank", int, "the greatest rank"),
    Option("rank_every", int, "ranks may change at every so many steps (1)"),
    Option("adapt_at", float, "the share of the training before ranks may change (0)"),
    Option(
        "freeze_at", float, "the share of the training after which ranks stay (target_ratio: 0.5)"
    ),
    Option("tolerance_warmup", float, "the share of the training over which τ rises from 0 (0.3)"),
    Option("integrator", str, "parallel, kls, kls-adaptive or vanilla"),
    Option("targets", PATTERNS, "layers to factor (all but the last), as fc1 or [fc1,fc2]"),
    Option("exclude", PATTERNS, "layers that stay dense"),
)


class LowRankTraining(Method):
    """Training by :class:`subspan.optim.DLRT`; --optimizer is its base."""

    adapts = True
    averages_gradients = False
    evaluates = True
    options = OPTIONS

    def __init__(self, name: str, help: str, axis: str) -> None:  # noqa: A002
        super().__init__(name, help)
        self.axis = axis

    def wrap(self, net: nn.Module, seed: int, options: Mapping[str, Any]) -> nn.Module:
        """Factor its layers by SVD of their initial weights."""
        rank = options.get("rank")
        if rank not in (None, "full") and not (isinstance(rank, int) and rank >= 1):
            raise SubspanError(f"rank must be at least 1, or full, got {rank!r}")
        exclude = options.get("exclude")
        if exclude is None and "targets" not in options:
            exclude = _last(net)
        # By default as many numbers as the layer has: n m / (n + m).
        full = rank == "full"
        net = factorize(
            net, ratio=None if full else 1.0, energy=1.0 if full else None,
            targets=options.get("targets"), exclude=exclude,
        )  # fmt: skip
        if isinstance(rank, int):
            for layer in _factored(net).values():
                r = min(rank, layer.rank)
                layer.set_factors(layer.U[:, :r], layer.S[:r, :r], layer.V[:, :r])
        self._make(net, 1.0, 2, "sgd", 0.0, options)  # refuses what does not fit
        return net

    def at(self, value: str) -> dict[str, Any]:
        """Return the options of a point of a sweep: a number, and none of coordinates."""
        assert self.axis is not None
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            raise SubspanError(
                f"of {self.name} dims lists values of {self.axis}, which are in [0, 1), as in "
                f"--dims 0.05,0.1,0.2; got {value!r}"
            )
        return {self.axis: share}

    def rates(self, options: Mapping[str, Any]) -> tuple[float, ...]:
        """Return rates a little above Adam's usual 1e-3: few numbers share the core's steps."""
        return (1e-3, 2e-3, 4e-3)

    def optimizer(
        self, model: nn.Module, run: Run, *rest: Any, steps: int, **more: Any
    ) -> Optimizer:
        """Make DLRT around the base."""
        training = run.training
        return self._make(
            model, run.lr, steps, training.optimizer, training.weight_decay, run.options,
            workers="shared" if distributed.world() > 1 else None,
        )  # fmt: skip

    def step(
        self, optimizer: Optimizer, loss: Callable[[], Tensor], backward: Callable[[Tensor], None]
    ) -> Tensor:
        """Make a step with a closure: two of the integrators evaluate the gradient twice."""
        seen: list[Tensor] = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            backward(value)
            seen.append(value)
            return value

        optimizer.step(closure)  # type: ignore[arg-type]
        return seen[0]

    def ready(self, model: nn.Module, optimizer: Optimizer, run: Run, last: bool) -> bool:
        """Return whether the target is reached: larger early networks do not count as best."""
        assert isinstance(optimizer, DLRT)
        rule = optimizer.rule
        small_by = rule.freeze_after if rule.target_ratio else rule.tolerance_warmup
        return optimizer.steps >= (small_by or 0)

    def diagnose(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Return ranks and singular values of every factored layer."""
        assert isinstance(optimizer, DLRT)
        return {
            "ranks": optimizer.ranks,
            "singular_values": {
                name: [
                    float(f"{s:.4g}") for s in torch.linalg.svdvals(core.detach().float()).tolist()
                ]
                for name, core in optimizer.cores.items()
            },
        }

    def counts(self, model: nn.Module) -> dict[str, Any]:
        """Count the numbers, and as the paper counts them."""
        found = count(model)
        return super().counts(model) | {
            "ranks": {name: layer.rank for name, layer in _factored(model).items()},
            "counts": {"to run it": found.inference, **found.published},
        }

    def _make(
        self, net: nn.Module, lr: float, steps: int, base: str, weight_decay: float,
        options: Mapping[str, Any], workers: Any = None,
    ) -> DLRT:  # fmt: skip
        given = {k: v for k, v in options.items() if k not in ("rank", "targets", "exclude")}
        for name, own, usual in (
            ("adapt_at", "adapt_from", 0.0),
            ("freeze_at", "freeze_after", 0.5 if "target_ratio" in given else None),
            ("tolerance_warmup", "tolerance_warmup", 0.3),
        ):
            share = given.pop(name, usual)
            if share is not None:
                if not 0 <= share <= 1:
                    raise SubspanError(f"{name} must be a share in [0, 1], got {share}")
                given[own] = round(share * steps)
        given["adapt_from"] = min(given["adapt_from"], steps - 1)  # not never
        if "freeze_after" in given:
            given["freeze_after"] = max(given["freeze_after"], given["adapt_from"] + 1)
        return DLRT(
            net, lr, base=base, momentum=0.9 if base == "sgd" else 0.0,  # type: ignore[arg-type]
            weight_decay=weight_decay, workers=workers, **given,
        )  # fmt: skip


def _factored(net: nn.Module) -> dict[str, LowRank]:
    return {name: m for name, m in net.named_modules() if isinstance(m, LowRank)}


def _last(net: nn.Module) -> str | None:
    """Return the last linear layer: the classes, few rows that are not of low rank."""
    linear = [name for name, m in net.named_modules() if isinstance(m, nn.Linear)]
    return linear[-1] if len(linear) > 1 else None


LowRankTraining(
    "dlrt", "layers of low rank from the start, which adapts (Schotthöfer 2022)", "tolerance"
)
LowRankTraining("dlrt-ratio", "as dlrt, but sweeps vary the target ratio and not τ", "target_ratio")
