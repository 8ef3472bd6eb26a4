"""Behaviour that the optimizers of this package share: workers, void steps, copies."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from subspan.errors import SubspanError, is_integer, unknown
from subspan.optim.parameters import refuse_unfrozen, refuse_untouchable
from subspan.optim.workers import WorkerMode, Workers
from subspan.precision import as_now, full_precision

Nonfinite = Literal["error", "skip"]


class NonFiniteError(SubspanError):
    """A step has met a number that is infinite or none, and has changed no weight.

    Attributes:
        loss: the loss of the step, where it was evaluated.
    """

    def __init__(self, finding: str, loss: Any = None) -> None:
        super().__init__(f"{finding}: lower the learning rate, or give nonfinite='skip'")
        self.loss = loss


class BaseOptimizer(Optimizer):
    """An optimizer that trains alone or with workers, and moves all weights of a step or none.

    A subclass writes :meth:`_step`, and :meth:`_agreement` if it takes workers. A step that raises
    :class:`NonFiniteError` is an error with ``nonfinite="error"``; with "skip" it is void: it
    counts and leaves the weights as they are.

    Args:
        params: as for every optimizer.
        defaults: the settings of each group, among them ``lr``.
        workers: how processes train together, one of ``worker_modes``; None: this one alone.
        check_every: steps between comparisons of all workers' weights; 0: never.
        nonfinite: see above.
        needs_closure: whether :meth:`step` must be given a closure.

    Attributes:
        needs_closure: likewise.

    Raises:
        SubspanError: for a value that makes no sense, or workers without a process group.
    """

    worker_modes: ClassVar[tuple[WorkerMode, ...]] = ("shared",)

    def __init__(
        self,
        params: Iterable[Any],
        defaults: Mapping[str, Any],
        *,
        workers: WorkerMode | None = None,
        check_every: int = 100,
        nonfinite: Nonfinite = "error",
        needs_closure: bool = False,
    ) -> None:
        if nonfinite not in ("error", "skip"):
            raise unknown("nonfinite", nonfinite, ["error", "skip"])
        if workers not in (None, *self.worker_modes):
            raise unknown("workers", workers, self.worker_modes)
        if not is_integer(check_every, least=0):
            raise SubspanError(f"check_every must be an integer >= 0, got {check_every!r}")
        self.nonfinite, self.needs_closure = nonfinite, needs_closure
        self._workers = Workers(workers, check_every) if workers else None
        self._tensors: dict[str, Tensor] = {}
        self._left_out: list[tuple[str, Tensor]] = []  # what is frozen, with names
        super().__init__(params, {**defaults, "steps": 0, "skipped": 0})

    @property
    def steps(self) -> int:
        """Steps made, void ones too."""
        return int(self.param_groups[0]["steps"])

    @property
    def skipped(self) -> int:
        """Steps that were void, because a number was not finite."""
        return int(self.param_groups[0]["skipped"])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the weights once.

        Args:
            closure: evaluates the loss and returns it; the class says whether it must be given,
                and whether it calls ``backward()``.

        Returns:
            The loss of the first evaluation, if there is a closure.

        Raises:
            SubspanError: if the closure or all gradients are missing, if numbers are not finite
                (see ``nonfinite``), if what was frozen when the optimizer was made is so no more,
                or if workers do not fit together or are lost. The weights are then those of before.
        """
        refuse_unfrozen(self._left_out, self.param_groups)
        every = (p.device for group in self.param_groups for p in group["params"])
        device = next(every, torch.device("cpu"))
        closure = as_now(closure, device)
        with torch.no_grad(), full_precision(device):
            if closure is None and self.needs_closure:
                raise SubspanError(self._missing_closure())
            for group in self.param_groups:
                if not math.isfinite(group["lr"]):
                    raise SubspanError(f"lr must be a number >= 0, a scheduler set {group['lr']}")
            if self._workers:
                self._workers.compare_once(self._agreement, self._tensors, self.steps)
            try:
                loss = self._step(closure)
            except NonFiniteError as error:
                if self.nonfinite == "error":
                    raise
                loss = error.loss
                for group in self.param_groups:
                    group["skipped"] += 1
            for group in self.param_groups:
                group["steps"] += 1
            if self._workers:
                self._workers.compare_weights(self._tensors, self.steps)
            return loss

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        """Move the weights and return the loss, or raise :class:`NonFiniteError` and move nothing.

        Gradients are not recorded here.
        """
        raise NotImplementedError

    def _agreement(self) -> dict[str, Any]:
        """Return what all workers must have in common, as JSON by the name that errors give it."""
        return {}

    def _missing_closure(self) -> str:
        """Return what is said where a closure is needed and not given."""
        return f"{type(self).__name__} needs step(closure), with a closure that returns the loss"

    # ---- groups, copies and states ---------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group whose values make sense.

        Raises:
            SubspanError: if they do not, or for a setting that groups do not have and that would
                be left unread. No group is added then.
        """
        arguments = inspect.signature(type(self)).parameters.keys() - {"params", "momentum"}
        for name in sorted(arguments & param_group.keys() - self.defaults.keys()):
            raise SubspanError(
                f"{name} is one for all groups: give it to {type(self).__name__} itself"
            )
        for name in ("dampening", "maximize", "nesterov"):
            if param_group.get(name):
                raise SubspanError(f"{type(self).__name__} has no {name}: leave it out")
        check_group(self.defaults | param_group)
        given = param_group["params"]
        if not isinstance(given, set):  # which torch refuses
            given = param_group["params"] = [given] if isinstance(given, Tensor) else list(given)
            refuse_untouchable(given)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another optimizer was.

        Raises:
            SubspanError: if that was one of another kind. Nothing is changed then.
        """
        given = [state_dict]

        def check(_: Any, state: dict[str, Any]) -> None:  # as the hooks of others have left it
            self._check_state(state)
            given[0] = state

        with (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(lambda _: self._take(given[0]), prepend=True),
        ):
            super().load_state_dict(state_dict)

    def _take(self, state_dict: Mapping[str, Any]) -> None:
        """Take what PyTorch does not take of a state as it is."""

    def _check_state(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse the state of an optimizer that has other settings in its groups."""
        settings = self.defaults.keys() - {"differentiable"}  # PyTorch adds it on loading
        for group in state_dict["param_groups"]:
            for name in sorted(settings - group.keys()):
                raise SubspanError(
                    f"this state is that of another optimizer, for it has no {name}: load it into "
                    "one that is made as that was"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Return all attributes, so that ``copy`` and ``pickle`` take the optimizer as it is.

        PyTorch copies groups, state and defaults alone. Hooks stay behind, as there, and so does
        what others have put over a method, as a scheduler does over ``step``.

        Raises:
            SubspanError: for an optimizer with workers, which are processes.
        """
        if self._workers:
            raise SubspanError(
                f"{type(self).__name__} with workers cannot be copied, for its processes have one "
                "between them: make a new one in each process and load_state_dict() into it"
            )
        return {
            name: value
            for name, value in vars(self).items()
            if "_hooks" not in name and not callable(getattr(type(self), name, None))
        }


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """Return the loss of a closure that calls ``backward()``; without a closure, None."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def check_group(group: Mapping[str, Any]) -> None:
    """Refuse a rate, a decay or an ε that is negative or infinite, and shares outside [0, 1)."""
    for name in ("lr", "weight_decay", "eps"):
        value = group.get(name, 0.0)
        if not isinstance(value, Real | Tensor) or not 0 <= float(value) < math.inf:
            raise SubspanError(f"{name} must be a number >= 0, got {value}")
    momentum, betas = group.get("momentum", 0.0), group.get("betas", (0.0, 0.0))
    if not _is_share(momentum):
        raise SubspanError(f"momentum must be in [0, 1), got {momentum}")
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(map(_is_share, betas)):
        raise SubspanError(f"betas must be two numbers in [0, 1), got {betas}")


def _is_share(value: Any) -> bool:
    """Return whether a value is a number in [0, 1)."""
    return isinstance(value, Real | Tensor) and 0 <= float(value) < 1
