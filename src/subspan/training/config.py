"""The configuration of a run and of a sweep: plain data, from flags and YAML, kept in records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Protocol

from subspan.errors import SubspanError, unknown
from subspan.training.schema import MisfitError, check_fields, from_json

IMAGES = "images"  # the task where none is named; it is null in records
Schedule = Literal["onecycle", "cosine", "constant"]


@dataclass(frozen=True)
class Option:
    """An option of a method or of a task: a flag on the command line, a key in a YAML file.

    Attributes:
        name: with underscores.
        type: as an annotation.
        help: what ``--help`` says of it.
        lasting: whether a trained network must be read with it, too, so that its file names it.
    """

    name: str
    type: Any
    help: str
    lasting: bool = True


class HasOptions(Protocol):
    """A method, or a task."""

    name: str
    options: tuple[Option, ...]


def check_options(
    kind: str, owner: HasOptions, given: Iterable[str], every: Iterable[HasOptions]
) -> None:
    """Refuse an option that a method or a task does not have, and say which others have it.

    Of a mapping the values are looked at, too: one of another type is refused. The kind is "method"
    or "task", and every one of it may be the one that has the option.
    """
    known = {option.name: option.type for option in owner.options}
    if known.get(axis := str(getattr(owner, "axis", ""))) is int:
        known[axis] = int | str  # a text of --dims, which the method reads
    for name in given:
        if name in known:
            if isinstance(given, Mapping):
                try:
                    from_json(known[name], given[name], (name,))
                except MisfitError as error:
                    raise SubspanError(str(error)) from None
            continue
        others = sorted(each.name for each in every if name in (o.name for o in each.options))
        whose = f" (it is one of {', '.join(others)})" if others else ""
        if known:
            raise SubspanError(f"{unknown(f'option of {owner.name}', name, known)}{whose}")
        flag = f"--{name.replace('_', '-')}"
        raise SubspanError(f"{kind} {owner.name!r} has no options, got {flag}{whose}")


@dataclass(frozen=True)
class Training:
    """The configuration of one training, but for its method: network, data and schedule.

    Args:
        net: a network by name (mlp, mlp-200-200, lenet, lenet-k3-4-8-32, resnet20, …) or your own
            as package.module:function; of the tasks text and lm one of Transformers by its name or
            folder. null is mlp, or the task's own.
        data: an image-classification set: digits (built in), mnist, fashion_mnist, cifar10, or any
            name or folder that datasets.load_dataset reads (a folder of your own: a sub-folder of
            images for each class, or parquet files); of the task text likewise, of lm a file of
            text, too. $SUBSPAN_DATA/NAME is looked at first. Where
            there is no test part a sixth of the images becomes one, the same for every seed. null
            is digits, or the task's own.
        task: the task by its name, or one of your own as package.module:function; see
            examples/language_model.py. The function is called with net, data, validation and seed
            if it has parameters of these names. null is the classification of images.
        epochs: passes over the training part.
        steps: steps of the optimizer in place of epochs; the validation part is looked at after
            each pass over the training part, and at the end. null leaves it to epochs.
        batch_size: samples per step, over all processes together.
        optimizer: adam or sgd (momentum 0.9).
        schedule: how the learning rate changes: onecycle, cosine (to zero), or constant.
        weight_decay: this times a trained number is added to its gradient.
        patience: stop after so many epochs without a better validation score; null never stops.
        validation: the share of the training part that is set aside for choices.
        init: where initial weights come from: seed draws them from the library's generator, so
            that the checkpoint need not hold them; own keeps those that the network's function
            made; auto is seed for the networks of this library and own for yours and for those of
            tasks.
        mixed_precision: the precision of forward and backward pass: no is float32.
        device: where to train; auto is the GPU if there is one.
        task_options: the task's own, by their names, without those that are null.
    """

    net: str | None = None
    data: str | None = None
    task: str | None = None
    epochs: int = 10
    steps: int | None = None
    batch_size: int = 128
    optimizer: Literal["adam", "sgd"] = "adam"
    schedule: Schedule = "onecycle"
    weight_decay: float = 0.0
    patience: int | None = None
    validation: float = 1 / 12
    init: Literal["auto", "seed", "own"] = "auto"
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    task_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task == IMAGES:
            object.__setattr__(self, "task", None)
        check_fields(self)
        if self.task is None:
            for name, usual in (("net", "mlp"), ("data", "digits")):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, usual)
        check_counts(self, "epochs", "batch_size", "steps")
        if self.patience is not None and self.patience < 1:
            raise SubspanError(f"patience must be at least 1 epoch, or null, got {self.patience}")
        if not 0 < self.validation < 1:
            raise SubspanError(f"validation must be a share in (0, 1), got {self.validation}")
        if not 0 <= self.weight_decay < float("inf"):
            raise SubspanError(
                f"weight_decay must be a number that is not negative, got {self.weight_decay}"
            )

    @property
    def title(self) -> str:
        """The network and the data set in words, as in "lenet on mnist"."""
        return title(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Flat, as it stands in records: the task's options are beside the others."""
        content = asdict(self)
        return content | content.pop("task_options")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Training:
        """Read what :meth:`as_dict` wrote; a name that is no field is an option of the task."""
        known = {f.name for f in fields(cls)} - {"task_options"}
        own = {k: value for k, value in content.items() if k not in known and value is not None}
        return cls(**{k: content[k] for k in content if k in known}, task_options=own)


def title(config: Mapping[str, Any]) -> str:
    """Name the network and the data set of a recorded configuration: "lenet on mnist"."""
    parts = [config.get("task"), config.get("net")]
    what = ", ".join(str(part) for part in parts if part) or "network"
    return f"{what} on {config['data']}" if config.get("data") else what


@dataclass(frozen=True)
class Run:
    """One training run: a method with its options, a learning rate and a seed.

    Args:
        training: what is trained, on what and how long.
        method: the method by its name.
        options: the method's own, without those left at their defaults.
        lr: the learning rate, the highest of its schedule; on the command line null is the middle
            one of those that the method tries.
        seed: it gives θ₀, P, the validation part and the order of batches.
    """

    training: Training
    method: str
    options: dict[str, Any]
    lr: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        _check_rate("lr", self.lr)
        if self.seed < 0:
            raise SubspanError(f"seed must not be negative, got {self.seed}")

    def as_dict(self) -> dict[str, Any]:
        """Flat, as it stands in ``record.json``."""
        return self.training.as_dict() | {
            "method": self.method,
            "options": self.options,
            "lr": self.lr,
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Run:
        """Read what :meth:`as_dict` wrote.

        Raises:
            SubspanError: for anything else.
        """
        own = {f.name for f in fields(cls)} - {"training"}
        training = {key: value for key, value in content.items() if key not in own}
        try:
            return cls(Training.from_dict(training), **{key: content[key] for key in own})
        except (TypeError, KeyError) as error:
            raise SubspanError(f"this is not the configuration of a run: {error}") from None


@dataclass(frozen=True)
class Sweep:
    """A family of runs: methods × dims × learning rates × seeds.

    Args:
        training: common to all runs.
        methods: the methods to compare, by their names.
        dims: numbers of coordinates, as 10,30,100; 600+250 gives those of each compartment. For
            dlrt they are tolerances, as 0.05,0.1,0.2, for dlrt-ratio shares, for prodsum numbers
            of atoms (p), for lora and vera ranks. Or those of each method, {hash: [300, 1000],
            lora: [1, 2, 4]}.
        seeds: how many seeds to run, 0, 1, …
        lrs: learning rates to choose from at every d, by the validation score of seed 0; or those
            of each method, {rbd: [1, 2], fpd: 4}. Where there are none, the methods' own.
        options: the methods' own, common to all.
        threshold: the share of the baseline's score at which the intrinsic dimension is read off.
        baseline: the method that the others are compared with; null for none.
        baseline_lrs: learning rates to choose from for the baseline; null takes its own.
        processes: of each run, started by torchrun on this machine.
        small: smaller networks to compare with, by name, of which all weights are trained; auto
            takes the largest of the same kind that have at most d weights, at every d.
    """

    training: Training
    methods: tuple[str, ...] = ("hash",)
    dims: tuple[str, ...] | Mapping[str, tuple[str, ...]] = ("10", "30", "100", "300", "1000")
    seeds: int = 1
    lrs: tuple[float, ...] | Mapping[str, tuple[float, ...]] = ()
    options: dict[str, Any] = field(default_factory=dict)
    threshold: float = 0.9
    baseline: str | None = "full"
    baseline_lrs: tuple[float, ...] = ()
    processes: int = 1
    small: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.methods:
            raise SubspanError("methods is empty: name at least one")
        if not self.dims:
            raise SubspanError("dims is empty: give at least one number of coordinates")
        rates = [("baseline_lrs", self.baseline_lrs), *self._lists("lrs", self.lrs)]
        for name, lrs in rates:
            check_rates(name, lrs)
        listed = [("methods", self.methods), ("small", self.small)]
        for name, values in [*listed, *self._lists("dims", self.dims)]:
            check_different(name, values)
        check_counts(self, "seeds", "processes")
        check_threshold(self.threshold)

    def _lists(self, name: str, given: Any) -> list[tuple[str, tuple[Any, ...]]]:
        """Return a list under its name; or those of the methods, each under a name of its own."""
        if not isinstance(given, Mapping):
            return [(name, given)]
        for method in given:
            if method not in self.methods:
                raise unknown(f"method of {name}", method, self.methods)
        return [(f"{name} of {method}", values) for method, values in given.items()]

    def dims_of(self, method: str) -> tuple[str, ...]:
        """Return the values of a method's axis."""
        if not isinstance(self.dims, Mapping):
            return self.dims
        if not self.dims.get(method):
            raise SubspanError(f"dims has none of {method}: give values of each method")
        return self.dims[method]

    def lrs_of(self, method: str) -> tuple[float, ...]:
        """Return the learning rates to choose from for a method; none leaves it to the method."""
        if method == self.baseline:
            return self.baseline_lrs
        return self.lrs.get(method, ()) if isinstance(self.lrs, Mapping) else self.lrs

    def as_dict(self) -> dict[str, Any]:
        """Flat, as it stands in ``sweep.json``."""
        own = listed_fields(self)
        for name, usual in (("processes", 1), ("small", [])):
            if own[name] == usual:  # records of sweeps that knew no other stay the same
                del own[name]
        return self.training.as_dict() | own


def split(values: Any, name: str) -> tuple[str, ...]:
    """Split a list that is typed as "10,30,100", given in YAML, or one value, into texts."""
    if isinstance(values, str):
        values = values.split(",")
    parts = values if isinstance(values, Sequence) else [values]
    cleaned = tuple(str(part).strip() for part in parts)
    if any(not part for part in cleaned):
        raise SubspanError(f"{name} has an empty entry: give values separated by commas")
    return cleaned


def floats(values: Any, name: str) -> tuple[float, ...]:
    """Split as :func:`split` does, into numbers."""
    try:
        return tuple(float(value) for value in split(values, name))
    except ValueError:
        raise SubspanError(f"{name} must be numbers separated by commas, got {values!r}") from None


def listed_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a configuration beside its training, with lists for tuples."""
    own = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "training"}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in own.items()}


def check_counts(config: Any, *names: str) -> None:
    """Refuse fields of a configuration that are below 1."""
    for name in names:
        if (count := getattr(config, name)) is not None and count < 1:
            raise SubspanError(f"{name} must be at least 1, got {count}")


def check_threshold(threshold: float) -> None:
    """Refuse a threshold that is no share of the baseline."""
    if not 0 < threshold <= 1:
        raise SubspanError(f"threshold must be in (0, 1], got {threshold}")


def check_rates(name: str, lrs: Sequence[float]) -> None:
    """Refuse learning rates that are not positive, or of which two have one folder."""
    for lr in lrs:
        _check_rate(name, lr)
    check_different(name, [f"{lr:g}" for lr in lrs])


def check_different(name: str, values: Sequence[str]) -> None:
    """Refuse values of which two are the same."""
    if len(set(values)) < len(values):
        raise SubspanError(f"{name} names one value twice: {', '.join(values)}")


def _check_rate(name: str, lr: float) -> None:
    if not 0 < lr < float("inf"):
        raise SubspanError(f"{name} must be a positive number, got {lr}")
