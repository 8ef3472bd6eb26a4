"""A journal kept by an optimizer: its steps so far are made again, and later ones are appended.

The optimizer knows nothing of this: it is told by PyTorch's hooks when a step has been made, and
when a state is saved or loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from subspan.errors import SubspanError
from subspan.optim.journal import Journal, header_of

if TYPE_CHECKING:
    from subspan.optim.random_bases import RandomBases

COMPARED = ("tensors", "parts", "groups", "bases", "redraw_every", "dtype", "base")  # of a header


def attach(optimizer: RandomBases, path: Path, extra: Mapping[str, Any], writes: bool) -> None:
    """Record every step of an optimizer from now on; of a file that exists, make the steps first.

    The optimizer has made no step; ``extra`` are JSON values for the header of a new file; one of
    all workers ``writes``. The file of another training is refused.
    """
    dtype = optimizer.coordinates.dtype
    header = header_of(optimizer.directions, dtype, extra)
    if path.exists():
        journal = Journal(path)
        _check(journal, header)
        _make_steps(optimizer, journal)
        if writes:
            journal.cut()
    elif writes:
        journal = Journal.create(path, header)
    else:
        return

    def append(trained: Any, *_: Any) -> None:
        if trained.last_move is not None:
            journal.append(trained.last_move)

    def check_state(trained: Any, state_dict: Mapping[str, Any]) -> None:
        for groups in zip(trained.param_groups, state_dict["param_groups"], strict=False):
            ours, theirs = (group.get("steps", 0) - group.get("skipped", 0) for group in groups)
            if ours != theirs:
                raise SubspanError(
                    f"the state was saved after {theirs} steps, and {path} has {ours}: go on from "
                    "the journal alone, or from a state of that moment"
                )

    if writes:
        optimizer.register_step_pre_hook(lambda *_: journal.check())
        optimizer.register_step_post_hook(append)
    optimizer.register_state_dict_pre_hook(lambda _: journal.sync())
    optimizer.register_load_state_dict_pre_hook(check_state)


def _check(journal: Journal, header: Mapping[str, Any]) -> None:
    """Refuse the journal of another training."""
    path = journal.path
    ours, theirs = (_families(each) for each in (header, journal.header))
    if ours != theirs:
        raise SubspanError(
            f"{path} is the journal of a training with distribution={theirs!r}, not {ours!r}"
        )
    for key in COMPARED:
        if journal.header[key] != header[key]:
            raise SubspanError(
                f"{path} is the journal of another training (its {key} differ): give the network "
                "as it was before the first step, with the same settings, or another file"
            )


def _families(header: Mapping[str, Any]) -> str:
    """Return the family of a journal's projections."""
    recipes = {recipe for part in header["parts"] for recipe in part["projections"]}
    return ", ".join(sorted({json.loads(recipe)["family"] for recipe in recipes}))


@torch.no_grad()
def _make_steps(optimizer: RandomBases, journal: Journal) -> None:
    """Make the steps of a journal, and count them."""
    directions = optimizer.directions
    for move in journal.moves():
        directions.move(move, directions.redraw(move.step))
        sums = move.coordinates.split(directions.sizes, dim=1)
        for group, own in zip(optimizer.param_groups, sums, strict=True):
            group["skipped"] += move.step - group["steps"]
            group["steps"] = move.step + 1
            group["velocity"] = own.to(optimizer.coordinates) if group.get("momentum") else None
