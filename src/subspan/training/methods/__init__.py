"""Methods of training through few numbers, one file each.

Training, sweeps, reports and the command line know no method by name: they ask :func:`methods`.
A file in this folder that makes an instance of :class:`Method` has added it
(``docs/add-a-method.md``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from subspan.counts import count
from subspan.errors import SubspanError
from subspan.registry import Registry
from subspan.training.config import Option as Option
from subspan.training.config import Run, check_options, check_rates
from subspan.training.own import import_all
from subspan.training.records import Epoch
from subspan.training.score import Score

HEAD_LR = 1e-3  # of a new layer on a pretrained network, whatever the others are trained through

_registry: Registry[Method] = Registry("method")


TRAIN_FULLY = Option(
    "train_fully",
    str | list[str] | None,
    "parameters to train and store as they are, as fc1 or [fc1,fc2], or head; counted apart",
)
RATE_OF_HEAD = Option("head_lr", float, f"the learning rate of what is trained fully ({HEAD_LR:g})")


class Method(ABC):
    """A method of training: how it changes a network, its optimizer, and its counts.

    Args:
        name: what people type.
        help: one line on what it is and whose.
    """

    options: tuple[Option, ...] = ()
    """The options of this method, beside those of the network, the data and the training."""
    axis: str | None = None
    """The option that a sweep varies: how many numbers are trained; None if it cannot."""
    adapts = False
    """Whether training finds out how many numbers there are, and the axis only steers it."""
    averages_gradients = True
    """Whether processes share work by averaging gradients (DDP); else the optimizer sees to it."""
    trains_head = False
    """Whether it trains the network's head beside something else, if ``train_fully`` is silent."""
    evaluates = False
    """Whether the optimizer's step evaluates the loss itself, by a closure."""

    def __init__(self, name: str, help: str) -> None:  # noqa: A002 (the word that command lines use)
        self.name, self.help = name, help
        _registry.add(name, self)

    @abstractmethod
    def wrap(self, net: nn.Module, seed: int, options: Mapping[str, Any]) -> nn.Module:
        """Make a network trainable by this method, in place.

        Args:
            net: with its initial weights.
            seed: of what the method draws.
            options: of :attr:`options`, those that were given.

        Returns:
            The module whose parameters are trained; :func:`subspan.save` must know it.

        Raises:
            SubspanError: for options that do not fit the network.
        """

    @abstractmethod
    def rates(self, options: Mapping[str, Any]) -> tuple[float, ...]:
        """Return learning rates to try with Adam and these options; the middle is the default."""

    def tried_rates(self, options: Mapping[str, Any]) -> tuple[float, ...]:
        """Return :meth:`rates`, checked.

        Raises:
            SubspanError: if there is none, one is not positive, or two are the same.
        """
        rates = self.rates(options)
        if not isinstance(rates, (list, tuple)):
            raise self.wrong("rates", "a tuple of numbers", rates)
        rates = tuple(rates)
        check_rates(f"rates of the method {self.name}", rates)
        if not rates:
            raise SubspanError(
                f"rates of the method {self.name} are none: it must try one at least"
            )
        return rates

    def optimizer(
        self,
        model: nn.Module,
        run: Run,
        out: Path,
        extra: Mapping[str, Any],
        *,
        steps: int,
        resume: Mapping[str, Any] | None,
    ) -> Optimizer:
        """Return the optimizer of what requires a gradient.

        Args:
            model: of :meth:`wrap`.
            run: with the name of the optimizer, its rate and weight decay.
            out: the run's folder, for methods that keep files of their own.
            extra: what such files should say of the run.
            steps: of the whole training.
            resume: the optimizer's state where a run goes on, for such files; it is loaded
                afterwards. None for a run that begins.
        """
        head = self.head(model, run.options)
        own = {id(p) for p in head}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        rates = ((rest, run.lr), (head, self.head_lr(run)))
        groups = [{"params": some, "lr": lr} for some, lr in rates if some]
        if not groups:
            raise SubspanError(f"method {self.name!r} leaves nothing to train in this network")
        decay = run.training.weight_decay
        if run.training.optimizer == "sgd":
            return SGD(groups, run.lr, momentum=0.9, weight_decay=decay)
        return Adam(groups, run.lr, weight_decay=decay)

    def head(self, model: nn.Module, options: Mapping[str, Any]) -> list[nn.Parameter]:
        """Return what is trained as it is beside the method's own numbers, at a rate of its own.

        A new classifier on a pretrained network is such, and counted apart: every method needs it.
        """
        return []

    def head_lr(self, run: Run) -> float:
        """Return the learning rate of :meth:`head`.

        Raises:
            SubspanError: for a rate that is not positive.
        """
        lr: float = run.options.get("head_lr", HEAD_LR)
        if not 0 < lr < float("inf"):
            raise SubspanError(f"head_lr must be a positive number, got {lr}")
        return lr

    def step(
        self, optimizer: Optimizer, loss: Callable[[], Tensor], backward: Callable[[Tensor], None]
    ) -> Tensor:
        """Make one step: by default forward, backward, and the optimizer's.

        Args:
            optimizer: of :meth:`optimizer`.
            loss: evaluates the loss of a batch.
            backward: in place of ``loss.backward()``: mixed precision has a say in it.

        Returns:
            The loss.
        """
        optimizer.zero_grad()
        value = loss()
        backward(value)
        optimizer.step()
        return value

    def needs_processes(self, options: Mapping[str, Any]) -> bool:
        """Return whether the number of processes changes a run by more than rounding."""
        return False

    def diagnose(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Return more values for an epoch's row, after its last step: JSON by name."""
        return {}

    def bits(self, options: Mapping[str, Any]) -> float | None:
        """Return the bits of a coordinate in a compact file; None if none is to be written."""
        return None

    def ready(self, model: nn.Module, optimizer: Optimizer, run: Run, last: bool) -> bool:
        """Return whether this epoch may count as the best; the ``last`` one of a run must."""
        return True

    def stages(self, run: Run) -> tuple[int, ...]:
        """Return the epochs with which the planned stages end; the last is the run's.

        Each has a schedule of its own, and a row of the history with the test score of its end, by
        which nothing is chosen. By default there is one, of which the run itself says all that.
        """
        return (run.training.epochs,)

    def finished(self, run: Run, history: list[Epoch], score: Score) -> bool:
        """Return whether training ends here: after all epochs, or before."""
        return len(history) == run.training.epochs

    def after_epoch(
        self, model: nn.Module, optimizer: Optimizer, run: Run, history: list[Epoch]
    ) -> nn.Module | None:
        """Change what is trained from here on; called after each epoch but the last.

        Args:
            model: of :meth:`wrap`.
            optimizer: of :meth:`optimizer`; it must know the new parameters afterwards. Where a
                group has another rate from here on, ``rate_factor`` in it is what its first rate is
                multiplied by.
            run: its options, and how many epochs there are.
            history: the rows of all epochs so far.

        Returns:
            The model, if it has other parameters now.
        """
        return None

    def counts(self, model: nn.Module) -> dict[str, Any]:
        """Return the true counts of a trained model.

        Returns:
            ``trainable_parameters``; ``stored_parameters``, every number that inference needs
            beyond seeds (buffers that training changed, too); ``weights``, all of the network, tied
            ones once. A method may add ``counts``, other numbers by what they are called.
        """
        found = count(model)
        return {
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "stored_parameters": found.stored,
            "weights": found.dense,
        }

    def merge(self, model: nn.Module) -> nn.Module:
        """Return the network as it was before :meth:`wrap`, with the weights that it has now."""
        return model

    def wrong(self, what: str, must: str, got: object) -> SubspanError:
        """Make the error for what a function of this method returns, and must not."""
        return SubspanError(f"{what} of the method {self.name} must return {must}, got {got!r:.99}")

    def check(self, options: Iterable[str]) -> None:
        """Refuse options that this method does not have."""
        check_options("method", self, options, methods().values())

    def at(self, value: str) -> dict[str, Any]:
        """Return the options of a point of a sweep, from a text of ``--dims``."""
        return {} if self.axis is None else {self.axis: value}


def methods() -> dict[str, Method]:
    """Return all methods by name; those of the user's modules, and of a notebook so far, too."""
    _add_all()
    return dict(_registry)


def method(name: str) -> Method:
    """Return the method of that name; refuse one that there is not, with the nearest names."""
    _add_all()
    return _registry.find(name)


def _add_all() -> None:
    import_all(__name__)
    from subspan.training.methods.subspace import add_families

    add_families()
