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

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspan import distributed
from subspan.errors import SubspanError, is_integer, unknown
from subspan.families import projections
from subspan.optim import recorder
from subspan.optim.compartment import entries
from subspan.optim.directions import Directions, Move, divide
from subspan.optim.estimators import ESTIMATORS, Gradient
from subspan.optim.optimizer import BaseOptimizer, Nonfinite, NonFiniteError
from subspan.optim.parameters import leave_frozen, named_tensors, refuse_immovable
from subspan.optim.workers import WorkerMode, Workers
from subspan.subspace.compartments import Rules
from subspan.subspace.parameters import find_padding, find_slots

UNREAD = (  # of momentum
    "momentum needs a basis that stays: coordinates of different bases cannot be added; use "
    "redraw_every=n or None"
)
DRAWN_BY = ("dim", "compartments", "allocation")  # settings of a group that its bases follow from


class RandomBases(BaseOptimizer):
    r"""Gradient descent in random bases.

    At step t the coordinates c = Pᵀ g of the gradient g are formed, and the weights move by
    −η P u, where u is c, or with momentum its running sum.

    - *Weight decay* λ adds λ θ to the gradient, as in :class:`torch.optim.SGD`, before it is
      projected: the decay acts along the basis only, like everything else.
    - *A parameter without a gradient* is one whose gradient is zero: what moves it are the basis
      and the momentum that it shares with others of its compartment, and its decay.
    - *A frozen parameter*, one that does not require a gradient, takes no part: it has no
      coordinates and never moves. Once it is unfrozen, the next step is refused.
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
            "evolution" (2 d evaluations, antithetic: NES; d=1 is MeZO); or one of your own
            (``docs/add-an-optimizer.md``).
        sigma: the distance in weight space of the evaluations of "evolution".
        seed: of the bases, in [0, 2⁶⁴).
        workers: in a process group of :mod:`torch.distributed`, "shared": all draw one basis and
            average coordinates; "independent": each draws its own, and all coordinates are
            gathered. No DDP is needed, and only coordinates travel. None: this process alone, or
            DDP where all have the same bases.
        check_every: steps between comparisons of all workers' weights; 0: never.
        nonfinite: what a step with a coordinate that is not finite does: "skip" to leave the
            weights as they are (:attr:`skipped` counts), or "error".
        journal: a file that records every step (:mod:`subspan.optim.journal`). If it is there
            already, its steps are made first: the parameters must be those that it began with.
        extra: JSON values of the caller's for the journal's header.
        options: of the family alone (``s`` of ``sparse``).

    Attributes:
        coordinates: (d,) of the last step: how fast the loss changed along each vector of this
            process.
        directions: the bases, and the weights that they move.
        last_move: the last step, until the next one begins; None if it was void.
        layout: digest of the bases and of the weights of their rows.

    Raises:
        SubspanError: for anything that cannot be trained as asked.
    """

    worker_modes = ("shared", "independent")

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
        estimator: str = "gradient",
        sigma: float = 0.1,
        seed: int = 0,
        workers: WorkerMode | None = None,
        check_every: int = 100,
        nonfinite: Nonfinite = "skip",
        journal: str | Path | None = None,
        extra: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if distribution not in projections():
            raise unknown("distribution", distribution, projections())
        estimate = ESTIMATORS.find(estimator)
        if redraw_every is not None and not is_integer(redraw_every, least=1):
            raise SubspanError(
                f"redraw_every must be a positive integer or None, got {redraw_every!r}"
            )
        if not 0 < sigma < math.inf:
            raise SubspanError(f"sigma must be a positive number, got {sigma}")
        kept: dict[str, range] = {}
        if isinstance(params, nn.Module):
            kept = find_padding(params, find_slots(params))
            params = params.named_parameters()
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "dim": dim,
            "compartments": compartments,
            "allocation": allocation,
            "velocity": None,
        }
        if redraw_every != 1 or momentum:  # else there is nothing that a scheduler could turn
            defaults["momentum"] = momentum
        self.redraw_every = redraw_every
        try:
            super().__init__(
                params,
                defaults,
                workers=workers,
                check_every=check_every,
                nonfinite=nonfinite,
                needs_closure=estimate.needs_closure,
            )
        except SubspanError:
            raise
        except ValueError as error:  # of torch, on empty lists and on what is given twice
            raise SubspanError(str(error)) from None
        bases, basis = 1, 0
        if self._workers and workers == "independent":
            bases, basis = self._workers.world, self._workers.rank
        named = named_tensors(self.param_groups)
        divided = [
            (tensors, divide(tensors, group["dim"], group["compartments"], group["allocation"]))
            for tensors, group in zip(named, self.param_groups, strict=True)
        ]
        self._tensors = {name: tensor for group in named for name, tensor in group.items()}
        self._shapes = [tensor.shape for tensor in self._tensors.values()]
        self.directions = Directions.draw(
            divided, distribution, seed, bases, redraw_every, options, kept
        )
        self._estimator = estimate(self.directions.compartments, basis, sigma)
        self.layout = self.directions.layout()
        for group in self.param_groups:
            group["layout"] = _as_int(self.layout)
        self._drawn_by = copy.deepcopy(self._drawn_by_groups())
        tensors = list(self._tensors.values())
        double = any(tensor.dtype == torch.float64 for tensor in tensors)
        dtype = torch.float64 if double else torch.float32
        d = sum(self.directions.sizes)
        self.coordinates = torch.zeros(d, dtype=dtype, device=tensors[0].device)
        self.last_move: Move | None = None
        self._compared = False  # with the other processes of DDP
        self._settings = {
            "the seed": seed,
            "the network or its compartments": self.layout,
            "the settings": [redraw_every, estimator, sigma, nonfinite, workers, check_every],
        }
        self._journal = None if journal is None else Path(journal)
        if self._journal:
            writes = self._workers is None or self._workers.rank == 0
            recorder.attach(self, self._journal, extra or {}, writes)

    @property
    def estimator(self) -> str:
        """The name of the estimator."""
        return self._estimator.name

    @property
    def sigma(self) -> float:
        """The distance in weight space of the evaluations of "evolution"."""
        return self._estimator.sigma

    # ---- a step ----------------------------------------------------------------------------------

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        self.last_move = None
        self._check_tensors()
        if not self._compared:
            self._compare_under_ddp()
        groups, directions, estimator = self.param_groups, self.directions, self._estimator
        step = groups[0]["steps"]
        redraw, own = directions.redraw(step), self.coordinates.zero_()
        if self.redraw_every and step % self.redraw_every == 0:
            for group in groups:
                group["velocity"] = None  # a sum in the last basis, also if this step is void
        loss = estimator.estimate(own, redraw, closure)
        for number, group in enumerate(groups):
            if group["weight_decay"]:
                self._add_decay(number, redraw)
        coordinates = self._workers.combine(own, step) if self._workers else own.unsqueeze(0)
        # A sum of finite numbers may be infinite, but no sum hides one that is not finite.
        if not math.isfinite(coordinates.sum()) and not bool(coordinates.isfinite().all()):
            raise NonFiniteError(f"a coordinate of step {step} is not finite", loss)
        for group in groups:
            if group.get("momentum"):
                coordinates = self._add_momentum(coordinates)
                break
        rates = tuple([float(group["lr"]) for group in groups])
        self.last_move = Move(step, rates, coordinates)
        directions.move(self.last_move, redraw)
        return loss

    def _check_tensors(self) -> None:
        """Refuse tensors to which the rows of the bases do not belong any more."""
        given = [id(p) for group in self.param_groups for p in group["params"]]
        if given != [*map(id, self._tensors.values())]:
            raise SubspanError(
                "the groups have other parameters than bases were drawn for: make a new optimizer"
            )
        if self._drawn_by != self._drawn_by_groups():
            raise SubspanError(
                f"{', '.join(DRAWN_BY)} of a group are those that its bases were drawn by, and "
                "another value would be left unread: make a new optimizer"
            )
        for (name, tensor), shape in zip(self._tensors.items(), self._shapes, strict=True):
            if tensor.shape != shape:
                raise SubspanError(
                    f"{name} has the shape {list(tensor.shape)} now, and had {list(shape)} when "
                    "its bases were drawn: make a new optimizer"
                )
            if not tensor.requires_grad:
                raise SubspanError(
                    f"{name} has been frozen since, and shares bases with others that would move "
                    "it: make a new optimizer without it"
                )

    def _compare_under_ddp(self) -> None:
        """Refuse processes whose steps would be others, where DDP averages what it knows of."""
        alone = self._workers is None and distributed.world() > 1
        if alone and distributed.find_ddp(*self._tensors.values()):
            if self.needs_closure:
                raise SubspanError(
                    f"estimator {self.estimator!r} has no gradients that DDP could average, and "
                    "every process would go its own way: give workers='shared'"
                )
            Workers("shared", 0).compare_once(self._agreement, self._tensors, self.steps)
        self._compared = True

    def _drawn_by_groups(self) -> list[list[Any]]:
        return [[group[name] for name in DRAWN_BY] for group in self.param_groups]

    def _add_decay(self, number: int, redraw: Tensor) -> None:
        """Add λ Pᵀ θ of one group to the coordinates."""
        decay, basis = self.param_groups[number]["weight_decay"], self._estimator.basis
        for weights in self.directions.compartments_of(number):
            weights.add_projected(self.coordinates, weights.tensors, basis, redraw, decay)

    def _add_momentum(self, coordinates: Tensor) -> Tensor:
        """Return (bases, d) coordinates, or their running sums in groups with momentum."""
        if self.redraw_every == 1:
            raise SubspanError(UNREAD)  # it was set since
        sums = []
        parts = coordinates.split(self.directions.sizes, dim=1)
        for group, own in zip(self.param_groups, parts, strict=True):
            if group.get("momentum"):
                if (before := group["velocity"]) is not None:
                    own = own + group["momentum"] * before.to(own)
                group["velocity"] = own.clone()
            sums.append(own)
        return torch.cat(sums, dim=1)

    def _missing_closure(self) -> str:
        return (
            f"estimator {self.estimator!r} needs step(closure), with a closure that returns the "
            "loss"
        )

    def _agreement(self) -> dict[str, Any]:
        return self._settings

    # ---- alignment -------------------------------------------------------------------------------

    @torch.no_grad()
    def alignment(self) -> dict[str, dict[str, float]]:
        """Measure how much of the gradient the next step's basis catches (Gressmann, figure 4).

        Returns:
            For every compartment, and for "all" of them: ``cosine`` between the gradient g and the
            step's direction P Pᵀ g; and ``share``, ‖Pᵀ g‖ / ‖g‖, of the norm. Both are √(d/D) on
            average for a gradient that has nothing to do with the basis.

        Raises:
            SubspanError: if there is no gradient, or a step would be refused.
        """
        self._check_tensors()
        redraw, basis = self.directions.redraw(self.steps), self._estimator.basis
        own, compartments = torch.zeros_like(self.coordinates), self.directions.compartments
        Gradient(compartments, basis, self.sigma).estimate(own, redraw, None)
        squares: dict[str, list[float]] = {}
        for weights in compartments:
            along = weights.vectors(own, basis, redraw)
            g = v = 0.0
            for piece in weights.compartment.pieces:
                grad = weights.tensors[piece.tensor].grad
                g += 0.0 if grad is None else float(entries(grad, piece).double().square().sum())
                v += float(entries(along[piece.tensor], piece).double().square().sum())
            squares[weights.compartment.name] = [float(own[weights.place].square().sum()), g, v]
        squares["all"] = [sum(column) for column in zip(*squares.values(), strict=True)]
        tiny = 1e-300  # a gradient of zeros has both 0
        return {
            name: {"cosine": c / max(math.sqrt(g * v), tiny), "share": math.sqrt(c / max(g, tiny))}
            for name, (c, g, v) in squares.items()
        }

    # ---- state -----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The constructor calls this; afterwards compartments are fixed, and no group can be added.

        Raises:
            SubspanError: for a group that is added later, in which nothing requires a gradient, or
                whose values make no sense; see also :meth:`BaseOptimizer.add_param_group`.
        """
        if hasattr(self, "directions"):
            raise SubspanError(
                "parameters cannot be added later: the bases are drawn for all of them together; "
                "make a new optimizer"
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._left_out += leave_frozen(group, len(self.param_groups) - 1)
        if group.get("momentum") and self.redraw_every == 1:
            raise SubspanError(UNREAD)
        for name, tensor in named_tensors([group])[0].items():
            refuse_immovable(name, tensor)

    def _check_state(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse a state of other bases."""
        for theirs in state_dict["param_groups"]:
            if theirs.get("layout") != _as_int(self.layout):
                raise SubspanError(
                    "this state belongs to other bases: the seed, distribution, dimensions, "
                    "compartments, redraw_every and parameters must be those it was saved with"
                )
        super()._check_state(state_dict)

    def _take(self, state_dict: Mapping[str, Any]) -> None:
        self._drawn_by = copy.deepcopy(self._drawn_by_groups())  # the same in other words, perhaps

    def __getstate__(self) -> dict[str, Any]:
        """Return all attributes.

        Raises:
            SubspanError: for an optimizer with workers or a journal, of which there is one.
        """
        if self._journal:
            raise SubspanError(
                f"RandomBases with a journal cannot be copied, for both would write to "
                f"{self._journal}: make a new one, with a journal of its own or without, and "
                "load_state_dict() into it"
            )
        return super().__getstate__()


def _as_int(digest: str) -> int:
    """Return a digest as states hold it."""
    return int(digest[:15], 16)
