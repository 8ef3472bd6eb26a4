"""Whether and how a training goes on from where an earlier one stands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from subspan import checkpoint
from subspan.errors import SubspanError
from subspan.subspace.model import SubspaceModel
from subspan.training import records, state
from subspan.training.folder import RunFolder
from subspan.training.prepare import Prepared
from subspan.training.state import TrainState


def find_state(config: Mapping[str, Any], folder: Path) -> TrainState | None:
    """Read the state of an earlier training of this configuration, if there is one."""
    found = state.read(folder / state.FILE)
    # A file of another run is there if that one was just being replaced when all ended.
    same = found is not None and not records.differences(found.config, config)
    return found if same else None


def check_beginning(
    before: TrainState, folder: RunFolder, model: nn.Module, ready: Prepared
) -> None:
    """Refuse to go on with other samples, from other initial weights, or without the best epoch.

    The model is as it was before the first step. What is missing or damaged of the best epoch's
    checkpoint would be noticed at the end alone.
    """
    size, remedy = ready.task.size(), "bring the data back as they were, or give another --out"
    if before.size != size:
        raise SubspanError(
            f"{folder.path} was begun with {before.size:,} training samples, now there are "
            f"{size:,}: {remedy}"
        )
    if before.samples != ready.digest:
        raise SubspanError(
            f"{folder.path} was begun with other samples, or other labels of them: {remedy}"
        )
    if before.header["kind"] == "part":
        checkpoint.check_part(folder.path, model, before.header)
    if isinstance(model, SubspaceModel):
        checkpoint.check_base(folder.path, model, before.header)
    if before.progress.best_epoch:  # what is missing or damaged would be noticed at the end alone
        checkpoint.read(folder.kept_best)


def check_processes(before: TrainState, folder: Path, now: int, *, must_agree: bool) -> list[str]:
    """Return notes about processes that came or went; if the number ``must_agree``, refuse that."""
    if before.processes == now:
        return []
    if must_agree:
        raise SubspanError(
            f"{folder} was begun in {before.processes} processes, and what they find depends on "
            f"their number, got {now}: go on in {before.processes}"
        )
    return [f"processes: {before.processes} up to step {before.progress.done:,}, then {now}"]


def find_changes(before: TrainState, device: str, versions: Mapping[str, str]) -> list[str]:
    """Return notes about the device and the versions that a training goes on with, if others."""
    was = {"device": before.device, **before.versions}
    now = {"device": device, **versions}
    step = f"up to step {before.progress.done:,}"
    return [
        f"{name}: {was[name]} {step}, then {now[name]}"
        for name in now
        if was.get(name, now[name]) != now[name]
    ]
