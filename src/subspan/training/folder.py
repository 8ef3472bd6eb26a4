"""The folder of a run: its record, its state, and its checkpoints, which one process writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from subspan import checkpoint
from subspan.files import remove_unfinished
from subspan.training import state
from subspan.training.records import RunRecord


class RunFolder:
    """The folder of a run, with the names of its files; a process that does not write leaves it."""

    def __init__(self, path: Path, writes: bool) -> None:
        self.path, self.writes = path, writes
        self.state = path / state.FILE  # from here the training goes on
        self.last = path / "last.safetensors"  # the checkpoint of the last epoch
        self.best = path / "best.safetensors"  # of the best epoch, while the training goes on
        self.model = path / "model.safetensors"  # what is left in the end
        self.compact = path / "model.subspan"  # the same in few bytes, where coordinates have bits

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
        self, model: nn.Module, file: Path, extra: Mapping[str, Any], bits: float | None = None
    ) -> None:
        """Write a checkpoint; with bits of a coordinate, a compact one."""
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
