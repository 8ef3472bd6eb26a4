"""The folder of a run: its record, its state, and its checkpoints, which one process writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from subspan import checkpoint
from subspan.files import remove_unfinished
from subspan.training import state
from subspan.training.records import RunRecord


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, with the names of its files.

    Args:
        path: the folder.
        writes: whether this process is the one that writes; the others leave the folder alone.
    """

    path: Path
    writes: bool

    @property
    def state(self) -> Path:
        """From here the training goes on."""
        return self.path / state.FILE

    @property
    def last(self) -> Path:
        """The checkpoint of the last epoch."""
        return self.path / "last.safetensors"

    @property
    def model(self) -> Path:
        """The checkpoint that is left in the end."""
        return self.path / "model.safetensors"

    @property
    def compact(self) -> Path:
        """The same model in few bytes, where a method has bits for its coordinates."""
        return self.path / "model.subspan"

    @property
    def best(self) -> Path:
        """The checkpoint of the best epoch, while the training goes on."""
        return self.path / "best.safetensors"

    @property
    def kept_best(self) -> Path:
        """The best epoch's checkpoint under either name: a run may end while it is renamed."""
        return self.model if self.model.exists() and not self.best.exists() else self.best

    def open(self, record: RunRecord, *, goes_on: bool) -> None:
        """Make the folder, say in it that the run is running, and clear away what is another's."""
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.path / record.FILE)
        self.write(record)
        for file in (self.best, self.last, self.model, self.compact, self.state):
            remove_unfinished(file)
            if not goes_on:
                file.unlink(missing_ok=True)

    def write(self, record: RunRecord) -> None:
        """Bring the record up to date."""
        if self.writes:
            record.write(self.path)

    def save(
        self,
        model: nn.Module,
        file: Path,
        extra: Mapping[str, Any],
        bits: float | None = None,
    ) -> None:
        """Write a checkpoint.

        Args:
            model: what it is of.
            file: its path.
            extra: what else it is to say.
            bits: of a coordinate in a compact file.
        """
        if self.writes:
            checkpoint.save(model, file, extra=extra, bits=bits)

    def keep_best(self) -> None:
        """Give the best epoch's checkpoint its last name; the last epoch's is needed no more."""
        if self.writes:
            self.kept_best.replace(self.model)
            self.last.unlink(missing_ok=True)

    def forget_state(self) -> None:
        """Remove the state: there is nothing to go on with, or it would come to the same end."""
        if self.writes:
            self.state.unlink(missing_ok=True)
