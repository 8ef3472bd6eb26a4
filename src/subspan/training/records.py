"""The records of runs, and how all records are written, read, and held against a configuration.

The dataclass that writes a file reads it, too: what a record says, and under which names, stands
here (that of a sweep in :mod:`subspan.sweeps.result`). Format 2 is written, 1 and 2 are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from subspan.errors import SubspanError
from subspan.files import refuse_what_is_no_folder, write_atomically
from subspan.training.schema import (
    OPTIONAL,
    OTHERS,
    MisfitError,
    fitting,
    from_json,
    line_of,
    to_json,
)
from subspan.training.score import ACCURACY, Score

FORMAT = 2
STATUSES = ("running", "complete", "failed", "interrupted")
# Format 1 knew no score but accuracy.
_RENAMED = {
    "test_accuracy": "test_score",
    "val_accuracy": "val_score",
    "mean_test_accuracy": "mean_test_score",
}


@dataclass(frozen=True, kw_only=True)
class Record:
    """A JSON file in an output folder that says what was asked for and what came of it."""

    FILE: ClassVar[str]

    format: int = FORMAT  # of the file
    status: str  # one of ``STATUSES``
    # What was asked for, name by name, as a command line or a YAML file has it.
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return the record in a folder, or None where there is none.

        Raises:
            SubspanError: if it cannot be read, is damaged, or of a later format. The message names
                the file and the line.
        """
        path = folder / cls.FILE
        content = read_json(path)
        if content is None:
            return None
        try:
            return from_json(cls._kind(content["status"]), content | {"format": FORMAT})
        except MisfitError as error:
            line = line_of(path.read_text(encoding="utf-8"), error.path, _RENAMED)
            raise SubspanError(f"{path} is damaged in line {line}: {error}: restore it") from None

    @classmethod
    def claim(cls, folder: Path, config: Mapping[str, Any], *, overwrite: bool) -> Self | None:
        """Claim a folder as :func:`claim` does; return its earlier record, or None."""
        if claim(folder, cls.FILE, config, overwrite=overwrite) is None:
            return None
        try:
            return cls.read(folder)
        except SubspanError as error:
            if not overwrite:
                raise SubspanError(f"{error}, or give --overwrite to replace it") from None
            return None

    @classmethod
    def _kind(cls, status: str) -> type[Self]:
        """Return the dataclass of a record with this status."""
        return cls

    def write(self, folder: Path) -> None:
        """Write the record into a folder, whole or not at all."""
        write_json(folder / self.FILE, to_json(self))


@dataclass(frozen=True)
class Alignment:
    """The part of the last batch's gradient that lies in the next random basis."""

    cosine: float  # between the gradient and its part in the basis
    share: float  # of the gradient's norm that this part has


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One row of a run's history.

    Attributes:
        epoch: 1, 2, …
        train_loss: the mean over the epoch, while the weights moved.
        val_loss: after it, on the validation part.
        val_score: likewise.
        learning_rate: at its beginning.
        seconds: of training, without the look at the validation part.
        ranks: of factored layers.
        singular_values: of the same, in descending order.
        alignment: of random bases, by compartment.
        trainable_parameters: where their number changes.
        test_score: at the end of a stage, by which nothing is chosen; else None.
        more: what else a method says.
    """

    epoch: int
    train_loss: float
    val_loss: float
    val_score: float
    learning_rate: float
    seconds: float
    ranks: dict[str, int] = field(default_factory=dict, metadata=OPTIONAL)
    singular_values: dict[str, list[float]] = field(default_factory=dict, metadata=OPTIONAL)
    alignment: dict[str, Alignment] = field(default_factory=dict, metadata=OPTIONAL)
    trainable_parameters: int | None = field(default=None, metadata=OPTIONAL)
    test_score: float | None = field(default=None, metadata=OPTIONAL)
    more: dict[str, Any] = field(default_factory=dict, metadata=OTHERS)


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """The record of one training run, finished or not: ``record.json``.

    Attributes:
        score: what the run is judged by.
        test_score: of the best epoch, read once, at the end.
        val_score: of the best epoch so far.
        best_epoch: its number.
        trainable_parameters: the numbers that the optimizer moves.
        head_parameters: those of them that belong to the head, which every method of fine-tuning
            trains as it is.
        stored_parameters: those that inference needs beyond seeds, changed buffers too.
        weights: of the network that they stand for, tied ones once.
        ranks: of factored layers.
        counts: other counts of the same network, by what they are called.
        checkpoint_bytes: of ``model.safetensors``, or of ``model.subspan`` where there is one.
        seconds_total: over all parts of a run that was interrupted.
        seconds_per_step: the median over epochs.
        peak_memory_bytes: of this process, or of the GPU.
        bytes_sent_per_step: by each process on average, a journal included; None for one alone.
        history: the epochs so far.
        log: trackers that were told.
        processes: their number.
        device: in words.
        versions: of what the result may depend on.
        notes: what readers should know of the data and of processes, in sentences.
        samples: in records of earlier versions, a checksum of the training part.
        digest: a checksum of the samples (:class:`subspan.training.prepare.Prepared`).
        error: why the run failed.
    """

    FILE = "record.json"

    score: Score = ACCURACY
    test_score: float | None
    val_score: float | None
    best_epoch: int | None = None
    trainable_parameters: int
    head_parameters: int = field(default=0, metadata=OPTIONAL)
    stored_parameters: int
    weights: int
    ranks: dict[str, int] = field(default_factory=dict, metadata=OPTIONAL)
    counts: dict[str, int] = field(default_factory=dict, metadata=OPTIONAL)
    checkpoint_bytes: int | None
    seconds_total: float
    seconds_per_step: float | None
    peak_memory_bytes: float | None
    bytes_sent_per_step: float | None = None
    history: list[Epoch] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    processes: int = 1
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    samples: int | None = field(default=None, metadata=OPTIONAL)
    digest: int | None = field(default=None, metadata=OPTIONAL)
    error: str | None = None

    def __post_init__(self) -> None:
        for name, kind in (("method", str), ("lr", float), ("seed", int)):
            from_json(kind, self.config.get(name), ("config", name))
        for name in ("trainable_parameters", "stored_parameters", "weights"):
            if (count := getattr(self, name)) < 1:
                raise MisfitError(f"must be positive, got {count}", (name,))
        for value in (self.test_score, self.val_score):
            if value is not None:
                self.score.checked(value)

    @classmethod
    def _kind(cls, status: str) -> type[Self]:
        complete: Any = CompleteRun
        return complete if status == "complete" else cls


@dataclass(frozen=True, kw_only=True)
class CompleteRun(RunRecord):
    """A run that came to its end: all is measured."""

    test_score: float
    val_score: float
    checkpoint_bytes: int
    seconds_per_step: float
    peak_memory_bytes: float


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record, whole or not at all; keys keep their order, numbers all their digits."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text.encode() + b"\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a record, or None where there is none; refuse what is none, or of a later format."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        version = content["format"]
    except OSError as error:
        raise SubspanError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path, repr(error)) from None
    if type(version) is not int or version < 1:
        raise _damaged(path, f"its format is {version!r}")
    if version > FORMAT:
        raise SubspanError(
            f"{path} has format {version}; this version reads up to {FORMAT}: upgrade"
        )
    if not isinstance(content.get("config"), dict):
        raise _damaged(path, "it lacks config")
    if (status := content.get("status")) not in STATUSES:
        raise _damaged(path, f"its status is {status!r}")
    return dict(_upgrade(content) if version == 1 else content)


def _damaged(path: Path, why: str) -> SubspanError:
    return SubspanError(f"{path} is damaged or no record of subspan ({why}): restore it")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _upgrade(content: Any) -> Any:
    """Return a record of the first format, in the words of this one."""
    if isinstance(content, list):
        return [_upgrade(item) for item in content]
    if isinstance(content, dict):
        return {_RENAMED.get(key, key): _upgrade(value) for key, value in content.items()}
    return content


def claim(
    folder: Path, file: str, config: Mapping[str, Any], *, overwrite: bool
) -> dict[str, Any] | None:
    """Look whether an output folder, there or not, is free for a configuration.

    Return the record (of this file name) of the same configuration, if there is one. One of
    another, or a damaged one, may be replaced only to overwrite it.

    Raises:
        SubspanError: if the folder is a file, or belongs to another configuration; or overwrite is
            no truth value, as "no" would be taken for yes.
    """
    overwrite = fitting(bool, overwrite, "overwrite")
    refuse_what_is_no_folder(folder)
    for other in {"record.json", "sweep.json", "bench.json"} - {file}:
        if (folder / other).exists():
            raise SubspanError(f"{folder} has a {other} of something else: give another --out")
    try:
        record = read_json(folder / file)
    except SubspanError as error:
        if not overwrite:
            raise SubspanError(f"{error}, or give --overwrite to replace it") from None
        return None
    if record is None:
        return None
    different = differences(record["config"], config)
    if different and not overwrite:
        raise SubspanError(
            f"{folder} belongs to another configuration ({changes(different)}): give another "
            "--out, or --overwrite"
        )
    return None if different else record


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the options in which two configurations differ; a missing option counts as null."""
    a, b = plain(theirs), plain(ours)
    return {k: (a.get(k), b.get(k)) for k in sorted(a | b) if a.get(k) != b.get(k)}


def changes(different: Mapping[str, tuple[Any, Any]]) -> str:
    """Write :func:`differences` for people: "epochs 3 → 4, lr 0.1 → 0.3"."""
    return ", ".join(f"{name} {a!r} → {b!r}" for name, (a, b) in different.items())


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as a file gives it back: through JSON, where tuples are lists."""
    found: dict[str, Any] = json.loads(json.dumps(config))
    return found
