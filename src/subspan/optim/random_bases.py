"""RandomBases: gradient descent along a few random directions, drawn anew at every step.

    θ_{t+1} = θ_t − η P_t P_tᵀ ∇L(θ_t)

Source: Gressmann, Eaton-Rosen and Luschi, "Improving neural network training in low dimensional
random bases", NeurIPS 2020 (RBD; FPD is the same with one basis for ever, as in Li 2018). The
bases have unit columns (published: entries N(0, 1)/√D, the same in expectation), are generated
from the seed and the step, and are never stored: beyond parameters and gradients an optimizer
holds O(d) numbers. Those of ``hash`` learn as well as dense ones, and a step costs O(D), not O(D d)
(``results/gressmann-families``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from subspan import distributed
from subspan.errors import SubspanError, unknown
from subspan.families import projections
from subspan.families.operator import as_step
from subspan.optim import estimators
from subspan.optim.copies import Copied
from subspan.optim.journal import Journal, Record, header_of, move, redraw
from subspan.optim.parts import (
    Part,
    divide,
    entries,
    layout,
    leave_frozen,
    named_tensors,
    overlaps,
    padding_rows,
    parts,
    refuse_computed,
)
from subspan.subspace.compartments import Rules
from subspan.subspace.parameters import digest_tensors, find_slots

Estimator = Literal["gradient", "forward", "evolution"]
Workers = Literal["shared", "independent"]


class RandomBases(Copied, Optimizer):
    r"""Gradient descent in random bases.

    At step t the coordinates c = Pᵀ g of the gradient g are formed, and the weights move by
    −η P u, where u is c, or with momentum its running sum.

    - *Weight decay* λ adds λ θ to the gradient, as in :class:`torch.optim.SGD`, before it is
      projected: the decay acts along the basis only, like everything else.
    - *A parameter without a gradient* is one whose gradient is zero: what moves it are the basis
      and the momentum that it shares with others of its compartment, and its decay.
    - *A frozen parameter*, one that does not require a gradient, takes no part: it has no
      coordinates and never moves.
    - *Padding rows* of embeddings in a module stay where they are, as with every optimizer.
    - *Momentum* μ sums coordinates, u ← μ u + c, and coordinates mean something in their own basis
      only: the sum begins anew at each redraw. With ``redraw_every=1`` there is nothing to sum,
      and momentum is refused.

    Args:
        params: a module, or what every optimizer takes: parameters, pairs of name and parameter,
            or groups of these. A group may have its own ``lr``, ``momentum``, ``weight_decay``,
            ``dim``, ``compartments`` and ``allocation``; compartments never reach across groups.
        dim: d, the number of coordinates of a step in each group; or those of its compartments.
        lr: η. With unit columns P Pᵀ shrinks a gradient d/D times on average, so that good rates
            are far above those of SGD, about 1.
        distribution: a family of :func:`subspan.projections`. A step costs O(D) with ``hash``, and
            O(D d) with ``rademacher`` or ``gaussian``, the published one.
        compartments: as for :class:`~subspan.subspace.SubspaceModel`.
        allocation: likewise.
        redraw_every: steps until the next basis; None keeps the first for ever (FPD).
        momentum: μ.
        weight_decay: λ.
        estimator: how coordinates are found: "gradient" after ``loss.backward()``; or by a closure
            given to :meth:`step` that returns the loss: "forward" (d forward-mode derivatives) or
            "evolution" (2 d evaluations, antithetic: NES; d=1 is MeZO).
        sigma: the distance in weight space of the evaluations of "evolution".
        seed: of the bases, in [0, 2⁶⁴).
        workers: in a process group of :mod:`torch.distributed`, "shared": all draw one basis and
            average coordinates; "independent": each draws its own, and all coordinates are
            gathered. No DDP is needed, and only coordinates travel. None: this process alone.
        check_every: steps between comparisons of all workers' weights; 0: never.
        nonfinite: what a step with a coordinate that is no number does: "skip" (and counts, see
            :attr:`skipped`) or "error".
        journal: a file that records every step (:mod:`subspan.optim.journal`). If it is there
            already, its steps are made first: the parameters must be those that it began with.
        extra: JSON values of the caller's for the journal's header.
        options: what the family has beyond these (``s`` of ``sparse``).

    Raises:
        SubspanError: for anything that cannot be trained as asked.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        dim: int | Sequence[int] | None = None,
        lr: float = 1.0,
        *,
        distribution: str = "hash",
        compartments: Rules = "global",
        allocation: str = "sqrt",
        redraw_every: int | None = 1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        estimator: Estimator = "gradient",
        sigma: float = 0.1,
        seed: int = 0,
        workers: Workers | None = None,
        check_every: int = 100,
        nonfinite: Literal["skip", "error"] = "skip",
        journal: str | Path | None = None,
        extra: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        for name, value, allowed in (
            ("distribution", distribution, projections()),
            ("estimator", estimator, get_args(Estimator)),
            ("workers", workers, (None, *get_args(Workers))),
            ("nonfinite", nonfinite, ("skip", "error")),
        ):
            if value not in allowed:
                raise unknown(name, value, [a for a in allowed if a])
        if redraw_every is not None and not _is_count(redraw_every, least=1):
            raise SubspanError(
                f"redraw_every must be a positive integer or None, got {redraw_every!r}"
            )
        if not _is_count(check_every, least=0):
            raise SubspanError(f"check_every must be an integer >= 0, got {check_every!r}")
        if not 0 < sigma < float("inf"):
            raise SubspanError(f"sigma must be a positive number, got {sigma}")
        padding: dict[int, tuple[int, int]] = {}
        if isinstance(params, nn.Module):
            find_slots(params)  # refuses parameters without values
            padding = padding_rows(params)
            params = params.named_parameters()
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "dim": dim,
            "compartments": compartments,
            "allocation": allocation,
            "steps": 0,
            "skipped": 0,
            "velocity": None,
        }
        if redraw_every != 1 or momentum:  # else there is nothing that a scheduler could turn
            defaults["momentum"] = momentum
        self.redraw_every, self.estimator, self.sigma = redraw_every, estimator, sigma
        self.check_every, self.nonfinite = check_every, nonfinite
        self._parts: tuple[Part, ...] = ()
        try:
            super().__init__(params, defaults)
        except SubspanError:
            raise
        except ValueError as error:  # of torch, on empty lists
            raise SubspanError(f"nothing to train: {error}") from None
        self._workers = distributed.Workers(workers) if workers else None
        independent = self._workers is not None and workers == "independent"
        self._bases = self._workers.world if self._workers and independent else 1
        self._basis = self._workers.rank if self._workers and independent else 0
        named = named_tensors(self.param_groups)
        divided = [
            (tensors, divide(tensors, group["dim"], group["compartments"], group["allocation"]))
            for tensors, group in zip(named, self.param_groups, strict=True)
        ]
        kept = {
            name: padding[id(tensor)]
            for group in named
            for name, tensor in group.items()
            if id(tensor) in padding
        }
        self._parts = parts(divided, distribution, seed, self._bases, options, kept)
        self._sizes = [sum(part.dim for part in compartments) for _, compartments in divided]
        self._tensors = {name: tensor for group in named for name, tensor in group.items()}
        self.layout = layout(self._parts)
        for group in self.param_groups:
            group["layout"] = int(self.layout[:15], 16)
        some = list(self._tensors.values())
        double = any(tensor.dtype == torch.float64 for tensor in some)
        dtype = torch.float64 if double else torch.float32
        self._own = torch.zeros(sum(self._sizes), dtype=dtype, device=some[0].device)
        self._agreement = {
            "the seed": seed,
            "the network or its compartments": self.layout,
            "the settings": [redraw_every, estimator, sigma, nonfinite, workers, check_every],
        }
        self._agreed = self._workers is None
        self._journal: Journal | None = None
        if journal is not None:
            self._open(Path(journal), extra or {})

    # ---- counts ----------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps made, skipped ones too; the next is made in the basis of this number."""
        return int(self.param_groups[0]["steps"])

    @property
    def skipped(self) -> int:
        """Steps that a coordinate that was no number made void."""
        return int(self.param_groups[0]["skipped"])

    @property
    def coordinates(self) -> Tensor:
        """(d,) of the last step: how fast the loss changed along each vector of this process."""
        return self._own

    @property
    def needs_closure(self) -> bool:
        """Whether :meth:`step` must be given a closure that returns the loss, and no gradient."""
        return self.estimator != "gradient"

    # ---- a step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the weights once.

        Args:
            closure: gives the loss; with ``estimator="gradient"`` it also calls ``backward()``, as
                with every optimizer, and may be left out.

        Returns:
            The loss, if there is a closure.

        Raises:
            SubspanError: if there is no gradient, or workers do not fit together or are lost.
        """
        for name, tensor in self._tensors.items():
            if not tensor.requires_grad:
                raise SubspanError(
                    f"{name} has been frozen since, and shares bases with others that would move "
                    "it: make a new optimizer without it"
                )
        if not self._agreed:
            self._check_start()
        loss = self._estimate(closure)
        found = self._own.unsqueeze(0)
        if self._workers:
            found = self._workers.combine(self._own, self.steps)
        if _all_finite(found):
            rates = tuple(float(group["lr"]) for group in self.param_groups)
            record = Record(self.steps, rates, self._with_momentum(found))
            move(self._parts, self._sizes, record, self.redraw_every)
            if self._journal and (self._workers is None or self._workers.rank == 0):
                self._journal.append(record)
        elif self.nonfinite == "error":
            raise SubspanError(
                f"step {self.steps} has a coordinate that is no number: lower the learning rate, "
                "or nonfinite='skip'"
            )
        else:
            self._count("skipped")
        self._count("steps")
        if self._workers and self.check_every and self.steps % self.check_every == 0:
            self._workers.check_same(self._tensors, self.steps)
        return loss

    def _estimate(self, closure: Callable[[], Any] | None) -> Any:
        """This process's coordinates of the step, into ``_own``."""
        self._own.zero_()
        basis, step = self._basis, as_step(redraw(self.steps, self.redraw_every))
        loss = None
        if not self.needs_closure:
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            estimators.gradient(self._parts, self._own, basis, step)
        elif closure is None:
            raise SubspanError(
                f"estimator {self.estimator!r} needs step(closure), with a closure that returns "
                "the loss"
            )
        elif self.estimator == "forward":
            loss = estimators.forward(self._parts, self._own, basis, step, closure)
        else:
            loss = estimators.evolution(self._parts, self._own, basis, step, closure, self.sigma)
        for part in self._parts:
            if decay := self._group_of(part)["weight_decay"]:
                part.add_projected(self._own, part.tensors, basis=basis, step=step, alpha=decay)
        return loss

    def _with_momentum(self, found: Tensor) -> Tensor:
        """(bases, d): the coordinates, or where there is momentum their running sums."""
        if not any(group.get("momentum") for group in self.param_groups):
            return found
        fresh = self.redraw_every is not None and self.steps % self.redraw_every == 0
        sums = []
        for group, own in zip(self.param_groups, found.split(self._sizes, dim=1), strict=True):
            if group.get("momentum"):
                before = group["velocity"]
                if before is not None and not fresh:
                    own = own + group["momentum"] * before.to(own)
                group["velocity"] = own.clone()
            sums.append(own)
        return torch.cat(sums, dim=1)

    def _group_of(self, part: Part) -> dict[str, Any]:
        end = 0
        for group, size in zip(self.param_groups, self._sizes, strict=True):
            end += size
            if part.begin < end:
                return group
        raise AssertionError(part)

    def _count(self, name: str) -> None:
        for group in self.param_groups:
            group[name] += 1

    # ---- what the bases catch --------------------------------------------------------------------

    @torch.no_grad()
    def alignment(self) -> dict[str, dict[str, float]]:
        """How much of the gradient that is there the next step's basis catches (Gressmann, fig. 4).

        Returns:
            For every compartment, and for "all" of them: ``cosine`` between the gradient g and the
            step's direction P Pᵀ g; and ``share``, ‖Pᵀ g‖ / ‖g‖, of the norm. Both are √(d/D) on
            average for a gradient that has nothing to do with the basis.

        Raises:
            SubspanError: if there is no gradient.
        """
        step, own = redraw(self.steps, self.redraw_every), torch.zeros_like(self._own)
        estimators.gradient(self._parts, own, self._basis, step)
        squares: dict[str, list[float]] = {}
        for part in self._parts:
            along = part.vectors(own, basis=self._basis, step=step)
            g = v = 0.0
            for piece in part.compartment.pieces:
                grad = part.tensors[piece.tensor].grad
                g += 0.0 if grad is None else float(entries(grad, piece).double().square().sum())
                v += float(entries(along[piece.tensor], piece).double().square().sum())
            squares[part.compartment.name] = [float(own[part.place].square().sum()), g, v]
        squares["all"] = [sum(column) for column in zip(*squares.values(), strict=True)]
        tiny = 1e-300  # of a gradient that is zero nothing is caught
        return {
            name: {"cosine": c / max(math.sqrt(g * v), tiny), "share": math.sqrt(c / max(g, tiny))}
            for name, (c, g, v) in squares.items()
        }

    # ---- state -----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The constructor calls this; afterwards compartments are fixed, and no group can be added.

        Raises:
            SubspanError: for a group that is added later, in which nothing requires a gradient, or
                whose values make no sense.
        """
        if self._parts:
            raise SubspanError(
                "parameters cannot be added later: the bases are drawn for all of them together; "
                "make a new optimizer"
            )
        given = param_group["params"]
        if not isinstance(given, Tensor | set):  # of which torch takes one and refuses the other
            param_group["params"] = given = list(given)
            refuse_computed(given)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        leave_frozen(group, len(self.param_groups) - 1)
        for name, least in (("lr", 0.0), ("weight_decay", 0.0)):
            if not least <= float(group[name]) < float("inf"):
                raise SubspanError(f"{name} must be a number >= 0, got {group[name]}")
        momentum = group.get("momentum", 0.0)
        if not 0 <= momentum < 1:
            raise SubspanError(f"momentum must be in [0, 1), got {momentum}")
        if momentum and self.redraw_every == 1:
            raise SubspanError(
                "momentum needs a basis that stays: coordinates of different bases cannot be "
                "added; use redraw_every=n or None"
            )
        for name, tensor in named_tensors([group])[0].items():
            if not tensor.is_floating_point():
                raise SubspanError(f"{name} is {tensor.dtype} and P c is real: leave it out")
            if overlaps(tensor):
                raise SubspanError(
                    f"entries of {name} share memory (it is expanded), and cannot move on their "
                    "own: give the tensor that it was expanded from, or a clone() of it"
                )

    def state_dict(self) -> dict[str, Any]:
        """PyTorch's. The journal's steps up to it are on disk when this returns."""
        if self._journal:
            self._journal.sync()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another optimizer of the same parameters and settings was.

        Raises:
            SubspanError: if the state belongs to other bases, or to another moment than the one
                that the journal has led to.
        """
        for group, theirs in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if theirs.get("layout") != group["layout"]:
                raise SubspanError(
                    "this state belongs to other bases: the seed, distribution, dimensions, "
                    "compartments and parameters must be those it was saved with"
                )
            ours, made = (each["steps"] - each["skipped"] for each in (group, theirs))
            if self._journal and ours != made:
                raise SubspanError(
                    f"the state was saved after {made} steps, and {self._journal.path} has {ours}: "
                    "go on from the journal alone, or from a state of that moment"
                )
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Everything.

        Raises:
            SubspanError: for an optimizer with workers or a journal, of which there is one.
        """
        if self._workers:
            raise SubspanError(
                "RandomBases with workers cannot be copied, for its processes have one between "
                "them: make a new one in each process and load_state_dict() into it"
            )
        if self._journal:
            raise SubspanError(
                f"RandomBases with a journal cannot be copied, for both would write to "
                f"{self._journal.path}: make a new one, with a journal of its own or without, and "
                "load_state_dict() into it"
            )
        return super().__getstate__()

    # ---- workers ---------------------------------------------------------------------------------

    def _check_start(self) -> None:
        assert self._workers is not None
        agreement = self._agreement | {
            "the steps made": self.steps,
            "the weights": digest_tensors(self._tensors),
        }
        self._workers.check_start(agreement, self._own.device)
        self._agreed = True

    # ---- the journal -----------------------------------------------------------------------------

    @torch.no_grad()
    def _open(self, path: Path, extra: Mapping[str, Any]) -> None:
        header = header_of(
            self._parts, self._sizes, self._bases, self.redraw_every, self._own.dtype, extra
        )
        writes = self._workers is None or self._workers.rank == 0
        if not path.exists():
            self._journal = Journal.create(path, header) if writes else None
            return
        journal = Journal(path)
        ours, theirs = (_families(each["parts"]) for each in (header, journal.header))
        if ours != theirs:
            raise SubspanError(
                f"{path} is the journal of a training with distribution={theirs!r}, not {ours!r}"
            )
        for key in ("tensors", "parts", "groups", "bases", "redraw_every", "dtype", "base"):
            if journal.header[key] != header[key]:
                raise SubspanError(
                    f"{path} is the journal of another training (its {key} differ): give the "
                    "network as it was before the first step, with the same settings, or another "
                    "file"
                )
        for record in journal.records():
            move(self._parts, self._sizes, record, self.redraw_every)
            for group, own in zip(
                self.param_groups, record.coordinates.split(self._sizes, dim=1), strict=True
            ):
                group["skipped"] += record.step - group["steps"]
                group["steps"] = record.step + 1
                group["velocity"] = own.to(self._own) if group.get("momentum") else None
        if writes:
            journal.cut()
        self._journal = journal


def _all_finite(numbers: Tensor) -> bool:
    # The sum of finite numbers may still be too large; what is no number, no sum hides.
    return math.isfinite(float(numbers.sum())) or bool(torch.isfinite(numbers).all())


def _families(parts: Sequence[Mapping[str, Any]]) -> str:
    """The family of a journal's projections."""
    recipes = {recipe for part in parts for recipe in part["projections"]}
    return ", ".join(sorted({json.loads(recipe)["family"] for recipe in recipes}))


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
