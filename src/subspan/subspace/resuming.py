"""Exact coordinates beside the complete network in the checkpoints of transformers' Trainer.

A Trainer that is given a network, and not its handle, writes all weights. Their coordinates follow
from them, but only to within the rounding of the weights; an optimizer that goes on from there
comes to other numbers. So the checkpoint has the coordinates, too, and whoever loads it gets them
if they give its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from subspan.subspace.callers import find_checkpoint

FILE = "coordinates.pt"  # no safetensors: servers take all such files of a folder for weights


def keep_beside(coordinates: Mapping[str, Tensor], folder: Any) -> None:
    """Write coordinates into the folder of a checkpoint, by the names that the network has."""
    kept = {name: w.detach().cpu().clone() for name, w in coordinates.items()}
    torch.save(kept, Path(folder) / FILE)


def find_beside(frame: FrameType) -> dict[str, Tensor]:
    """Return the coordinates in the folder of the checkpoint that is being loaded; {} without any.

    They may be other ones than those of the state. The frame is of the code that loads the state.
    """
    folder = find_checkpoint(frame)
    file = None if folder is None else Path(folder) / FILE
    if file is None or not file.is_file():
        return {}
    try:
        kept = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file; the weights say the same to within rounding
        return {}
    return kept if isinstance(kept, dict) else {}
