"""Trackers of a run: TensorBoard, wandb, trackio and whatever else accelerate knows.

Trackers are told the rows of the record's history and, at the end, the test score. The record does
not depend on them, nor do they count as configuration: a run that goes on may log elsewhere.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from subspan.errors import SubspanError, unknown
from subspan.training.records import Epoch, RunRecord
from subspan.training.schema import to_json

PROJECT = "subspan"  # TensorBoard's folder in that of the run, everyone else's project
EXTRAS = ("tensorboard", "trackio", "wandb")  # of this package, by which pip installs them


def check(names: Iterable[str]) -> None:
    """Refuse trackers that accelerate does not know, or whose package is not there."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise unknown("tracker", name, LOGGER_TYPE_TO_CLASS)
        if name not in installed:
            package = f"'subspan[{name}]'" if name in EXTRAS else name
            raise SubspanError(f"the tracker {name} is not installed: pip install {package}")


class Log:
    """The trackers of one run, which may be interrupted and go on.

    Each is told every epoch once, whenever in the run it came in. Who is killed between telling an
    epoch and writing its state tells it again: TensorBoard drops the older row, wandb the newer.
    The main process alone talks to them. Those that let us choose keep their files in the run's
    folder. Where a run goes on, ``before`` is its :meth:`state`.
    """

    def __init__(
        self, accelerator: Accelerator, out: Path, before: Mapping[str, Any] | None
    ) -> None:
        self._accelerator, self._out = accelerator, out
        self._id = before["id"] if before else secrets.token_hex(4)
        self._told: dict[str, int] = dict(before["epochs"]) if before else {}

    def begin(self, config: Mapping[str, Any], history: Sequence[Epoch]) -> None:
        """Start the trackers; those that missed epochs are told them now.

        One that does not start, for want of a login perhaps, is refused.
        """
        names = [str(name) for name in self._accelerator.log_with]
        if not names:
            return
        name = f"{self._out.resolve().name}-{self._id}"
        options = {
            # What is there from this step on was told by a process that was killed.
            "tensorboard": {"purge_step": self._told.get("tensorboard", 0) + 1},
            "trackio": {"name": name, "resume": "allow"},
            "wandb": {"name": name, "id": self._id, "resume": "allow", "dir": str(self._out)},
        }
        try:
            self._accelerator.init_trackers(PROJECT, init_kwargs=options)
            for tracker in self._accelerator.trackers:
                if tracker.name not in self._told:
                    tracker.store_init_configuration(dict(_plain(config)))
                for row in history[self._told.get(tracker.name, 0) :]:
                    self._tell(tracker, row)
        except Exception as error:  # of a tracker it may be any
            for tracker in self._accelerator.trackers:
                with contextlib.suppress(Exception):  # of those that did not start
                    tracker.finish()
            self._accelerator.trackers.clear()
            raise SubspanError(
                f"cannot log to {', '.join(names)}: {error}: see to that, or leave it out of --log"
            ) from error

    def epoch(self, row: Epoch) -> None:
        """Log one more row of the history."""
        for tracker in self._accelerator.trackers:
            self._tell(tracker, row)

    def score(self, record: RunRecord) -> None:
        """Log the run's results, beside the last epoch."""
        names = ("test_score", "best_epoch", "stored_parameters", "checkpoint_bytes")
        values = {name: getattr(record, name) for name in names}
        self._accelerator.log(values, step=len(record.history))

    def end(self) -> None:
        """Write out what trackers still hold.

        accelerate's ``end_training`` would end the process group with them, which may be another's.
        """
        for tracker in self._accelerator.trackers:
            tracker.finish()
        self._accelerator.trackers.clear()

    def state(self) -> dict[str, Any]:
        """Return what a run must know to go on."""
        return {"id": self._id, "epochs": dict(self._told)}

    def _tell(self, tracker: Any, row: Epoch) -> None:
        told = {name: value for name, value in numbers(to_json(row)) if name != "epoch"}
        tracker.log(told, row.epoch)
        self._told[tracker.name] = row.epoch


def numbers(values: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers in nested dicts and lists by names such as "ranks/fc1"."""
    if isinstance(values, (Mapping, list)):
        parts = values.items() if isinstance(values, Mapping) else enumerate(values)
        for key, value in parts:
            yield from numbers(value, f"{name}/{key}" if name else str(key))
    elif isinstance(values, (int, float)):
        yield name, values


def _plain(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Flatten settings for trackers: the method's beside the others, lists as texts."""
    for name, value in (config | config["options"]).items():
        if name != "options" and value is not None:
            yield name, value if isinstance(value, (bool, int, float, str)) else str(value)
